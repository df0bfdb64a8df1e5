"""Repetition of SparQ's authors: 6,000 characters of Shakespeare, then a piece of them again, to be gone on with.

A piece is a cue of 128 characters and a reference of 256, both extended to the next white space. The score is the share
of the reference's characters before the first mismatch; times 256 it is the papers' number of characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tasks.papers import Limits
from vllm_sparq.benchmarks.tasks.papers.files import n_tokens, read, shuffled

SHUFFLE_SEED = 544085
N_CONTEXT, N_CUE, N_REFERENCE = 6000, 128, 256
MAX_TOKENS = 128


def up_to_space(text: str, start: int, length: int) -> int | None:
    """Where a piece of at least ``length`` characters from ``start`` on meets white space; None where the text ends."""
    if start + length > len(text):
        return None
    space = next(re.compile(r"\s").finditer(text, start + length), None)
    return len(text) if space is None else space.start()


def pieces(text: str) -> Iterator[tuple[str, str, str]]:
    """Context, cue and reference, one after the other."""
    start = 0
    while (end := up_to_space(text, start, N_CONTEXT)) is not None:
        context = text[start:end]
        inside = 0
        while (middle := up_to_space(context, inside, N_CUE)) is not None:
            stop = up_to_space(context, middle, N_REFERENCE)
            if stop is None:
                break
            yield context, context[inside:middle], context[middle:stop]
            inside = stop
        start = end


def load(name: str, files: Sequence[Path], *, tokenizer: Any, limits: Limits) -> list[Example]:
    """Pieces in the authors' order."""
    found = list(pieces(read(files[0])))
    order = shuffled(range(len(found)), SHUFFLE_SEED)[: limits.n]
    return [_example(name, *found[i], i, tokenizer) for i in order]


def _example(name: str, context: str, cue: str, reference: str, seed: int, tokenizer: Any) -> Example:
    prompt = context + "\n" + cue
    return Example(
        task=name,
        prompt=prompt,
        answer=reference,
        metric="prefix",
        n_prompt_tokens=len(tokenizer(prompt).input_ids),
        depth=context.index(cue) / len(context),
        seed=seed,
        max_tokens=min(MAX_TOKENS, n_tokens(tokenizer, reference)),
        stop=(),
    )
