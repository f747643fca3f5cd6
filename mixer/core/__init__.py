"""The pure core: mixtures, schedules, plans and policies. Imports numpy, scipy and the standard library only."""
