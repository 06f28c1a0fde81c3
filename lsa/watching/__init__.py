"""Measurements during a training; `lsa.watch` starts them."""
