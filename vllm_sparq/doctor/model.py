"""What a backend and its options mean for one model: what is read, what the cache costs, what is refused."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_sparq.backends import PRESETS
from vllm_sparq.config import NAMESPACE, Options, check_budget
from vllm_sparq.doctor.findings import Section
from vllm_sparq.formats import FORMATS
from vllm_sparq.layout import PageLayout
from vllm_sparq.reads import HeadShape, Read
from vllm_sparq.retention import RETENTIONS

if TYPE_CHECKING:
    from vllm_sparq.attention_backends.capacity import Capacity

FULL_KINDS = ("full_attention", "attention", "hybrid")
"""What models call a layer with full attention in ``layer_types``."""

CONTEXTS = (1024, 4096, 16384, 65536, 131072)


OWN = {
    "attention_backend": "doctor's own --attention-backend",
    "additional_config": "what it says of sparq as --options",
}
"""Arguments of `vllm serve` that decide what is described, and how doctor is told."""


def model_section(model: str, options: Options, backend: str = "sparq", serve_args: Sequence[str] = ()) -> Section:
    """The report, from the model's configuration alone.

    Args:
        model: its folder, or its name at the hub.
        options: what the backend and the user's options come to.
        backend: the name that they were given to.
        serve_args: more arguments of `vllm serve`.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sparq.attention_backends.refusals import chosen_by_query_heads, model_refusals

    section = Section(f"model {model} with --attention-backend {backend}")
    section.note(f"{backend} {PRESETS[backend].summary}, unless options say otherwise")
    try:
        arguments = _engine_arguments(model, serve_args)
    except ValueError as error:
        section.bad(f"vLLM does not take {shlex.join(serve_args)}: {error}")
        return section
    for name, own in OWN.items():
        if name in arguments:
            section.bad(f"--{name.replace('_', '-')} among --serve-args is not described: give {own} instead")
            return section
    try:
        config = EngineArgs(**arguments).create_model_config()
    except Exception as error:  # vLLM raises many kinds, all of them about this model
        section.bad(f"vLLM cannot read it: {_first_line(error)}")
        return section
    refusals = model_refusals(config, arguments.get("kv_cache_dtype", "auto"))
    for reason in refusals:
        section.bad(f"refused: {reason}")
    if refusals:
        return section
    shape = _shape(config)
    section.numbers["shape"] = shape
    section.good(
        f"{config.architecture}, {str(config.dtype).removeprefix('torch.')}: {shape['n_layers']} layers, "
        f"{shape['n_heads']} query heads on {shape['n_kv_heads']} KV heads of {shape['head_size']} elements, "
        f"{config.max_model_len:,} positions"
    )
    choosing = chosen_by_query_heads(options)
    if choosing and shape["n_heads"] > shape["n_kv_heads"]:
        section.note(
            f"at most --tensor-parallel-size {shape['n_kv_heads']}: {' and '.join(choosing)} chooses tokens by all "
            "query heads of a KV head, so one worker must have them"
        )
    try:
        held = _capacities(section, arguments, options, backend)
        if section.is_well:
            _describe_engine(section, options, config, held, arguments.get("block_size"))
    except ValueError as error:  # r beyond the head size, a page that cannot be cut
        section.bad(f"refused: {error}")
    return section


def _describe_engine(
    section: Section, options: Options, config: Any, held: dict[str, Capacity], given_size: int | None
) -> None:
    """What an engine of this model would do; ``given_size`` is the `--block-size` of the user, if there is one."""
    from vllm_sparq.attention_backends.engine import preferred_block_size

    shape = section.numbers["shape"]
    _describe_layers(section, shape, held)
    ours = [group for group in held["sparq"].groups if group.ours] if held else []
    chosen = given_size or preferred_block_size(options, config.max_model_len)
    block_size = ours[0].page_tokens if ours else chosen
    kept = _describe_retention(section, options, config.max_model_len, block_size)
    _describe_read(section, options, shape, kept)
    staging = ours[0].staging_pages if ours else None
    _describe_memory(section, options, shape, config.dtype, block_size, staging)
    if ours and ours[0].block_size > block_size:
        section.note(
            f"beside layers with a state vLLM's own blocks hold {ours[0].block_size:,} tokens, "
            f"{ours[0].block_size // block_size} of these side by side: a request holds whole ones"
        )
    _describe_capacity(section, held)
    _describe_keys(section, options, held)


