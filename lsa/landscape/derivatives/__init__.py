"""How gradients, products with curvature and per-sample gradients of a network are computed.

`lsa.landscape` is what makes use of it.
"""
