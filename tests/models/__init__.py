"""Tiny models of many architectures with random weights, against stock vLLM."""
