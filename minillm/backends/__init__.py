"""Ways to compute attention over slots.  `reference` is the specification; every other backend has its signatures."""
