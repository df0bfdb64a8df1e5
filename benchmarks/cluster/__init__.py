"""Offline generation on a pool of replicas, here or on a Ray cluster: `vllm-sparq bench ray`."""
