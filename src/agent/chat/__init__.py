"""How messages for people are written for Slack and Telegram, and how they get there; approvals and alerts share it."""
