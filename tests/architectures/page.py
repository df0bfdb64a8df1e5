"""docs/models.md: what runs on what, from the rows of `tests.architectures.matrix`, and what blocks come to."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.architectures.configurations import MODELS, Model
from tests.architectures.real import REAL

if TYPE_CHECKING:
    from tests.architectures.matrix import Row

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("CPU_ATTN", {}),
    "sparq": ("sparq", {}),
    "int8": ("flexgen", {"format": "int8"}),
    "int4": ("flexgen", {}),
    "kivi4": ("kivi", {}),
    "kivi2": ("kivi", {"format": "kivi2"}),
}
GIB = 16
LENGTH = 65536
"""Memory that is counted, and tokens of its requests."""

HEAD = """# Models

Written by `make models`, which runs tiny models of these architectures, with random weights that depend on a
parameter's name alone, through stock vLLM's own attention and through ours: {n} prompts of {shortest} to {longest}
tokens, {n_answer} greedy tokens each, in chunks of 512. *All read* is SparQ with nothing left out: its answers must be
stock's, token for token; in bfloat16, as many of them as of stock's own in other chunks. The other columns say how many
of the first tokens, which follow from the whole prompt, are stock's. Nothing here is about quality: weights are random.

## What runs on ours

| model | vLLM's class | type | layers | {methods} |
|---|---|---|---|{dashes}|
"""


STATES = "## Beside layers with a state"


def write(rows: list[Row], *, counted: bool) -> None:
    """The page; what blocks come to is ``counted`` anew, or stays."""
    of_blocks = beside_states() if counted else STATES + PAGE.read_text(encoding="utf-8").split(STATES)[1]
    PAGE.write_text(text(rows) + of_blocks, encoding="utf-8")


def rows() -> dict[str, Row]:
    """What the page says of each model."""
    from tests.architectures.matrix import METHODS, Row

    found: dict[str, Row] = {}
    served, refused = PAGE.read_text(encoding="utf-8").split("## What is refused")
    for line in served.splitlines():
        cells = line.strip("| ").split(" | ")
        if cells[0] in MODELS:
            backends = {name: int(n) for n, name in (part.split(" ") for part in cells[3].split(" + "))}
            found[cells[0]] = Row(cells[0], backends, dict(zip(METHODS, cells[4:], strict=True)))
    for line in refused.splitlines():
        cells = line.strip("| ").split(" | ")
        if cells[0] in MODELS:
            found[cells[0]] = Row(cells[0], refusal=cells[2])
    return found


def text(rows: list[Row]) -> str:
    from tests.architectures.matrix import LENGTHS, METHODS, N_ANSWER

    served, refused = [row for row in rows if not row.refusal], [row for row in rows if row.refusal]
    lines = HEAD.format(
        n=len(LENGTHS),
        shortest=min(LENGTHS),
        longest=max(LENGTHS),
        n_answer=N_ANSWER,
        methods=" | ".join(METHODS),
        dashes="|".join("---" for _ in METHODS),
    )
    for row in served:
        layers = " + ".join(f"{n} {name}" for name, n in sorted(row.backends.items(), reverse=True))
        one = MODELS[row.name]
        cells = [row.name, f"`{one.architecture}`", one.dtype, layers, *(row.cells[name] for name in METHODS)]
        lines += f"| {' | '.join(cells)} |\n"
    lines += "\n## What is refused\n\n| model | vLLM's class | what it says |\n|---|---|---|\n"
    for row in refused:
        lines += f"| {row.name} | `{MODELS[row.name].architecture}` | {row.refusal} |\n"
    return lines + "\n"


def beside_states() -> str:
    """What blocks come to for models of real size."""
    lines = f"""{STATES}

