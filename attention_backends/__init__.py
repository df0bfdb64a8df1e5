"""The vLLM face of the methods: backends, metadata, workers, and what is refused at start-up."""