def _first_line(error: Exception) -> str:
    """Of a pydantic message the line that says something, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("Value error", "Assertion failed"))]
    first = (telling or lines or [type(error).__name__])[0].split(" [type=")[0]
    if first.endswith(":") and len(lines) > 1:  # what is wrong stands below where
        return f"{first} {lines[lines.index(first) + 1]}"
    return first if " " in first else f"{type(error).__name__}: {first}"


def _shape(config: Any) -> dict[str, int]:
    text = config.hf_text_config
    n_layers = int(text.num_hidden_layers)
    kinds: Sequence[str] = getattr(text, "layer_types", None) or ["full_attention"] * n_layers
    return {
        "n_layers": n_layers,
        "n_full": sum(kind in FULL_KINDS for kind in kinds),
        "n_heads": int(text.num_attention_heads),
        "n_kv_heads": int(config.get_total_num_kv_heads()),
        "head_size": int(config.get_head_size()),
    }


def _describe_retention(section: Section, options: Options, max_model_len: int, size: int) -> int:
    """What stays of a request in blocks of ``size`` tokens; returns the longest context that a decode step meets."""
    retention = options.retained(size)
    if retention is None:
        return max_model_len
    check_budget(options, size)
    budget = retention.budget_of(max_model_len)
    peak = retention.most_slots(max_model_len, max_model_len, answering=False)
    blocks = {"dense": -(-max_model_len // size), "answer": -(-budget // size), "prompt": -(-peak // size)}
    section.numbers["retention"] = {"budget": budget, "interval": retention.interval, "blocks": blocks}
    policy = RETENTIONS[options.retention]
    assert policy is not None
    first = f"the first {retention.sinks} and " if retention.sinks else ""
    others = policy.summary.format(recent=f"{retention.recent_of(budget):,}")
    kept = min(budget, max_model_len)
    section.good(
        f"retention {options.retention}: of {max_model_len:,} tokens a request keeps {kept:,} per KV "
        f"head: {first}{others}; {retention.interval} go at a time"
    )
    section.good(
        f"its answer holds {blocks['answer']} blocks of {size} tokens, its prompt up to {blocks['prompt']} while it is "
        f"read (prefill = {options.prefill}); dense: {blocks['dense']}"
    )
    return kept


def _describe_read(section: Section, options: Options, shape: dict[str, int], max_model_len: int) -> None:
    from vllm_sparq.attention_backends.engine import on_platform

    heads, options = _heads(shape), on_platform(options)  # as the engine does before it reads
    read = options.read_of(heads)
    section.numbers["contexts"] = []
    lines = read.describe(options, heads)
    if not read.dials:
        section.note(f"read = {options.read}: {'; '.join(lines)}")
        return
    for line in lines:
        section.good(line)
    if options.lossless:
        section.note(
            f"lossless: so it drafts up to {options.drafts} tokens while that pays, and dense attention verifies them"
        )
    if options.dense_layers:
        section.note(f"the first {min(options.dense_layers, shape['n_full'])} layers always read densely")
    first_sparse = next((n for n in range(max_model_len + 1) if not read.is_dense(n)), None)
    if first_sparse is None:
        section.note(f"no context of up to {max_model_len:,} tokens is long enough to be read sparsely")
    else:
        section.good(f"contexts below {first_sparse:,} tokens are read densely")
    for context in sorted({*(c for c in CONTEXTS if c < max_model_len), max_model_len}):
        _describe_context(section, read, context)


def _heads(shape: dict[str, int]) -> HeadShape:
    return HeadShape(**{name: shape[name] for name in ("head_size", "n_heads", "n_kv_heads")})


def _describe_context(section: Section, read: Read, context: int) -> None:
    numbers = {"context": context, **read.numbers(context)}
    section.numbers["contexts"].append(numbers)
    if read.is_dense(context):
        section.note(f"at {context:>7,} tokens a step reads all of them")
        return
    most, least = read.n_selected(context), read.n_least(context)
    amount = f"{most:,}: 1" if least == most else f"{least:,} to {most:,}: at least 1"
    section.good(f"at {context:>7,} tokens a step reads {amount} in {context / least:.1f} ({read.explain(context)})")


def _describe_layers(section: Section, shape: dict[str, int], held: dict[str, Capacity]) -> None:
    """What runs on our backend and what stays with vLLM; corrects ``shape`` by what vLLM has really built."""
    if held:
        ours, backends = sum(group.n_layers for group in held["sparq"].groups if group.ours), held["sparq"].backends
        shape["n_full"] = ours
        section.numbers["backends"] = backends
        if len(backends) > 1:
            listed = ", ".join(f"{n} layers on {name}" for name, n in sorted(backends.items()))
            section.note(f"{listed}; what follows is about ours")
    elif shape["n_full"] < shape["n_layers"]:
        others = shape["n_layers"] - shape["n_full"]
        section.note(f"{others} layers without full attention stay with vLLM; what follows is about the others")


def _engine_arguments(model: str, serve_args: Sequence[str]) -> dict[str, Any]:
    """What an engine for the model is made of, by vLLM's own parser.

    Raises:
        ValueError: vLLM does not know these arguments.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    said = io.StringIO()
    empty = FlexibleArgumentParser(add_help=False)  # type: ignore[no-untyped-call]  # vLLM's, without types
    parser = EngineArgs.add_cli_args(empty)
    try:
        with contextlib.redirect_stderr(said):
            found = parser.parse_args(list(serve_args))
    except (SystemExit, ValueError) as error:  # the last line says why
        raise ValueError(said.getvalue().strip().rpartition("error: ")[2] or str(error)) from None
    given = {name: value for name, value in vars(found).items() if value != parser.get_default(name)}
    return {**given, "model": model, "skip_tokenizer_init": True, "load_format": "dummy"}


