"""docs/models.md: what runs on what, from the rows of `tests.architectures.matrix`, and what blocks come to."""

from __future__ import annotations

import tempfile
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

vLLM makes blocks as large as a state; ours hold several pages of 128 tokens, in which tokens are quantized, ranked and
evicted ([decision 9](decisions/0009-pages-within-blocks.md)). Counted for requests of {LENGTH:,} tokens in bfloat16,
without prefix caching. *Gain* is how many times dense's tokens fit into the same bytes, of the attention layers and of
the model; *kept* is the part of the former that is left of what whole pages alone would give. Configurations of the
models' sizes, no weights.

| model | format | tokens a block | pages | tokens a GiB | gain, attention | kept | gain, model |
|---|---|---|---|---|---|---|---|
"""
    for name, config in REAL.items():
        dense: Any = None
        for label, (backend, options) in FORMATS.items():
            found = counted(config, backend, options)
            ours = [group for group in found.groups if group.kind not in ("MambaSpec",)]
            (size,) = {group.block_size for group in ours}
            bytes_per_request = sum(group.bytes_per_request for group in ours)
            if label == "dense":
                dense = found, bytes_per_request
                lines += f"| {name} | dense | {size:,} | – | {found.n_tokens // GIB:,} | 1.00 | – | 1.00 |\n"
                continue
            page_tokens = page_of(config, backend, options)
            alone = unbroken(ours, page_tokens[0], page_tokens[1])
            gain, most = dense[1] / bytes_per_request, dense[1] / alone
            lines += (
                f"| {name} | {label} | {size:,} | {size // page_tokens[0]} | {found.n_tokens // GIB:,} | {gain:.2f} | "
                f"{gain / most:.0%} | {found.n_tokens / dense[0].n_tokens:.2f} |\n"
            )
    return lines


def counted(config: dict[str, Any], backend: str, options: dict[str, Any]) -> Any:
    """`capacity` of `GIB` for requests of `LENGTH` tokens."""
    from vllm_sparq.attention_backends.capacity import capacity

    return capacity(engine_config(config, backend, options), GIB << 30)


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


def page_of(config: dict[str, Any], backend: str, options: dict[str, Any]) -> tuple[int, int]:
    """Tokens of a page, and pages that a request of `LENGTH` tokens needs, staging included."""
    from vllm_sparq.attention_backends.engine import PagedEngine, heads_of

    vllm_config = engine_config(config, backend, options)
    engine = PagedEngine.of(vllm_config)
    assert engine is not None
    model = vllm_config.model_config
    layout = engine.layout(heads_of(model, vllm_config.parallel_config), model.dtype)
    return engine.block_size, -(-LENGTH // engine.block_size) + layout.n_staging_blocks


def unbroken(groups: list[Any], page_tokens: int, n_pages: int) -> float:
    """Bytes of a request in these layers if it held pages, not blocks."""
    return sum(group.n_layers * n_pages * group.page_bytes * page_tokens / group.block_size for group in groups)
