"""What an engine runs against what it was asked to run: no figure is worth anything before the two agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm_sparq.backends import BACKENDS
from vllm_sparq.benchmarks.common.methods import DENSE, Method

Report = Mapping[str, Mapping[str, Any]]
"""Layer -> ``backend`` and ``impl``, as `vllm_sparq.attention_backends.worker.AttentionReport` makes it."""


class WrongAttentionError(RuntimeError):
    """An engine runs another attention than it was started for."""


def attention_classes(report: Report) -> str:
    """Such as "4 × PagedImpl (SPARQ)"."""
    counts = Counter(f"{layer['impl']} ({layer['backend']})" for layer in report.values())
    return ", ".join(f"{n} × {name}" for name, n in sorted(counts.items())) or "no attention layer"


def check_attention(method: Method, report: Report) -> str:
    """The classes that run, if they are what the method stands for.

    Layers without full attention stay with vLLM, so one layer of ours is enough for a method of ours. Dense has none.

    Raises:
        WrongAttentionError: they are not; the message says what runs.
    """
    ours = {layer["backend"] for layer in report.values()} & set(BACKENDS)
    wanted = set() if method.backend is None else {method.backend}
    if ours != wanted:
        asked = "vLLM's own attention" if method.backend is None else f"the backend {method.backend}"
        raise WrongAttentionError(
            f"the engine of {method.name!r} was asked for {asked} and runs {attention_classes(report)}: "
            "nothing was measured"
        )
    return attention_classes(report)


def engine_report(vllm_config: Any) -> dict[str, dict[str, str]]:
    """The report of an engine in this process."""
    layers = vllm_config.compilation_config.static_forward_context.items()
    return {
        name: {"backend": layer.get_attn_backend().get_name(), "impl": type(layer.impl).__name__}
        for name, layer in layers
        if hasattr(layer, "impl")
    }


def with_dense(names: list[str]) -> list[Method]:
    """The methods of these names, dense first even if it was not named, each once.

    Raises:
        UsageError: a name that means nothing.
    """
    return [Method.named(name) for name in dict.fromkeys([DENSE, *names])]


def speed_note(ratio: float) -> str:
    """A speed beside dense, such as "1.31x" or "0.80x, slower than dense"."""
    return f"{ratio:.2f}x" + (", slower than dense" if ratio < 1 else "")
