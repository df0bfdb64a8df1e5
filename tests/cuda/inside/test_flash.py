"""Prompts go through FlashAttention, over pages as they are or restored: a stand-in sees what it is called with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cuda.pretend.libraries import FLASH_CALLS
from tests.engine.support import EXACT, Prompts
from tests.ops import tolerances
from tests.ops.cases import Case, build
from vllm_sparq.attention_backends import flash
from vllm_sparq.attention_backends.steps.rows import PrefillRows
from vllm_sparq.ops.prefill.reference import prefill

HALF: dict[str, Any] = dict(dtype="bfloat16", max_model_len=1024, block_size=128, kv_cache_memory_bytes=64 << 20)


def test_ragged_cached_and_chunked_prompts(engine: Any, prompts: Any) -> None:
    """Their rows, their lengths, their blocks; and the strides of pages in which K and V lie side by side."""
    some = [prompts.of_length(n) for n in (300, 129, 37)]
    with engine("sparq", EXACT["sparse"], enable_prefix_caching=True, max_num_batched_tokens=256, **HALF) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        report = worker.attention_report().values()
        assert {layer["ops"]["prefill"] for layer in report} == {"flash (FlashAttention 3 of vLLM)"}
        FLASH_CALLS.clear()
        Prompts.answers(llm, some, 1)
        n_layers, page = len(report), next(iter(llm_layers(worker)))._pages.layout
        calls = FLASH_CALLS[::n_layers]
        assert [call["lens"] for call in calls] == [[256], [37, 300, 129]]  # those with the fewest new tokens first
        assert calls[1]["starts"] == [0, 37, 81, 210]
        d, bytes_per_element = page.head_size, 2
        assert calls[0]["k_stride"][1:] == (2 * d, page.page_bytes // bytes_per_element, 1)
        FLASH_CALLS.clear()
        Prompts.answers(llm, [some[0]], 1)  # two blocks of it are cached by now
        assert [(call["starts"], call["lens"]) for call in FLASH_CALLS[::n_layers]] == [([0, 44], [300])]


def llm_layers(worker: Any) -> Any:
    return [layer.impl for layer in worker.vllm_config.compilation_config.static_forward_context.values()]


def test_codes_are_restored_where_a_prompt_is_long(engine: Any, prompts: Any) -> None:
    """A piece of a prompt sees the restored blocks before it, and a page of its own; short prompts read codes."""
    long, short = prompts.of_length(700), prompts.of_length(200)
    with engine("flexgen", {}, enable_prefix_caching=True, max_num_batched_tokens=1024, **HALF) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        report = worker.attention_report().values()
        assert {layer["ops"]["prefill"].split(" (")[0] for layer in report} == {"flash"}
        FLASH_CALLS.clear()
        Prompts.answers(llm, [short], 1)
        assert not FLASH_CALLS
        Prompts.answers(llm, [long], 1)
        (call,) = FLASH_CALLS[:: len(report)]
        assert call["starts"] == [0, 128, 256, 384, 512, 640, 700]
        assert call["lens"] == [128, 256, 384, 512, 640, 700]
        assert call["splits"] == 1
        prompt = [*long, *prompts.of_length(1020)[700:]]
        FLASH_CALLS.clear()
        Prompts.answers(llm, [prompt], 1)  # five blocks of it are cached by now
        (call,) = FLASH_CALLS[:: len(report)]
        assert (call["starts"], call["lens"]) == ([0, 128, 256, 380], [768, 896, 1020])


@pytest.mark.parametrize(
    ("backend", "options"),
    [("sparq", EXACT["full"]), ("streaming", {"budget": 512}), ("kivi", {}), ("flexgen", {"chunk": "exact"})],
    ids=["as it is", "as it is, evicting", "restored", "restored, exact chunks"],
)
def test_answers_are_those_of_our_own_kernel(
    backend: str, options: dict[str, Any], engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities of the first token, which follow from the prompt alone."""
    from vllm import SamplingParams

    prompt = prompts.of_length(900)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5, detokenize=False)
    found = []
    for forced in (None, "cpu"):
        if forced:
            monkeypatch.setenv("VLLM_SPARQ_IMPL", forced)
        FLASH_CALLS.clear()
        with engine(backend, options, **HALF) as llm:
            (out,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        assert bool(FLASH_CALLS) == (forced is None)
        found.append({token: entry.logprob for token, entry in out.outputs[0].logprobs[0].items()})
    assert found[0].keys() == found[1].keys()
    ours, theirs = (torch.tensor([each[token] for token in found[0]]) for each in found)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.3)  # of bfloat16; a wrong row is off by more


