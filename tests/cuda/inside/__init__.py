"""What `tests/cuda/test_pretended.py` runs in a process of its own."""
