"""Turned queries: the angles of every rotary embedding that is taken, how far rows are turned, and what is refused."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_sparq.attention_backends.engine import PagedEngine
from vllm_sparq.attention_backends.positions import Rope, Turning, position_refusals, rope_of
from vllm_sparq.config import parse_options

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "partial": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": dict(
        rope_type="llama3",
        rope_theta=10000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=512,
    ),
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512},
}


def rotary(parameters: dict[str, Any], *, neox: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        return get_rope(64, 2048, is_neox_style=neox, rope_parameters=parameters, dtype=dtype)


@pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize("name", ROPES)
def test_a_query_that_is_turned_back_is_the_model_s_own_at_that_position(name: str, neox: bool) -> None:
    module = rotary(ROPES[name], neox=neox)
    query = torch.randn(3, 2 * 64, generator=torch.Generator().manual_seed(1))
    positions, by = torch.tensor([7, 1000, 2047]), torch.tensor([[0, 7], [1, 1000], [1800, 3]])
    at_home = module.forward_native(positions, query.clone(), query.clone())[0].view(3, 2, 64)
    found = rope_of(module).turned_back(at_home, by)
    for slot in range(2):
        there = module.forward_native(positions - by[:, slot], query.clone(), query.clone())[0]
        torch.testing.assert_close(found[:, slot], there.view(3, 2, 64), atol=5e-4, rtol=0)


def test_a_table_in_bfloat16_is_taken() -> None:
    rope = rope_of(rotary(ROPES["default"], dtype=torch.bfloat16))
    assert rope.frequencies[0] == 1.0


def test_other_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="the model has none beside a layer: set positions 'original'"):
        rope_of(None)
    with pytest.raises(ValueError, match="the model has NTKScalingRotaryEmbedding beside a layer"):
        rope_of(rotary({"rope_type": "ntk", "rope_theta": 10000.0, "factor": 2.0}))
    module = rotary({"rope_type": "default", "rope_theta": 500.0})
    module.base = 1000.0
    with pytest.raises(ValueError, match="the model has RotaryEmbedding whose table says otherwise"):
        rope_of(module)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": None}, "the model has none in its configuration: set positions 'original'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}}, r"has rope_parameters \{.*mrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "has rope_parameters .*longrope"),
        ({"rope_parameters": {"rope_type": "default"}}, None),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "llama3"}, "sliding_attention": {"rope_type": "x"}}},
            None,
        ),
    ],
)
def test_configurations_are_refused_before_weights_load(config: dict[str, Any], message: str | None) -> None:
    given = {"positions": "capped", "prefill": "bounded"}
    engine = PagedEngine(backend="streaming", options=parse_options({"sparq": given}, "streaming"), block_size=128)
    text = SimpleNamespace(max_position_embeddings=2048, **config)
    found = position_refusals(SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text)), engine)
    assert len(found) == (message is not None)
    assert message is None or re.search(message, found[0])


@pytest.mark.parametrize(
    ("trained", "remedy"),
    [
        (1279, "use budget <= 1023, or say in the option"),
        (262, "use budget <= 6, or"),
        (261, "no budget is small enough"),
    ],
)
def test_a_budget_beyond_training_is_told_one_that_can_be(trained: int, remedy: str) -> None:
    given = {"positions": "capped", "prefill": "bounded", "trained": trained}
    engine = PagedEngine(backend="streaming", options=parse_options({"sparq": given}, "streaming"), block_size=128)
    text = SimpleNamespace(rope_parameters={"rope_type": "default"})
    (found,) = position_refusals(SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text)), engine)
    assert remedy in found
    if "use budget" in remedy:
        least = int(found.split("use budget <= ")[1].split(",")[0])
        parse_options({"sparq": given | {"budget": least}}, "streaming").retained(128)


def by(positions: str) -> list[list[int]]:
    """Of a request with three rows from position 10 on in slots 4 to 6, and one with a row at 2 in slot 2."""
    turning = Turning(positions, 2, 8, Rope(torch.ones(1), neox=True))
    starts, seq_lens, first = (torch.tensor(x).int() for x in ([0, 3, 4], [7, 3], [10, 2]))
    return turning.by(starts, seq_lens, first).tolist()


def test_how_far_rows_are_turned() -> None:
    assert by("renumbered") == [[6, 6], [6, 6], [6, 6], [0, 0]]
    assert by("capped") == [[2, 1], [3, 2], [4, 3], [0, 0]]
