"""Speed as clients see it: `vllm-sparq bench serve`, `vllm-sparq demo`, and an application for Ray Serve."""
