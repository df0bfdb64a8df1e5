"""docs/options.md, made of `vllm_sparq.config.Options`: `vllm-sparq report --documents`.

A checkout's file is written anew; a test compares it with what the code says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_sparq.attention_backends.choices import TURNED
from vllm_sparq.backends import PRESETS
from vllm_sparq.benchmarks.common.lines import replace_text
from vllm_sparq.config import MOST_TOKENS, Options
from vllm_sparq.formats import QUANTIZED
from vllm_sparq.reads import READS
from vllm_sparq.retention import EVICTING

PAGE = Path(__file__).parents[2] / "docs" / "options.md"

TITLE = """\
# Options

Keys of `additional_config["sparq"]`, whatever the backend: `--additional-config '{"sparq": {"compression": 4}}'` on the
command line, `additional_config={"sparq": {"compression": 4}}` in Python. Unknown keys, values out of range and
options that mean nothing together are refused before the model loads, with the value, the rule and the remedy.

What options come to for one model: `vllm-sparq doctor --model MODEL --options '{"compression": 4}'`. How much memory to
give its cache: [the size of the cache](how-it-works.md#the-size-of-the-cache).

This page is generated from `vllm_sparq/config.py` by `vllm-sparq report --documents`.
"""

CHOICES = """
## A choice for each request

A preview, on CPU, for engines that read sparsely. `SamplingParams.extra_args` in Python, `vllm_xargs` over HTTP:

| in a request | it is read |
|---|---|
| `{"sparq": "off"}` | densely |
| `{"sparq.compression": 4}` | as under an engine with that option and the others of this engine; so NAMES |
| `{"sparq": {"r": 16, "k": 256}}` | the same from Python alone: `vllm_xargs` takes no objects |

    curl http://localhost:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "MODEL", "prompt": "Once", "vllm_xargs": {"sparq.compression": 4}}'

A choice is about what decode steps read, never about what pages hold or which tokens stay. A request that sets
`compression` does without the engine's `r` and `k`. What cannot be is refused when the request arrives, with the value,
the rule and the remedy: HTTP 400 (where vLLM streams, its 200 may be sent by then, and the reason is in the stream), in
Python vLLM's `VLLMValidationError`. On CUDA every choice is refused. Of other keys than `sparq` and
`sparq.*` nothing is known, so nothing is said; vLLM's beam search hands no choice on. `/metrics` counts who chooses:
`vllm:sparq_dense_requests_total` and `vllm:sparq_tuned_requests_total`; they stay 0 for an engine on another host than
its front end.
""".replace("NAMES", ", ".join(f"`sparq.{name}`" for name in TURNED[1:]))
"""The end of the page."""

SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "What a step reads": (
        "Prompts are always attended to densely; these options act on decoded tokens.",
        (
            "read",
            "compression",
            "r",
            "k",
            "local",
            "min_k",
            "mass",
            "ranking",
            "mean_value",
            "group_reduce",
            "dense_layers",
            "dense_below",
        ),
    ),
    "How a block is stored": (
        "A block is quantized once, when it fills; until then its tokens are in the model's own type.",
        ("format", "group_size", "chunk"),
    ),
    "Which tokens stay": (
        "A request keeps the same number of tokens in every KV head, and each KV head keeps its own.",
        ("retention", "budget", "recent", "sinks", "prefill", "positions", "trained", "pressure"),
    ),
    "Which blocks are shared": (
        "Prefix caching is vLLM's own; blocks that a prompt has written are shared with every option that keeps them.",
        ("sharing",),
    ),
    "Answers of dense attention": (
        "The sparse read drafts, dense attention verifies: speculative decoding without a second model.",
        ("lossless", "drafts"),
    ),
}
"""Heading -> what holds for all of it, and its options in the order of the page."""


def those(option: str, names: Iterable[str]) -> str:
    """Values of an option that is a table's."""
    return f"`{option}` {', '.join(f'`{name}`' for name in names)}"


EVICTS = those("retention", EVICTING)
APPLIES = {
    "read": "all",
    "format": "all",
    "group_size": those("format", (name for name, how in QUANTIZED.items() if how.has_groups)),
    "chunk": those("format", QUANTIZED),
    "retention": "all",
    "budget": EVICTS,
    "recent": those("retention", (name for name, policy in EVICTING.items() if policy.recent is None)),
    "sinks": EVICTS,
    "prefill": EVICTS,
    "positions": "`retention` `window`",
    "trained": "`positions` `renumbered`, `capped`",
    "pressure": EVICTS,
    "sharing": "`read` `sparq`, `spans`",
    "lossless": "`read` `sparq`, `spans`",
    "drafts": "`lossless`",
}
"""Option -> where it means something. Those of reads are said by the reads themselves (`Read.dials`)."""


def applies(name: str) -> str:
    """Where an option means something."""
    reads = [read for read, kind in READS.items() if name in kind.dials]
    return those("read", reads) if reads else APPLIES[name]


def page() -> str:
    """The whole file."""
    lines = [TITLE, "## Presets", "", *presets()]
    for heading, (note, names) in SECTIONS.items():
        lines += ["", f"## {heading}", "", note]
        for name in names:
            lines += ["", *option(name)]
    return "\n".join(lines) + "\n" + CHOICES


def presets() -> Iterator[str]:
    """What each `--attention-backend` changes."""
    yield "`--attention-backend` names a set of defaults; any option given beside it wins."
    yield ""
    yield "| `--attention-backend` | | the same as `sparq` with |"
    yield "|---|---|---|"
    for name, preset in PRESETS.items():
        changed = f"`{json.dumps(preset.options)}`" if preset.options else "these defaults"
        yield f"| `{name}` | {preset.summary} | {changed} |"


def option(name: str) -> Iterator[str]:
    """Heading, values, default and meaning of one option."""
    field = Options.model_fields[name]
    schema = Options.model_json_schema()["properties"][name]
    defaults = [shown(field.default)]
    defaults += [f"{key}: {shown(preset.options[name])}" for key, preset in PRESETS.items() if name in preset.options]
    yield f"### `{name}`"
    yield ""
    yield f"* Values: {values(schema)}"
    yield f"* Default: {'; '.join(defaults)}"
    yield f"* For: {applies(name)}"
    yield ""
    assert field.description is not None
    yield field.description


def shown(value: Any) -> str:
    """A default, in words where it is none."""
    return "none" if value is None else f"`{json.dumps(value)}`"


def values(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "anyOf" in schema:
        return ", or ".join(values(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    kind = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}[schema["type"]]
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    given = {key: bound for key, bound in schema.items() if bound != MOST_TOKENS}  # which is as good as none
    limits = [f"{sign} {given[key]:g}" for key, sign in bounds.items() if key in given]
    return f"{kind} {' and '.join(limits)}".rstrip()


def write_page() -> Path:
    """Write the page anew; where it is."""
    replace_text(PAGE, page())
    return PAGE
