"""vLLM's CUDA path without a GPU: see `tests.cuda.pretend`."""
