"""What a request may choose, and what it is told where it may not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_sparq.attention_backends import choices
from vllm_sparq.attention_backends.admission import check_request
from vllm_sparq.attention_backends.choices import asked_for, chosen
from vllm_sparq.attention_backends.engine import PagedEngine
from vllm_sparq.config import MOST_TOKENS, Options, OptionsError, parse_options
from vllm_sparq.reads import HeadShape

HEADS = HeadShape(head_size=64, n_heads=8, n_kv_heads=2)


def engine(backend: str = "sparq", **options: Any) -> PagedEngine:
    return PagedEngine(backend=backend, options=parse_options({"sparq": options}, backend), block_size=128)


def choose(extra_args: dict[str, Any] | None, of: PagedEngine | None = None) -> Options | None:
    return chosen(of or engine(), HEADS, asked_for(extra_args))


@pytest.mark.parametrize(
    ("extra_args", "of", "expected"),
    [
        ({"sparq.compression": 4}, {}, {"compression": 4}),
        ({"sparq": {"r": 16, "k": 64}}, {}, {"r": 16, "k": 64}),
        ({"sparq": {"r": 16}, "sparq.k": 64}, {"mean_value": "on"}, {"mean_value": "on", "r": 16, "k": 64}),
        ({"sparq.mass": 0.9, "sparq.min_k": 32}, {}, {"mass": 0.9, "min_k": 32}),
        ({"sparq.compression": 4}, {"r": 8, "k": 64}, {"compression": 4}),  # which they would have overridden
        ({"sparq.compression": 4, "sparq.r": 8}, {"k": 64}, {"compression": 4, "r": 8}),
        ({"sparq.k": 64}, {"read": "spans"}, {"read": "spans", "k": 64}),
        (
            {"sparq.k": 64},
            {"format": "int4", "retention": "window"},
            {"format": "int4", "retention": "window", "k": 64},
        ),
    ],
    ids=str,
)
def test_a_choice_is_the_options_of_an_engine_for_it(
    extra_args: dict[str, Any], of: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert choose(extra_args, engine(**of)) == parse_options({"sparq": expected})


@pytest.mark.parametrize("of", [engine(), engine("quest"), engine(retention="heavy_hitter"), engine(format="kivi4")])
def test_off_is_a_dense_read_of_the_same_pages(of: PagedEngine) -> None:
    options = choose({"sparq": "off"}, of)
    assert options is not None
    assert options.read_of(HEADS).is_dense(1 << 20)
    assert options.format == of.options.format


@pytest.mark.parametrize(
    ("extra_args", "of"),
    [
        (None, engine()),
        ({}, engine()),
        ({"session": 5}, engine()),
        ({"sparq": {}}, engine()),
        ({"sparq": "off"}, engine("kivi")),
        ({"sparq": "off"}, engine(lossless=True)),
        ({"sparq.compression": 8}, engine()),  # what the engine does anyway
    ],
)
def test_where_the_engine_s_own_options_do(extra_args: dict[str, Any] | None, of: PagedEngine) -> None:
    assert choose(extra_args, of) is None


@pytest.mark.parametrize(
    ("extra_args", "of", "words"),
    [
        ({"sparq.r": 65}, {}, ['"sparq.r": 65', "larger than the model's head size 64", "use r <= 64"]),
        ({"sparq.compression": 0.5}, {}, ["compression=0.5", "greater than or equal to 1"]),
        ({"sparq.k": "12"}, {}, ["k='12'", "valid integer"]),
        ({"sparq.mass": 1.5}, {}, ["mass=1.5", "less than 1"]),
        *(  # what vLLM lets through; kernels count in 64 bits, and would wrap around
            ({f"sparq.{name}": n}, {}, [f"{name}={n}", f"less than or equal to {MOST_TOKENS}"])
            for name in ("k", "min_k", "r")
            for n in (MOST_TOKENS + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1)
        ),
        ({"sparq.mass": 0.5, "sparq.k": 64}, {}, ["min_k=256", "set min_k below k"]),
        ({"sparq.k": 16}, {"local": 64}, ['"sparq.k": 16', "local=64 is more than k=16", "or k >= 64"]),
        ({"sparq.format": "int4"}, {}, ['"sparq.format": "int4"', "compression, sparq.r", "--additional-config"]),
        ({"sparq.topk": 5}, {}, ['"sparq.topk": 5', "a request may set"]),
        ({"sparq": {1: 2, "r": 4}}, {}, ['"sparq.1": 2', "a request may set"]),
        ({1: 2, "sparq.topk": 5}, {}, ['"sparq.topk": 5', "a request may set"]),
        ({"sparq": "on"}, {}, ["'on' is neither", '"off"']),
        ({"sparq": [1]}, {}, ["[1] is neither"]),
        ({"sparq": "off", "sparq.k": 5}, {}, ["contradict"]),
        ({"sparq.r": 4}, {"read": "spans"}, ["r=4", "means nothing with read 'spans'"]),
        ({"sparq.compression": 16}, {"read": "spans"}, ["leaves read 'spans' no token"]),
        ({"sparq.k": 64}, {"read": "dense"}, ['"sparq.k": 64', "reads densely", "--attention-backend sparq"]),
        ({"sparq.k": 64}, {"lossless": True}, ["lossless", "dense attention"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_value_rule_and_remedy(
    extra_args: dict[str, Any], of: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(OptionsError) as refused:
        choose(extra_args, engine(**of))
    for word in words:
        assert word in str(refused.value)


def test_on_cuda_it_is_refused_as_a_preview(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    here = engine(dense_below=7)  # not asked for elsewhere: what was found is remembered
    with pytest.raises(OptionsError, match="preview, on CPU alone so far"):
        choose({"sparq": "off"}, here)
    assert choose({"sparq": "off"}, engine("kivi", dense_below=7)) is None


def test_requests_to_other_backends_are_not_ours() -> None:
    attention = SimpleNamespace(backend=None, backend_per_kind={})
    check_request(SimpleNamespace(attention_config=attention), SimpleNamespace(extra_args={"sparq": 5}))
    check_request(None, SimpleNamespace())  # parameters of pooling
