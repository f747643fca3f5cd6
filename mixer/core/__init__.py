"""The pure core: mixtures, schedules, plans and policies. numpy, scipy and the standard library only."""
