"""`vllm-sparq doctor`: is everything in place here, and what do the options mean for a model?

`command` is the command line. `machine`, `model` and `engine` make a `findings.Section` each.
"""
