"""What is worth knowing on the day there is a GPU: the kernels (`gpu_check.py`) and the engine (`gpu_engine.py`)."""
