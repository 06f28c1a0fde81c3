"""Paths between points: polylines, minimum-energy paths, curves, spanning trees."""
