"""Approvals: who may say yes to what, how they are asked, and what a paused run waits for."""