vLLM makes blocks as large as a state; ours hold several pages of 128 tokens (`sparq`: 256), in which tokens are
quantized, ranked and evicted ([decision 9](decisions/0009-pages-within-blocks.md)). *Quantized* is the number of
tokens after which they are, however many a block holds. Counted by vLLM's own functions
(`python -m tests.architectures.matrix --counted`), for requests of {LENGTH:,} tokens in bfloat16, without prefix
caching. *Gain* is how many times dense's tokens fit into the same bytes, of the attention layers and the model;
*kept* is the gain of the attention layers over that of the same layers in a model that has no others. Configurations
of the models' sizes, no weights.

| model | format | tokens a block | pages | quantized | tokens a GiB | gain, attention | kept | gain, model |
|---|---|---|---|---|---|---|---|---|
"""
    for name in REAL:
        for label in FORMATS:
            lines += of_format(name, label) + "\n"
    return lines


def of_format(name: str, label: str) -> str:
    """A model of `REAL` in one of `FORMATS`: the line of the page."""
    (found, gain, kept), dense = gain_of(name, label), of_model(name, "dense")
    size = found.block_size
    if label == "dense":
        return f"| {name} | dense | {size:,} | – | – | {found.n_tokens // GIB:,} | 1.00 | – | 1.00 |"
    quantized = f"{found.page_tokens}" if FORMATS[label][0] in ("flexgen", "kivi") else "–"
    return (
        f"| {name} | {label} | {size:,} | {size // found.page_tokens} | {quantized} | {found.n_tokens // GIB:,} | "
        f"{gain:.2f} | {kept:.0%} | {found.n_tokens / dense.n_tokens:.2f} |"
    )


@dataclass(frozen=True)
class Held:
    """What `GIB` hold of requests of `LENGTH` tokens.

    Attributes:
        block_size: tokens of a block of the attention layers.
        page_tokens: tokens of a page of ours, of which a block holds several.
        n_tokens: of all requests that fit.
        attention_bytes: of one request, in the attention layers.
    """

    block_size: int
    page_tokens: int
    n_tokens: int
    attention_bytes: int


def gain_of(name: str, label: str) -> tuple[Held, float, float]:
    """What is held, the gain of its attention layers over dense, and what that is of the gain of such layers alone."""
    found, alone = of_model(name, label), held(without_states(REAL[name]), label)
    gain = of_model(name, "dense").attention_bytes / found.attention_bytes
    return found, gain, gain * alone.attention_bytes / held(without_states(REAL[name]), "dense").attention_bytes


def of_model(name: str, label: str) -> Held:
    return held(json.dumps(REAL[name]), label)


def without_states(config: dict[str, Any]) -> str:
    """A model of the attention layers alone."""
    kinds = config.get("layer_types") or config["hybrid_override_pattern"]
    n_layers = sum(kind in ("attention", "full_attention", "*") for kind in kinds)
    heads = {name: config[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")}
    size = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    same = {name: config[name] for name in ("max_position_embeddings", "vocab_size", "intermediate_size")}
    llama = dict(architectures=["LlamaForCausalLM"], model_type="llama", num_hidden_layers=n_layers, head_dim=size)
    return json.dumps({**llama, **heads, **same})


@functools.lru_cache(maxsize=64)
def held(config_json: str, label: str) -> Held:
    """By vLLM's own count of the model's own layers."""
    from vllm_sparq.attention_backends.capacity import capacity

    found = capacity(engine_config(json.loads(config_json), *FORMATS[label]), GIB << 30)
    attention = [group for group in found.groups if group.kind != "MambaSpec"]
    ((size, page_tokens),) = {(group.block_size, group.page_tokens) for group in attention}
    return Held(size, page_tokens, found.n_tokens, sum(group.bytes_per_request for group in attention))


def engine_config(config: dict[str, Any], backend: str, options: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    with tempfile.TemporaryDirectory() as folder:
        Model(config["architectures"][0], config).write(Path(folder))
        return EngineArgs(
            model=folder,
            attention_backend=backend,
            additional_config={"sparq": options},
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=LENGTH,
            load_format="dummy",
            enable_prefix_caching=False,
        ).create_engine_config()
