"""What the application's database holds: its structure, its data patterns, and how both change."""
