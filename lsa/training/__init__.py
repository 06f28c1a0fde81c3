"""Data, networks and optimizers by name, and the loop that trains one with another."""
