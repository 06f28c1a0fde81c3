"""Units of networks, matched by permutations."""
