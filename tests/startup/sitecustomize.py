"""Loaded by every Python that a test starts, since `tests/conftest.py` puts this folder first on their PYTHONPATH.

Loading vLLM makes more than a million objects, of which hardly one becomes garbage. Python looks for it all the same,
every 700 of them and through all there are again and again: a tenth of the eight seconds that each process takes.

And an engine of vLLM's is three processes, each of which loads it. With `VLLM_SPARQ_TESTS_FORK=1` vLLM forks the second
and the third, as it does by default on other platforms than the CPU's, which spawns whatever a user asks for; with
`VLLM_SPARQ_TESTS_FORK=core` the second alone, so that workers come to our plugin as users' do.
"""

import gc
import multiprocessing
import os
import sys

gc.set_threshold(100_000, 50, 100)

_get_context = multiprocessing.get_context


def _forking(method=None):
    """`multiprocessing.get_context`, which forks where vLLM would spawn if the environment says so."""
    asks = sys._getframe(1)
    if method == "spawn" and asks.f_globals["__name__"] == "vllm.utils.system_utils":
        which = os.environ.get("VLLM_SPARQ_TESTS_FORK")
        if which == "1" or (which == "core" and asks.f_back.f_globals["__name__"] == "vllm.v1.engine.utils"):
            return _get_context("fork")
    return _get_context(method)


multiprocessing.get_context = _forking
