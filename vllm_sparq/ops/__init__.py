"""The operations on pages: torch only, never vLLM.

One folder per op: ``__init__.py`` is the contract, ``reference.py`` the specification, ``cpu.py`` and ``triton.py`` the
kernels that are measured against it. Every implementation has the contract's signature and checks nothing.

One alphabet for sizes, everywhere:

    B requests      T new tokens of all requests     S context length of a request, its new tokens included
    H query heads   G KV heads (G divides H)         D head size
    P cache pages   N tokens per page (block size)   M blocks in the longest request
"""
