"""What `vllm-sparq bench engine` measures: which engines, on which model, in which cases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_sparq.benchmarks.common.cache_layout import CacheLayout
from vllm_sparq.benchmarks.common.fingerprint import fingerprint
from vllm_sparq.benchmarks.common.methods import DENSE, Method
from vllm_sparq.benchmarks.common.model_shape import ModelShape
from vllm_sparq.benchmarks.common.records import case_key
from vllm_sparq.benchmarks.common.threads import engine_threads
from vllm_sparq.benchmarks.quality.prompts import read_text, tokens_of_text
from vllm_sparq.console import UsageError, check_model

LLAMA_1B: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    hidden_act="silu",
    tie_word_embeddings=True,
    dtype="bfloat16",
)
"""The shape of Llama-3.2-1B; the number of layers is an option."""

DEFAULT_OPTIONS = {"r": 16, "k": 128}
SKIPPED = "no attention"

N_TAIL = 1024
"""Room for answers after the context (tokens): more than all rounds of a case decode."""

N_ANSWER = N_TAIL - 64
"""Tokens that a request may write: it ends with the last of them."""

N_BATCHED = 4096
"""Prompt tokens that a step reads at most."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table. ``context`` in tokens, ``batch`` in requests."""

    context: int
    batch: int

    def asked(self, i: int) -> dict[str, Any] | None:
        """What the i-th request chooses of its engine; nothing."""
        return None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine.

    Attributes:
        method: what it runs.
        arguments: what vLLM is given for it.
        block_size: tokens per block; None for the engine's choice.
        skip_attention: whether its decode steps skip the attention op.
        acceptance: share of drafts that its verification is made to take; None for what the model says.
    """

    method: Method
    arguments: dict[str, Any]
    block_size: int | None = None
    skip_attention: bool = False
    acceptance: float | None = None

    @property
    def name(self) -> str:
        """For tables and records."""
        return SKIPPED if self.skip_attention else self.method.name


def engines(
    names: list[str],
    options: list[dict[str, Any]],
    block_size: int | None = None,
    acceptance: float | None = None,
) -> list[Engine]:
    """The engines that decode in turns: dense, no attention at all, the methods, and sparq with each set of options.

    A block size is that of our backends; vLLM's own attention keeps its own. Acceptance is that of those that draft.

    Raises:
        UsageError: a name or options that mean nothing.
    """
    dense = Method.named(DENSE)
    found = [Engine(method=dense, arguments={}), Engine(method=dense, arguments={}, skip_attention=True)]
    methods = [Method.named(name) for name in dict.fromkeys(names) if name != DENSE]
    for chosen in options:
        methods.append(
            replace(Method.named("sparq", chosen), name=f"sparq {json.dumps(chosen)}" if chosen else "sparq")
        )
    more = {} if block_size is None else {"block_size": block_size}
    return found + [
        Engine(
            method=method,
            arguments={**method.engine_args, **more},
            block_size=block_size,
            acceptance=acceptance if method.parsed.lossless else None,
        )
        for method in methods
    ]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What all engines run.

    Attributes:
        name: for tables and records.
        folder: with ``config.json``; None for the dummy Llama.
        n_layers: of the dummy Llama.
    """

    name: str
    folder: Path | None = None
    n_layers: int = 4

    @classmethod
    def of(cls, folder: Path | None, n_layers: int) -> Model:
        """The model of the user's, or the dummy one.

        Raises:
            UsageError: there is no model in the folder.
        """
        if folder is None:
            return cls(name=f"Llama-3.2-1B shape, {n_layers} layers, dummy weights", n_layers=n_layers)
        found = check_model(folder)
        return cls(name=found.name, folder=found)

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the dummy one."""
        return {**LLAMA_1B, "num_hidden_layers": self.n_layers}

    @cached_property
    def shape(self) -> ModelShape:
        """Its numbers.

        Raises:
            UsageError: its config.json describes no model.
        """
        return ModelShape.of_config(self.config) if self.folder is None else ModelShape.of(self.folder)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """For a key: its name, and what its folder holds, since many are called alike; dummy weights are drawn."""
        weights = {} if self.folder is None else {"weights": fingerprint(self.folder)}
        return {"model": self.name, **weights}

    def tokens_of(self, text: Path, n_tokens: int) -> tuple[int, ...]:
        """A text in the model's tokens.

        Raises:
            UsageError: the dummy model has none, there is no text, or it has fewer than ``n_tokens``.
        """
        if self.folder is None:
            raise UsageError("--text needs a model that can read: give --model")
        from transformers import AutoTokenizer

        found = tuple(tokens_of_text(AutoTokenizer.from_pretrained(self.folder), read_text(text)))
        if len(found) < n_tokens:
            raise UsageError(
                f"{text} has {len(found):,} tokens, and the largest case needs {n_tokens:,}: give more text"
            )
        return found

    def check_length(self, option: str, n_tokens: int, n_answer: int) -> None:
        """Raises UsageError if the model has no positions for a prompt, given by ``option``, and its answer."""
        limit = self.shape.max_model_len
        if n_tokens + n_answer > limit:
            raise UsageError(
                f"{option} {n_tokens} and {n_answer} tokens of answers need {n_tokens + n_answer} positions, and the "
                f"model has {limit}: use {option} {limit - n_answer} or less"
            )


def key_of(case: Case, engine: Engine, model: Model, max_context: int, text: Sequence[int] | None = None) -> str:
    """Of the record of one engine in one case; the engine has room for ``max_context`` tokens of context."""
    method, shape = engine.method, model.shape
    layout = CacheLayout.of(method, shape, max_model_len=max_context + N_TAIL, block_size=engine.block_size)
    fields = asdict(case) | model.fields | {"method": engine.name, "arguments": engine.arguments}
    if engine.acceptance is not None:
        fields["acceptance"] = engine.acceptance
    if text is not None:
        fields["text"] = hashlib.sha256(repr(list(text)).encode()).hexdigest()
    return case_key("engine", fields | layout.fields | engine_threads())
