"""Time and rightness of single attention ops: `vllm-sparq bench ops`, and a check of the Triton kernels on a GPU."""
