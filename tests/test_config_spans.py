"""`config`: what `read: spans` and `read: infllm` resolve to, and what they refuse."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparq.config import OptionsError, parse_options
from vllm_sparq.reads import MEASURED_BREAK_EVEN, HeadShape, InfllmRead, SpansRead, spans_of


def resolved(**options: Any) -> SpansRead:
    return parse_options({"sparq": options}, "quest").read_of(HeadShape(head_size=64, n_heads=8, n_kv_heads=2))


def test_compression_by_hand() -> None:
    # c = 8: a dense read moves 2 S D elements, the bounds S D / 8 and k tokens 2 k D, so k = S / 8 - S / 16 = S / 16.
    read = resolved(dense_below=0)
    assert (read.min_k, read.k_per_token, read.dense_below) == (256, Fraction(1, 16), 0)
    assert [read.k(s) for s in (1, 4096, 4112, 16000)] == [256, 256, 257, 1000]
    # 16000 tokens are 1000 spans; 1000 tokens are 62 spans and a half, of which 62 are read.
    assert (spans_of(16000), read.n_spans(16000), read.n_selected(16000)) == (1000, 62, 992)
    assert (read.n_spans(16001), read.n_selected(16001)) == (62, 977)  # the newest span holds one token
    # c = 4: S / 4 - S / 16 = 3 S / 16. c = 3: S (16 - 3) / 48. c = 2.5: S (2 / 5 - 1 / 16) = 27 S / 80.
    assert [resolved(compression=c).k_per_token for c in (4, 3, 2.5)] == [
        Fraction(3, 16),
        Fraction(13, 48),
        Fraction(27, 80),
    ]
    assert resolved(compression=1).k_per_token == Fraction(15, 16)


@pytest.mark.parametrize("compression", [1, 2, 3, 4, 8, 15.5])
def test_bytes_are_those_of_the_compression(compression: float) -> None:
    """At a length where everything divides: S D / 8 + 2 k D = 2 S D / c, in elements per D."""
    s = 16 * 31 * 5040
    read = resolved(compression=compression, min_k=1)
    assert abs(s / 8 + 2 * read.n_spans(s) * 16 - 2 * s / compression) < 32


def test_k_overrides_compression() -> None:
    read = resolved(k=50, compression=2, min_k=4000)
    assert [read.k(s) for s in (10, 10**6)] == [50, 50]
    assert read.n_spans(10**6) == 3
    assert resolved(k=50, compression=100) == read, "compression decides nothing beside k"


@pytest.mark.parametrize(("k", "spans"), [(1, 3), (47, 3), (63, 3), (64, 4), (10**6, 7)])
def test_spans_by_hand(k: int, spans: int) -> None:
    """100 tokens are 7 spans, the last of 4 tokens; no fewer than 3 are read."""
    assert SpansRead(min_k=k).n_spans(100) == spans


def test_dense_contexts() -> None:
    read = SpansRead(min_k=64, dense_below=40)
    assert [s for s in (1, 39, 48, 64, 65, 100) if read.is_dense(s)] == [1, 39, 48, 64]
    assert SpansRead(min_k=1, dense_below=100).is_dense(99)
    assert resolved().dense_below == MEASURED_BREAK_EVEN


@given(
    st.builds(
        SpansRead,
        min_k=st.integers(1, 10**5),
        k_per_token=st.fractions(0, 1),
        dense_below=st.integers(0, 10**4),
    ),
    st.integers(1, 10**7),
)
def test_numbers_of_a_read(read: SpansRead, s: int) -> None:
    assert 1 <= read.n_spans(s) <= spans_of(s)
    assert read.n_spans(s) <= read.n_spans(s + 16)
    assert 16 * (spans_of(s) - 1) < s <= 16 * spans_of(s)
    assert read.is_dense(s) or (3 <= read.n_spans(s) < spans_of(s) and s >= read.dense_below)


def test_the_preset_is_the_authors() -> None:
    options = parse_options({}, "quest")
    assert (options.read, options.dense_layers, options.format, options.retention) == ("spans", 2, "model", "all")
    assert parse_options({"sparq": {"dense_layers": 0, "format": "kivi2"}}, "quest").dense_layers == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 16}, "r=16 means nothing with read 'spans': set k or compression, set read 'sparq', or leave it out"),
        ({"local": 0}, "local=0 means nothing with read 'spans'"),
        ({"ranking": "int8"}, "ranking='int8' means nothing with read 'spans'"),
        ({"mean_value": "on"}, "mean_value='on' means nothing with read 'spans'"),
        ({"group_reduce": "probs"}, "group_reduce='probs' means nothing with read 'spans'"),
        (
            {"retention": "heavy_hitter"},
            "retention='heavy_hitter' puts tokens from elsewhere .* bounds say nothing: .* 'all'",
        ),
        ({"retention": "window"}, "retention='window' puts tokens from elsewhere"),
        ({"compression": 16}, "compression=16.0 leaves .* no token to read: .* use compression < 16, or set k"),
        ({"compression": 100}, "compression=100.0 leaves"),
        ({"budget": 5}, "budget=5 means nothing while all tokens stay"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    for backend, read in (("quest", {}), ("sparq", {"read": "spans"}), ("kivi", {"read": "spans"})):
        with pytest.raises(OptionsError, match=f"sparq option {message}"):
            parse_options({"sparq": {**read, **options}}, backend)


@pytest.mark.parametrize(("k", "most"), [(1, 144), (224, 176), (240, 192), (1000, 944)])
def test_the_longest_window_of_infllm_is_not_cut(k: int, most: int) -> None:
    """All but the first span and one that is looked up."""
    read = parse_options({"sparq": {"k": k, "local": most}}, "infllm").read_of(
        HeadShape(head_size=64, n_heads=8, n_kv_heads=2)
    )
    assert isinstance(read, InfllmRead)
    assert read.n_newest(4096) == most // 16 + 1 == read.n_spans(4096) - 2
    with pytest.raises(OptionsError, match=f"use local <= {most}, or"):
        parse_options({"sparq": {"k": k, "local": most + 1}}, "infllm")


def test_h2o_with_pages_is_refused() -> None:
    with pytest.raises(OptionsError, match="retention='heavy_hitter'"):
        parse_options({"sparq": {"read": "spans"}}, "h2o")


def test_infllm_by_hand() -> None:
    """320 tokens are 20 spans, all of 300 tokens; of 4,096 the first one, the 13 newest (2/3 of 20) and 6 looked up."""
    read = InfllmRead(min_k=320)
    assert read.is_dense(300)
    assert (read.n_spans(4096), read.n_newest(4096), read.n_selected(4096)) == (20, 13, 320)
    # 130 newest tokens: 9 spans and the unfinished one. Never more than leave one span to look up, nor fewer than 9.
    assert [InfllmRead(min_k=320, local=n).n_newest(4096) for n in (128, 130, 4096)] == [9, 10, 18]
    assert (InfllmRead(min_k=1).n_spans(4096), InfllmRead(min_k=1).n_newest(4096)) == (12, 9)
    found = parse_options({"sparq": {"compression": 4, "local": 200}}, "infllm")
    heads = HeadShape(head_size=64, n_heads=8, n_kv_heads=2)
    assert found.read_of(heads) == InfllmRead(
        min_k=256, k_per_token=Fraction(3, 16), dense_below=MEASURED_BREAK_EVEN, local=200
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 16}, "r=16 means nothing with read 'infllm'"),
        ({"local": 64}, "local=64 is too small: .* so use local >= 128"),
        ({"k": 224, "local": 177}, "local=177 leaves no span of k=224 to look up: .* use local <= 176, or k >= 240$"),
        ({"k": 1, "local": 145}, "local=145 leaves no span .* 192 tokens .* use local <= 144, or k >= 208$"),
        ({"format": "int4"}, "format='int4' leaves codes where .* use format 'model'"),
        ({"retention": "window"}, "retention='window' puts tokens .* representatives say nothing: .* retention 'all'"),
        ({"sharing": "all"}, "sharing='all' means nothing with read 'infllm': .* leave it out"),
        ({"lossless": True}, "lossless=True takes drafts back, .* or leave lossless out"),
        ({"compression": 16}, "compression=16.0 leaves read 'infllm' no token to read"),
    ],
)
def test_infllm_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=f"sparq option {message}"):
        parse_options({"sparq": options}, "infllm")
