"""Measurements with fixed seeds and named baselines; each prints its environment and saves what it found."""
