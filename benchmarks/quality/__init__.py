"""What compression costs in answers: `vllm-sparq eval` and `vllm-sparq sweep`."""
