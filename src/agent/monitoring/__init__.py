"""Watching the agents day and night: what is measured, what is found in it, and who is told."""
