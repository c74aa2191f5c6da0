"""Drawings of evaluations: the page, comparisons of runs, prototypes, parts, trees."""
