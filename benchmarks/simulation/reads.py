"""What a policy of reading costs in answers: policies by their definitions, simulated in plain torch.

    vllm-sparq research reads --policies sparq,quest,infllm --compression 4,8
    vllm-sparq research reads --policies sparq --options '{"group_reduce": "probs", "k": 200}'

Every prompt is attended to densely, in float32; each decoded token then reads what the policy says (`read_policies`).
The prompts are those of `vllm-sparq eval`, and so are the scores: points of 100, differences from dense prompt by
prompt, 95% bootstrap intervals. Use it to find out what a method is worth before there are kernels for it. SparQ ranks
with K itself unless told otherwise; it then answers as `vllm-sparq eval --dtype float32` does with ranking "model".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.quality.cells import cells
from vllm_sparq.benchmarks.simulation.model import Contexts, decode, load, read_prompts
from vllm_sparq.benchmarks.simulation.policies import POLICIES, Dense, InfLLM, Policy, Shape, Wanted
from vllm_sparq.benchmarks.simulation.prompts import add_prompt_arguments, cells_of, checked, keep, line, table
from vllm_sparq.benchmarks.tasks.generated import Example
from vllm_sparq.config import NAMESPACE, parse_options
from vllm_sparq.console import UsageError, comma_names, json_object, make_console

EPILOG = """\
policies:
  sparq                      the k best tokens; nothing for the others
  sparq-mean                 the others' probability goes to the mean of V, as in the paper
  sparq-mean-0.5 .. -0.9     at most the rest of it: the tokens read keep at least that weight
  sparq-blocks-128, -16      it goes to the means of V of blocks of so many tokens
  sparq-unread-16            the same, over the unread tokens of each block
  quest                      spans of 16 by the bounds of their keys
  infllm                     first tokens, a window, and blocks of 32 by representative keys
  streaming, streaming-cache, lm_infinite
                             first 4 tokens and a window: at their own positions, at positions in the cache, or with
                             the distance of the first ones capped
"""

BATCH = 50
"""Prompts that are answered together: what memory allows at the longest contexts."""


def policies_at(
    names: Sequence[str], compressions: Sequence[str], options: dict[str, Any], shape: Shape
) -> dict[str, Policy]:
    """Dense, and every policy at every compression.

    Raises:
        UsageError: a name, a compression or options that mean nothing.
    """
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise UsageError(f"unknown policy {unknown[0]!r}: choose from {', '.join(POLICIES)}")
    found: dict[str, Policy] = {DENSE: Dense()}
    for text in compressions:
        try:
            compression = float(text)
            parsed = parse_options({NAMESPACE: {"ranking": "model", **options, "compression": compression}})
        except ValueError as error:
            raise UsageError(f"--compression {text} with --options {json.dumps(options)}: {error}") from None
        wanted = Wanted(shape, compression, parsed)
        found |= {f"{name} 1/{text}": POLICIES[name](wanted) for name in names}
    return found


def batches(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """At most `BATCH` examples at a time."""
    yield from (examples[start : start + BATCH] for start in range(0, len(examples), BATCH))


def answered(
    model: Any, tokenizer: Any, examples: Sequence[Example], policies: dict[str, Policy], console: Any
) -> list[dict[str, Any]]:
    """A line for every policy and example of one task and length."""
    with_heat = any(isinstance(policy, InfLLM) for policy in policies.values())
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    found: list[dict[str, Any]] = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(examples) * (1 + len(policies)))
        for batch in batches(examples):
            where = f"{batch[0].task} at {batch[0].length:,}"
            progress.update(bar, description=f"{where}: reading")
            contexts: Contexts = read_prompts(model, tokenizer, batch, with_heat=with_heat)
            progress.advance(bar, len(batch))
            for name, policy in policies.items():
                progress.update(bar, description=f"{where}: {name}")
                answers = decode(model, tokenizer, contexts, policy)
                found += [line(one, name, a.text, len(a.tokens)) for one, a in zip(batch, answers, strict=True)]
                progress.advance(bar, len(batch))
    return found


def records_of(lines: Sequence[dict[str, Any]], policies: dict[str, Policy]) -> list[dict[str, Any]]:
    """Cells as `vllm-sparq eval` has them, with what each policy reads and what was answered."""
    found = cells(lines)
    for record in found:
        context = max(1, round(record["prompt_tokens"] + record["output_tokens"] / 2))
        policy = policies[record["method"]]
        record |= {"policy": repr(policy), "share_read": policy.share(context)}
        record["answers"] = [
            {name: line[name] for name in ("prompt_sha", "seed", "output", "score")}
            for line in lines
            if (line["task"], line["length"], line["method"]) == (record["task"], record["length"], record["method"])
        ]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq research reads`."""
    parser.description, parser.epilog = __doc__, EPILOG
    add_prompt_arguments(parser)
    add = parser.add_argument
    add("--policies", type=comma_names, default=list(POLICIES), help="beside dense (default: all of them)")
    add("--compression", type=comma_names, default=["8"], help="elements of dense per one read (default: 8)")
    add("--options", type=json_object, default={}, metavar="JSON", help='SparQ\'s; "ranking" is "model" unless given')


def main(args: argparse.Namespace) -> int:
    """Answer, score, write, print."""
    console = make_console()
    checked(args)
    policies_at(args.policies, args.compression, args.options, Shape(1, 16))  # names and numbers mean something
    model, tokenizer = load(args.model)
    config = model.config
    if config.rope_parameters["rope_type"] != "default":
        raise UsageError(
            f"--model {args.model} has rotary embeddings of type {config.rope_parameters['rope_type']!r}, and these "
            "policies rotate as plain Llama does: give a model with type 'default'"
        )
    shape = Shape(config.num_attention_heads // config.num_key_value_heads, config.head_dim)
    policies = policies_at(args.policies, args.compression, args.options, shape)
    records: list[dict[str, Any]] = []
    for examples in cells_of(args, config.max_position_embeddings):
        records += records_of(answered(model, tokenizer, examples, policies, console), policies)
    keep(args, "read_simulation", records, options=args.options, threads=torch.get_num_threads())
    console.print(table(records))
    return 0
