"""WikiText-103 as SparQ's authors measure it: 6,000 characters read, the next 400 forced one token at a time.

Both ends are moved to the next white space. Bits per character of the forced text, of which 256 tokens at most count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tasks.papers import Limits
from vllm_sparq.benchmarks.tasks.papers.files import read, shuffled

SHUFFLE_SEED = 2353669
N_PREFILL, N_REFERENCE = 6000, 400
MAX_TOKENS = 256

TITLE = re.compile(r"^ = [^=].* = \n", re.MULTILINE)
"""The line that begins an article; those of its sections have more signs."""


def documents(text: str) -> Iterator[str]:
    """The articles of a file, each from its title on."""
    starts = [match.start() for match in TITLE.finditer(text)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        yield text[start:end]


def cut(document: str) -> tuple[str, str] | None:
    """What is read and what is forced; None for a document that is too short."""
    first = next(re.compile(r"\s").finditer(document, N_PREFILL), None)
    if first is None:
        return None
    start = first.start()
    if len(document) < start + N_REFERENCE:
        return None
    second = next(re.compile(r"\s").finditer(document, start + N_REFERENCE), None)
    end = len(document) if second is None else second.start()
    return document[:start], document[start:end]


def load(name: str, files: Sequence[Path], *, tokenizer: Any, limits: Limits) -> list[Example]:
    """Articles that are long enough, in the authors' order."""
    pieces = [piece for piece in map(cut, documents(read(files[0]))) if piece]
    order = shuffled(range(len(pieces)), SHUFFLE_SEED)[: limits.n]
    return [_example(name, *pieces[i], i, tokenizer) for i in order]


def _example(name: str, prompt: str, reference: str, seed: int, tokenizer: Any) -> Example:
    prompt_ids = tokenizer(prompt).input_ids
    answer_ids = tokenizer(reference, add_special_tokens=False).input_ids[:MAX_TOKENS]
    return Example(
        task=name,
        prompt=prompt,
        answer=tokenizer.decode(answer_ids),
        metric="bits_per_character",
        n_prompt_tokens=len(prompt_ids),
        depth=None,
        seed=seed,
        max_tokens=len(answer_ids),
        stop=(),
        prompt_ids=tuple(prompt_ids),
        answer_ids=tuple(answer_ids),
    )
