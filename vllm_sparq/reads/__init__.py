"""What a decode step reads of its context: one file per read, one row in `READS`.

A read knows its decode op, which options mean nothing to it, what it needs of a page, and its own arithmetic: when a
context is read in full, how many tokens are read otherwise, and how many bytes that moves. Everything else (attention
layers, doctor, benchmarks) asks these questions and never which read it is.

Plain numbers: nothing here knows about vLLM or tensors. S is the context length, the current token included.
"""

from __future__ import annotations

from vllm_sparq.reads.base import CUDA_BREAK_EVEN, MEASURED_BREAK_EVEN, Counts, HeadShape, PageNeeds, Read, SparseRead
from vllm_sparq.reads.dense import DenseRead
from vllm_sparq.reads.infllm import InfllmRead
from vllm_sparq.reads.spans import LEAST_SPANS, SPAN_RANKINGS, SPAN_TOKENS, SpansRead, spans_of
from vllm_sparq.reads.sparq import SparqRead

READS: dict[str, type[Read]] = {"sparq": SparqRead, "spans": SpansRead, "infllm": InfllmRead, "dense": DenseRead}
"""Value of the option ``read`` -> its class."""

DIALS = frozenset(dial for read in READS.values() for dial in read.dials)
"""Options that turn a read. All others say which read it is, and what the cache holds."""

__all__ = [
    "CUDA_BREAK_EVEN",
    "DIALS",
    "LEAST_SPANS",
    "MEASURED_BREAK_EVEN",
    "READS",
    "SPAN_RANKINGS",
    "SPAN_TOKENS",
    "Counts",
    "DenseRead",
    "HeadShape",
    "InfllmRead",
    "PageNeeds",
    "Read",
    "SpansRead",
    "SparqRead",
    "SparseRead",
    "spans_of",
]
