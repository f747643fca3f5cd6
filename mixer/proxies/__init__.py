"""Mixtures found by many small runs: the runs, the table of their results, and the fits over it."""