@pytest.mark.parametrize(
    ("backend", "options", "more"),
    [("h2o", {}, {}), ("h2o", {"format": "kivi4"}, {}), ("flexgen", {}, {"dtype": "float32"})],
    ids=["adds attention up", "over codes too", "float32"],
)
def test_what_it_cannot_do_runs_on_our_own_kernel(
    backend: str, options: dict[str, Any], more: dict[str, Any], engine: Any, prompts: Any
) -> None:
    FLASH_CALLS.clear()
    with engine(backend, options, **{**HALF, **more}) as llm:
        Prompts.answers(llm, [prompts.of_length(700)], 2)
    assert not FLASH_CALLS


CASE = Case(heads=5, kv_heads=1, lens=(40, 70), new=(9, 70), dtype=torch.bfloat16, ranking=None, value_sum=False)


@pytest.mark.parametrize("changes", [{"sinks": True}, {"soft_cap": 2.0}])
def test_what_the_softmax_is_of_is_handed_over(changes: dict[str, Any]) -> None:
    case = replace(CASE, **changes)
    world = build(case)
    context, lens = world.context_lens[:2], world.seq_lens[:2]
    rows = PrefillRows(world.block_table[:2], world.query_start_loc, context, lens, 70, 70)
    sinks, out = case.sink_logits(), world.empty_out(79)
    given = sinks if sinks is None else sinks.bfloat16()
    cache, softmax = (world.pages.keys, world.pages.values), dict(sinks=given, soft_cap=case.soft_cap)
    keys, values = (part.transpose(1, 2) for part in cache)
    flash.flash_prefill(world.query[:79], keys, values, rows, scale=case.scale, out=out, **softmax)
    torch.testing.assert_close(out, build(case, written="context").prefill(prefill), **tolerances.OUT[case.dtype])


def test_one_row_beside_those_of_others() -> None:
    """The last token of a prompt, the rest of it cached, behind a request that decodes."""
    world = build(replace(CASE, lens=(40, 70), new=(1, 1)))
    tables = world.block_table[1:2], world.query_start_loc[1:], world.context_lens[1:2], world.seq_lens[1:2]
    out, (keys, values) = world.empty_out(2), (part.transpose(1, 2) for part in (world.pages.keys, world.pages.values))
    rows = PrefillRows(*tables, max_query_len=1, max_seq_len=70)
    flash.flash_prefill(world.query[:2], keys, values, rows, scale=CASE.scale, out=out, sinks=None)
    want = build(world.case, written="context").prefill(prefill)
    torch.testing.assert_close(out[1], want[1], **tolerances.OUT[CASE.dtype])
    assert out[0].isnan().all()


def test_heads_that_version_2_has_no_kernel_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    flash._version.cache_clear()
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **layer: 2)
    monkeypatch.setattr(FlashAttentionBackend, "supports_head_size", lambda size: True)
    found = {size: flash._version(size, False, False) for size in (64, 256, 512)}
    flash._version.cache_clear()
    assert found == {64: 2, 256: 2, 512: None}


def test_sinks_are_for_versions_that_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: dict[str, Any] = dict(
        dtype=torch.bfloat16, head_size=64, format="model", tracked=False, forced=None, soft_cap=None
    )
    sinks = torch.zeros(4, dtype=torch.bfloat16)
    assert flash.flash_choice(**layer, sinks=sinks) is not None
    assert flash.flash_choice(**layer, sinks=sinks.float()) is None
    with monkeypatch.context() as other:
        other.setattr(flash, "_has_sinks_argument", lambda: False)
        assert flash.flash_choice(**layer, sinks=sinks) is None
    monkeypatch.setattr(flash, "_version", lambda *layer: 2)
    assert flash.flash_choice(**layer, sinks=sinks) is None
    assert flash.flash_choice(**layer, sinks=None) is not None


def test_nothing_but_v_behind_the_last_token_is_cleared() -> None:
    """Of a page that is not full; neither of a full one nor of what the table of a padding row says."""
    lens = torch.tensor([40, 64, 0], dtype=torch.int32)
    world = build(replace(CASE, lens=(40, 64), new=(9, 64)))
    table = world.block_table[[0, 1, 0]]
    rows = PrefillRows(table, world.query_start_loc, world.context_lens, lens, 64, 64)
    page = int(table[0, 2])
    want = world.pages.data.clone()
    want_values = type(world.pages)(want, world.pages.layout).values
    assert want_values[page, :, 8:].isnan().all()
    want_values[page, :, 8:] = 0
    flash.clear_unwritten(world.pages.values.transpose(1, 2), rows)
    assert world.pages.data.equal(want)
    assert rows.unwritten(CASE.block_size) is rows.unwritten(CASE.block_size)
