"""Loaded by every Python that a test starts, since `tests/conftest.py` puts this folder first on their PYTHONPATH.

Loading vLLM makes more than a million objects, of which hardly one becomes garbage. Python looks for it all the same,
every 700 of them and through all there are again and again: a tenth of the eight seconds that each process takes.
"""

import gc

gc.set_threshold(100_000, 50, 100)
