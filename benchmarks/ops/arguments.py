"""Words on the command line of `vllm-sparq bench ops`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from vllm_sparq.config import NAMESPACE, Options, parse_options
from vllm_sparq.console import UsageError


def numbers_from(least: int) -> Callable[[str], list[int]]:
    """A parser of numbers with commas between them, each at least so large."""

    def parse(text: str) -> list[int]:
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1024,4096") from None
        if min(numbers) < least:
            raise argparse.ArgumentTypeError(f"{text!r} holds a number below {least}")
        return numbers

    return parse


def layer_shape(text: str) -> tuple[int, int, int]:
    """H, G and D of a layer."""
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not H/G/D, for example 32/8/128")
    heads, kv_heads, head_dim = (int(part) for part in parts)
    if heads % kv_heads:
        raise argparse.ArgumentTypeError(f"{text!r}: {kv_heads} KV heads do not divide {heads} query heads")
    if head_dim % 16:
        raise argparse.ArgumentTypeError(f"{text!r}: head size {head_dim} is not a multiple of 16")
    return heads, kv_heads, head_dim


def sparq_options(args: argparse.Namespace) -> Options:
    """What SparQ reads.

    Raises:
        UsageError: a number that it has no use for.
    """
    names = ("compression", "r", "k", "ranking")
    given = {name: getattr(args, name) for name in names}
    try:
        return parse_options({NAMESPACE: {**given, "dense_below": 0}})
    except ValueError as error:
        raise UsageError(f"bench ops: {error}") from None
