"""Statistics of comparisons between optimizers."""
