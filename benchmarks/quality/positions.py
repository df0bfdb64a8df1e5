"""What a model makes of text far beyond its training, by where its first tokens seem to be: bits per byte.

    vllm-sparq research positions --model smollm2-135m --trained 8192 --text FILE

The same tokens, the last of each window, are decoded one by one after contexts of 1, 2 and 4 times the tokens that the
model was trained for. What the model sees of them is sinks and a window, so only the positions of the sinks grow.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

from vllm_sparq.benchmarks.common.methods import Method
from vllm_sparq.benchmarks.quality.bits_per_byte import corpus_text, windows
from vllm_sparq.benchmarks.quality.engine import Engine, Run
from vllm_sparq.benchmarks.quality.evaluate import scored
from vllm_sparq.benchmarks.quality.prompts import read_text
from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.benchmarks.tiny_model import WEIGHTS
from vllm_sparq.console import DTYPES, check_model, comma_names, comma_numbers, make_console, place, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq research positions`."""
    parser.description = __doc__
    add = parser.add_argument
    add("--model", type=place, default=WEIGHTS, help="a model (default: the bundled one)")
    add("--trained", type=positive, default=2048, help="tokens it was trained for (default: 2048, the bundled one's)")
    add("--times", type=comma_numbers, default=[1, 2, 4], help="lengths in these (default: 1,2,4)")
    add("--positions", type=comma_names, default=["original", "renumbered", "capped"], help="values of the option")
    add("--budget", type=positive, default=512, help="tokens that stay (default: 512)")
    add("--scored", type=positive, default=256, help="tokens at the end of a window that are decoded (default: 256)")
    add("--n", type=positive, default=4, help="windows (default: 4)")
    add("--text", type=place, help="a text file (default: held-out text of the bundled model's corpus)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="element type of the model (default: bfloat16)")


def end_of(window: Example, tokenizer: Any, n_tokens: int, n_scored: int) -> Example:
    """The last tokens of a window of text, after a context that makes ``n_tokens`` with them."""
    ids = (*window.prompt_ids, *window.answer_ids)[-n_tokens:]
    context, end = ids[:-n_scored], ids[-n_scored:]
    said = dict(answer=tokenizer.decode(end), answer_ids=end, max_tokens=n_scored)
    return replace(window, prompt_ids=context, n_prompt_tokens=len(context), **said)


def main(args: argparse.Namespace) -> int:
    """Measure, print."""
    from rich.table import Table
    from transformers import AutoTokenizer

    args.model = check_model(args.model)
    longest = args.trained * max(args.times)
    text = corpus_text(longest * args.n) if args.text is None else read_text(args.text)
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    whole = windows(args.model, text, longest, args.n)
    console, rows = make_console(), Table(title=f"bits per byte of the same {args.n} x {args.scored} tokens")
    for column in ("positions", *(f"{times}x" for times in args.times)):
        rows.add_column(column, justify="left" if column == "positions" else "right")
    engine_args: dict[str, Any] = dict(
        max_model_len=longest, hf_overrides={"max_position_embeddings": longest}, max_num_batched_tokens=1024
    )
    run = Run(model=args.model, dtype=args.dtype, engine_args=engine_args)
    for positions in args.positions:
        options = {"budget": args.budget, "prefill": "bounded", "positions": positions}
        if positions != "original":
            options["trained"] = args.trained
        found = []
        with Engine(Method.named("streaming", options), run) as engine:
            for times in args.times:
                examples = [end_of(window, tokenizer, args.trained * times, args.scored) for window in whole]
                outputs = engine.answer(examples)
                scores = [scored(example, output)["score"] for example, output in zip(examples, outputs, strict=True)]
                found.append(math.fsum(scores) / len(scores))
        rows.add_row(positions, *(f"{bits:.3f}" for bits in found))
    console.print(rows)
    return 0
