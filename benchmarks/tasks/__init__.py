"""Tasks with answers that can be scored: generated ones here, the papers' in `papers`."""
