"""Names of methods on every command line: ``dense``, a backend of ours, a block format, or several with a plus.

dense                       vLLM's own attention, its own cache
sparq, quest, kivi, ...     what ``--attention-backend`` selects, with its defaults
int8, kivi2                 a block format, read densely
sparq+int4                  the axes compose: read few tokens of int4 blocks
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_sparq.backends import PRESETS
from vllm_sparq.config import NAMESPACE, Options, parse_options
from vllm_sparq.console import UsageError
from vllm_sparq.formats import FORMATS
from vllm_sparq.reads import READS, DenseRead, Read
from vllm_sparq.retention import RETENTIONS

DENSE = "dense"


def meant_elsewhere(name: str) -> str:
    """What to write for a read or a retention, which is no method by its own name; empty for any other name."""
    for option, table in (("read", READS), ("retention", RETENTIONS)):
        if name in table:
            backends = [backend for backend, preset in PRESETS.items() if preset.options.get(option) == name]
            given = f"add --options '{json.dumps({option: name})}'"
            remedy = f"name {backends[0]}, which starts with it, or {given}" if backends else given
            return f". {name!r} is a value of the option {option}: {remedy} to another"
    return ""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What an engine is started with.

    Attributes:
        name: for tables and records.
        backend: value of ``--attention-backend``; None for vLLM's own choice.
        options: our part of ``--additional-config``.
    """

    name: str
    backend: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def named(cls, name: str, options: Mapping[str, Any] | None = None) -> Method:
        """The method of that name; ``options`` go on top of what the name stands for, and are ignored by ``dense``.

        Raises:
            UsageError: a name or options that mean nothing.
        """
        if name == DENSE:
            return cls(name=name)
        parts = name.split("+")
        unknown = [part for part in parts if part not in PRESETS and part not in FORMATS]
        if unknown:
            raise UsageError(
                f"unknown method {unknown[0]!r}: name {DENSE}, a backend ({', '.join(PRESETS)}), a block format "
                f"({', '.join(FORMATS)}), or several as in sparq+int4{meant_elsewhere(unknown[0])}"
            )
        if len(parts) == 1 and name in PRESETS:
            meant: dict[str, Any] = {}
            backend = name.upper()
        else:
            reads = [PRESETS[part].options.get("read", "sparq") for part in parts if part in PRESETS]
            meant = {"read": next((read for read in reads if read != "dense"), "dense")}
            for part in parts:
                meant |= {"format": part} if part in FORMATS else {**PRESETS[part].options, "read": meant["read"]}
            backend = "SPARQ"
        method = cls(name=name, backend=backend, options={**meant, **(options or {})})
        method.check()
        return method

    def given(self, n_tokens: int) -> int:
        """Tokens that the model is given of a prompt of so many."""
        return n_tokens

    @property
    def parsed(self) -> Options:
        """Its options, over what its backend stands for.

        Raises:
            ValueError: the method is vLLM's own attention, which has none; or they cannot be used.
        """
        if self.backend is None:
            raise ValueError(f"method {self.name!r} runs vLLM's own attention: it has no options of ours")
        return parse_options(self.additional_config, self.backend.lower())

    @property
    def read(self) -> type[Read]:
        """How it reads."""
        return DenseRead if self.backend is None else READS[self.parsed.read]

    @property
    def ranks_tokens(self) -> bool:
        """Whether it ranks tokens by channels, so that r and k both mean something to it."""
        return {"r", "k"} <= set(self.read.dials)

    @property
    def additional_config(self) -> dict[str, Any]:
        """Value of vLLM's ``additional_config``."""
        return {NAMESPACE: self.options}

    @property
    def engine_args(self) -> dict[str, Any]:
        """Keyword arguments for `vllm.LLM` or `EngineArgs`."""
        if self.backend is None:
            return {}
        return {"attention_backend": self.backend, "additional_config": self.additional_config}

    def check(self) -> None:
        """Refuse options now, in one line, and not when an engine starts."""
        try:
            self.parsed  # noqa: B018  parsing is the check
        except ValueError as error:
            raise UsageError(f"method {self.name!r}: {error}") from None
