"""Linear algebra, paths and statistics: a product, an energy or numbers in, numbers out.

Nothing here knows a landscape, a run or a file.
"""
