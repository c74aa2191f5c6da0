"""What evaluations draw: the page, comparisons of runs, patches of prototypes, parts, trees."""
