"""What the documents say is so: every command, path, option, test and name of vLLM's that they mention."""
