"""Other people's learning, run by the same harness with the same scripted model."""
