"""Decide, while a model trains, how much of each data domain the next steps should see."""