def _capacities(section: Section, arguments: dict[str, Any], options: Options, backend: str) -> dict[str, Capacity]:
    """What a GiB of KV cache holds on this backend and on vLLM's own, as vLLM counts it.

    The engine's configuration and the model's layers are made as `vllm serve` makes them, so what it would refuse is
    found here; the section is not well then. Empty where vLLM itself cannot build the model on this machine.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sparq.attention_backends.capacity import capacity

    given = {NAMESPACE: options.model_dump(exclude_unset=True)}
    ours = {**arguments, "additional_config": given}
    if "attention_config" not in arguments:
        ours["attention_backend"] = backend.upper()
    try:  # refused for what it is, whether or not the layers can be built here
        EngineArgs(**ours).create_engine_config()
    except Exception as error:
        if _is_refused(section, error):
            return {}
    try:
        theirs = EngineArgs(**arguments).create_engine_config()
    except Exception as error:  # whatever vLLM thinks of what it is given
        section.bad(f"vLLM refuses it on any backend: {_first_line(error)}")
        return {}
    try:
        dense = capacity(theirs, 2**30)
    except Exception as error:  # whatever vLLM raises where a model cannot be built here
        if "meta" in str(error):  # weights without memory are our way of looking, and no model's duty
            section.note(f"what a GiB of KV cache holds is unknown: {_first_line(error)}")
        else:
            section.bad(f"vLLM cannot build the model on this machine, on any backend: {_first_line(error)}")
        return {}
    try:
        return {"sparq": capacity(EngineArgs(**ours).create_engine_config(), 2**30), "dense": dense}
    except Exception as error:  # the same, through vLLM's own checks of configurations
        if not _is_refused(section, error):
            section.bad(f"vLLM cannot build it on {backend}: {_first_line(error)}")
        return {}


def _is_refused(section: Section, error: Exception) -> bool:
    """Whether it is we who refuse, which is said in the section then."""
    from vllm_sparq.attention_backends.refusals import CANNOT_START

    _, is_refusal, reasons = _first_line(error).partition(CANNOT_START)
    if is_refusal:
        section.bad(f"refused: {reasons}")
    return bool(is_refusal)


def _describe_capacity(section: Section, held: dict[str, Capacity]) -> None:
    if not held:
        return
    ours, dense = held["sparq"], held["dense"]
    section.numbers["memory"]["tokens_per_gib"] = {name: one.n_tokens for name, one in held.items()}
    section.numbers["memory"]["requests_per_gib"] = {name: one.max_concurrency for name, one in held.items()}
    section.good(
        f"a GiB of KV cache holds {ours.n_tokens:,} tokens (dense: {dense.n_tokens:,}), {ours.max_concurrency:.2f} "
        f"requests of {ours.max_model_len:,} tokens (dense: {dense.max_concurrency:.2f}), as vLLM counts them"
    )


def _describe_keys(section: Section, options: Options, held: dict[str, Capacity]) -> None:
    """A format that biases of K do not fit into."""
    from vllm_sparq.attention_backends.keys import bias_warning, is_fragile

    n_biased = held["sparq"].n_biased_keys if held else 0
    section.numbers["biased_keys"] = n_biased
    if n_biased and is_fragile(options):
        section.note(bias_warning(options.format, n_biased))


def _describe_memory(
    section: Section, options: Options, shape: dict[str, int], dtype: Any, block_size: int, n_staging: int | None
) -> None:
    from vllm_sparq.attention_backends.engine import page_layout

    def layout_of(options: Options) -> PageLayout:
        return page_layout(options, _heads(shape), block_size, dtype)

    layout, n_vectors = layout_of(options), shape["n_kv_heads"] * shape["n_full"]
    per_head = {"sparq": layout.bytes_per_token, "dense": layout.record_bytes}
    per_token = {name: n_vectors * n_bytes for name, n_bytes in per_head.items()}
    section.numbers["memory"] = {
        "format": options.format,
        "bytes_per_token_and_kv_head": per_head,
        "bytes_per_token": per_token,
        "overhead": layout.overhead,
        "block_size": block_size,
        "staging_blocks_per_request": layout.n_staging_blocks if n_staging is None else n_staging,
    }
    section.good(
        f"format {options.format}: a cached token takes {per_head['sparq']} bytes per KV head (dense: "
        f"{per_head['dense']}) and {per_token['sparq']:,} in all layers (dense: {per_token['dense']:,}): "
        f"{layout.overhead:+.1%}"
    )
    section.good(f"blocks of {block_size} tokens, unless --block-size says otherwise")
    if layout.quantized is not None:
        section.note(
            "the newest block of a request waits in full precision in "
            f"{section.numbers['memory']['staging_blocks_per_request']} blocks of {block_size} tokens ahead of it, "
            "which count as its own"
        )
    others = {name: layout_of(options.model_copy(update={"format": name, "group_size": None})) for name in FORMATS}
    section.numbers["formats"] = {name: other.bytes_per_token for name, other in others.items()}
    listed = ", ".join(
        f"{name} {other.bytes_per_token} ({other.record_bytes / other.bytes_per_token:.2f}x the tokens)"
        for name, other in others.items()
    )
    section.note(f"bytes per token and KV head with read = {options.read}, by format: {listed}")
