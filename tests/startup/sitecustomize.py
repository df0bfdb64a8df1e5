"""Loaded by every Python that a test starts, since `tests/conftest.py` puts this folder first on their PYTHONPATH.

Loading vLLM makes more than a million objects, of which hardly one becomes garbage. Python looks for it all the same,
every 700 of them and through all there are again and again: a tenth of the eight seconds that each process takes.

And an engine of vLLM's is three processes, each of which loads it. With `VLLM_SPARQ_TESTS_FORK=1` vLLM forks the second
and the third, as it does by default on other platforms than the CPU's, which spawns whatever a user asks for.
"""

import gc
import multiprocessing
import os
import sys

gc.set_threshold(100_000, 50, 100)

_get_context = multiprocessing.get_context


def _forking(method=None):
    """`multiprocessing.get_context`, which forks where vLLM would spawn if the environment says so."""
    asked_by_vllm = sys._getframe(1).f_globals["__name__"] == "vllm.utils.system_utils"
    forks = method == "spawn" and asked_by_vllm and os.environ.get("VLLM_SPARQ_TESTS_FORK") == "1"
    return _get_context("fork" if forks else method)


multiprocessing.get_context = _forking
