"""Speed through the engine: `vllm-sparq bench engine` and `bench pressure`."""
