"""``pytest -p tests.cuda.plugin``: the tests of engines, with the engines on the pretended CUDA."""

from __future__ import annotations

from tests.cuda import pretend
from tests.engine import support

support.environment()
pretend.install()

GRAPHS = {"mode": 0, "custom_ops": ["none"], "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
"""Nothing is compiled, attention is captured in full graphs where it can be, else what lies between is."""

support.ENGINE.update(enforce_eager=False, compilation_config=GRAPHS, max_num_seqs=16)  # vLLM warms up with all of them
