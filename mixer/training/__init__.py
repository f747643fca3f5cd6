"""Everything that needs torch: datasets, models, gradients, the loop."""
