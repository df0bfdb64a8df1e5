"""vllm-sparq: SparQ attention, and the memory it needs, as a plugin of stock vLLM."""

__version__ = "0.1.0"
