"""What prefix caching costs conversations: bits per byte of every answer, and how much of each prompt was cached.

    vllm-sparq research conversation --methods sparq --compression 8,16

A conversation is a piece of text in turns: its first tokens are a prompt, the next ones an answer, and so on. An answer
is forced token by token and read as the method reads; the next turn's prompt is all that came before. With
``sharing: all`` that prompt finds blocks that were written while answers were decoded; without, only what prompts
have written. A third row answers every turn without prefix caching.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

from rich.table import Table

from vllm_sparq.benchmarks.common.methods import DENSE, Method
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.benchmarks.quality.bits_per_byte import corpus_text, difference, windows
from vllm_sparq.benchmarks.quality.engine import Engine, Run
from vllm_sparq.benchmarks.quality.evaluate import methods_at, scored
from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import (
    DTYPES,
    UsageError,
    check_model,
    comma_names,
    make_console,
    place,
    positive,
    whole_number,
)
from vllm_sparq.layout import BLOCK_SIZE_MULTIPLE


def turns_of(window: Example, tokenizer: object, n_turns: int) -> list[Example]:
    """A window as a conversation: in each turn the second half of the new tokens is the answer."""
    ids = [*window.prompt_ids, *window.answer_ids]
    size = len(ids) // n_turns
    found = []
    for turn in range(n_turns):
        begin, end = turn * size + size // 2, (turn + 1) * size
        answer = tokenizer.decode(ids[begin:end])  # type: ignore[attr-defined]
        found.append(
            replace(
                window,
                answer=answer,
                n_prompt_tokens=begin,
                max_tokens=end - begin,
                prompt_ids=tuple(ids[:begin]),
                answer_ids=tuple(ids[begin:end]),
            )
        )
    return found


def measure(method: Method, run: Run, conversations: list[list[Example]]) -> tuple[list[float], float]:
    """Bits per byte of each conversation's answers after its first turn; the share of their prompts in the cache."""
    n_turns, scores = len(conversations[0]), [0.0] * len(conversations)
    with Engine(method, run) as engine:
        for turn in range(n_turns):
            if turn == 1:
                before = engine.cached()
            examples = [conversation[turn] for conversation in conversations]
            outputs = engine.answer(examples)
            if turn:
                for i, (example, output) in enumerate(zip(examples, outputs, strict=True)):
                    scores[i] += scored(example, output)["score"] / (n_turns - 1)
        asked, found = (now - then for now, then in zip(engine.cached(), before, strict=True))
    return scores, found / asked if asked else 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq research conversation`."""
    parser.description = __doc__
    add = parser.add_argument
    add("--model", type=place, default=WEIGHTS, help="a model folder (default: the bundled model)")
    add("--methods", type=comma_names, default=["sparq"], help="beside dense (default: sparq)")
    add("--compression", type=comma_names, default=["8"], help="of methods that take one (default: 8)")
    add("--length", type=positive, default=2048, help="tokens of a conversation (default: 2048)")
    add("--turns", type=whole_number(2), default=4, help="turns of a conversation, 2 or more (default: 4)")
    add("--n", type=positive, default=24, help="conversations (default: 24)")
    add("--block-size", type=positive, default=32, help="tokens per block (default: 32)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="element type of the model (default: bfloat16)")


def check(args: argparse.Namespace) -> None:
    """Refuse conversations that cannot be had, before a model is loaded.

    Raises:
        UsageError: the first of what does not fit.
    """
    limit = ModelShape.of(args.model, args.dtype).max_model_len
    if not 2 * args.turns <= args.length <= limit:
        raise UsageError(
            f"--length {args.length}: {args.turns} turns need a prompt and an answer each, and the model has {limit} "
            f"positions: use {2 * args.turns} to {limit}"
        )
    if args.block_size % BLOCK_SIZE_MULTIPLE:
        raise UsageError(
            f"--block-size {args.block_size} cannot be cut into pages: give a multiple of {BLOCK_SIZE_MULTIPLE}"
        )


def main(args: argparse.Namespace) -> int:
    """Measure, print."""
    from transformers import AutoTokenizer

    args.model = check_model(args.model)
    check(args)
    methods = methods_at(args.methods, args.compression, {})[1:]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pieces = windows(args.model, corpus_text(args.length * args.n), args.length, args.n)
    conversations = [turns_of(piece, tokenizer, args.turns) for piece in pieces]
    table = Table(title=f"answers of {args.n} conversations: {args.turns} turns, {args.length} tokens")
    for column in ("method", "cache", "bits per byte", "beside dense", "of the prompts cached"):
        table.add_column(column, justify="left" if column in ("method", "cache") else "right")
    engine_args = dict(block_size=args.block_size, disable_log_stats=False)
    cold = Run(model=args.model, dtype=args.dtype, engine_args=engine_args, stepwise=True)
    warm = replace(cold, engine_args={**engine_args, "enable_prefix_caching": True})
    dense, cached = measure(Method.named(DENSE), warm, conversations)
    table.add_row(DENSE, "on", f"{math.fsum(dense) / len(dense):.4f}", "", f"{cached:.0%}")
    for method in methods:
        shared = replace(method, options={**method.options, "sharing": "all"})
        for name, run, one in (("off", cold, method), ("on", warm, method), ("on, sharing all", warm, shared)):
            found, cached = measure(one, run, conversations)
            mean, error = difference(found, dense)
            table.add_row(
                method.name, name, f"{math.fsum(found) / len(found):.4f}", f"{mean:+.4f} ± {error:.4f}", f"{cached:.0%}"
            )
    make_console().print(table)
    return 0
