"""The setting for a model, a text and a machine: `vllm-sparq tune`."""
