"""Bring a checkpoint to 4 bits, and say what that cost: checks before, an engine of its own process, measures after."""
