"""What a method costs a language model: bits per byte of text, through the engine.

    vllm-sparq research bits --methods int8,int4,kivi4,kivi2

A row of a prompt sees every block before its own as codes, just as a decoded token does, so vLLM's prompt
log-probabilities measure quantized formats as they are served. SparQ reads prompts densely, so it is forced to decode
the text token by token (`forced`). `vllm-sparq eval --tasks text` measures windows of any length, resumably.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.quality.engine import Engine, Run
from vllm_sparq.benchmarks.quality.evaluate import methods_at, scored
from vllm_sparq.benchmarks.quality.prompts import read_text
from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import DTYPES, UsageError, check_model, comma_names, make_console, place, positive


def windows(model: Path, text: str, n_tokens: int, n_windows: int) -> list[Example]:
    """The first ``n_windows`` pieces of the text, ``n_tokens`` each; all but the first token of each are scored.

    Raises:
        UsageError: the text is too short.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) < n_tokens * n_windows:
        raise UsageError(f"the text has {len(ids):,} tokens: {n_windows} windows of {n_tokens} need more")
    pieces = [ids[i * n_tokens : (i + 1) * n_tokens] for i in range(n_windows)]
    return [_example(tokenizer, piece, i) for i, piece in enumerate(pieces)]


def _example(tokenizer: Any, ids: Sequence[int], seed: int) -> Example:
    return Example(
        task="text",
        prompt=tokenizer.decode(ids[:1]),
        answer=tokenizer.decode(ids[1:]),
        n_prompt_tokens=1,
        depth=None,
        seed=seed,
        max_tokens=len(ids) - 1,
        stop=(),
        metric="bits_per_byte",
        prompt_ids=tuple(ids[:1]),
        answer_ids=tuple(ids[1:]),
    )


def corpus_text(n_tokens: int) -> str:
    """Held-out text of the bundled model's corpus, at least so many of its tokens."""
    from vllm_sparq.benchmarks.tiny_model.corpus import documents

    return "\n\n".join(documents(max(1 << 19, 8 * n_tokens), held_out=True))


def difference(found: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences and its standard error."""
    differences = [a - b for a, b in zip(found, base, strict=True)]
    mean = math.fsum(differences) / len(differences)
    spread = math.fsum((x - mean) ** 2 for x in differences) / max(1, len(differences) - 1)
    return mean, math.sqrt(spread / len(differences))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq research bits`."""
    parser.description = __doc__
    add = parser.add_argument
    add("--model", type=place, default=WEIGHTS, help="a model folder (default: the bundled model)")
    add("--methods", type=comma_names, default=["int8", "int4", "kivi4", "kivi2"], help="beside dense")
    add("--compression", type=comma_names, default=["8"], help="of methods that take one (default: 8)")
    add("--text", type=place, help="a text file (default: held-out text of the bundled model's corpus)")
    add("--length", type=positive, default=1024, help="tokens of a window (default: 1024)")
    add("--n", type=positive, default=64, help="windows (default: 64)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="element type of the model (default: bfloat16)")


def main(args: argparse.Namespace) -> int:
    """Measure, print."""
    from rich.table import Table

    args.model = check_model(args.model)
    methods = methods_at(args.methods, args.compression, {})
    text = corpus_text(args.length * args.n) if args.text is None else read_text(args.text)
    examples = windows(args.model, text, args.length, args.n)
    table = Table(title=f"bits per byte ± standard error of the difference, {args.n} windows of {args.length} tokens")
    for column in ("method", "bits per byte", "beside dense"):
        table.add_column(column, justify="left" if column == "method" else "right")
    run = Run(model=args.model, dtype=args.dtype)
    dense: list[float] = []
    for method in methods:
        with Engine(method, run) as engine:
            outputs = engine.answer(examples)
        found = [scored(example, output)["score"] for example, output in zip(examples, outputs, strict=True)]
        dense = dense or found
        mean, error = difference(found, dense)
        table.add_row(method.name, f"{math.fsum(found) / len(found):.4f}", f"{mean:+.4f} ± {error:.4f}")
    make_console().print(table)
    return 0
