"""The subcommands of `agent`, one file per subject. Heavy modules are imported when a command runs."""
