"""What a step of the engine brings, sorted: which rows are read how, over which blocks.

`builder` is what vLLM calls once per step. It makes `rows` (plain arguments of the ops); over quantized pages with the
help of `staged` and `staged_rows`, and where tokens are evicted in the turns of `evicting`.
"""
