"""A result as a picture, a notebook cell or an interactive page."""
