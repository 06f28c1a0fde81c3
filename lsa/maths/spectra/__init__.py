"""Eigenvalues, densities, traces and moments of a matrix that is known by its products."""
