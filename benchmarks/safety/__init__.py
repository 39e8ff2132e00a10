"""How safe it is to let agents act: statements, decisions, escapes and kills, counted."""
