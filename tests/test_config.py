"""`config`: defaults, what an option resolves to, and every refusal in words."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_sparq.backends import BACKENDS, PRESETS
from vllm_sparq.config import Options, OptionsError, parse_options
from vllm_sparq.formats import FORMATS
from vllm_sparq.reads import MEASURED_BREAK_EVEN, HeadShape, SparqRead

LLAMA = HeadShape(head_size=128, n_heads=32, n_kv_heads=8)
MHA = HeadShape(head_size=128, n_heads=32, n_kv_heads=32)


def parse(**options: Any) -> Options:
    return parse_options({"sparq": options})


def test_defaults() -> None:
    assert Options().model_dump() == {
        "format": "model",
        "group_size": None,
        "chunk": "codes",
        "retention": "all",
        "budget": None,
        "recent": None,
        "sinks": None,
        "prefill": "full",
        "positions": "original",
        "trained": None,
        "pressure": "preempt",
        "read": "sparq",
        "compression": 8.0,
        "r": None,
        "k": None,
        "local": None,
        "min_k": 256,
        "mass": None,
        "ranking": "int4",
        "mean_value": "auto",
        "group_reduce": "logits",
        "dense_layers": 0,
        "dense_below": "auto",
        "sharing": "prompts",
        "lossless": False,
        "drafts": 3,
    }


@pytest.mark.parametrize("nothing", [None, {}, {"sparq": {}}, {"other": {"k": -1}}])
def test_nothing_given_is_the_defaults(nothing: dict[str, Any] | None) -> None:
    assert parse_options(nothing) == Options()


def test_every_option_is_documented() -> None:
    for name, field in Options.model_fields.items():
        assert field.description, f"option {name} has no docstring for `vllm-sparq doctor`"


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Options().k = 3
    read = Options().read_of(LLAMA)
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.r = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        SparqRead(16, 128)  # type: ignore[misc]
    assert hash(read) == hash(Options().read_of(LLAMA))


def test_compression_by_hand() -> None:
    # c = 8: r = 128 / 8 = 16, k = 7/8 S / 8, at least 256.
    read = Options().read_of(LLAMA)
    assert (read.r, read.min_k, read.k_per_token) == (16, 256, Fraction(7, 64))
    assert [read.k(s) for s in (1, 2341, 2349, 2350, 16000, 131072)] == [256, 256, 256, 257, 1750, 14336]
    # S = 16000: 1750 cached tokens and the current one; a quarter of 1750 and the current one are the newest.
    assert (read.n_selected(16000), read.n_local(16000)) == (1751, 438)
    # c = 4 on a head of 80: r = 20, k = 7/8 S / 4.
    read = parse(compression=4, min_k=1).read_of(HeadShape(head_size=80, n_heads=8, n_kv_heads=8))
    assert (read.r, read.k_per_token, read.k(999)) == (20, Fraction(7, 32), 218)
    # c = 3: r = round(128 / 3) = 43, k = 7/24 S with no rounding: 6 million tokens give exactly 1.75 million.
    read = parse(compression=3, min_k=1).read_of(LLAMA)
    assert (read.r, read.k(6_000_000), read.k(5_999_999)) == (43, 1_750_000, 1_749_999)
    # Channel-major K ranks itself, half of the bytes of a token: k = S / 16.
    assert parse(format="kivi4").read_of(LLAMA).k_per_token == Fraction(1, 16)
    # More compression than channels leaves one.
    assert parse(compression=1000).read_of(LLAMA).r == 1
    assert parse(compression=1).read_of(LLAMA).r == 128


def test_explicit_numbers_override_compression() -> None:
    read = parse(r=7, k=50, compression=2, min_k=4000).read_of(LLAMA)
    assert (read.r, read.k(10), read.k(10**6)) == (7, 50, 50)
    assert parse(k=50).read_of(LLAMA).r == 16
    assert parse(r=7).read_of(LLAMA).k(10**6) == 109375


def test_mass_by_hand() -> None:
    # c = 8 and S = 16000: k = 1750, of which 437 are the newest; min_k is the least, unless the newest are more.
    read = parse(mass=0.9).read_of(LLAMA)
    assert (read.mass, read.n_selected(16000), read.n_least(16000)) == (0.9, 1751, 438)
    read = parse(mass=0.9, min_k=600).read_of(LLAMA)
    assert (read.n_selected(16000), read.n_least(16000)) == (1751, 601)
    read = parse(mass=0.9, k=1000, min_k=64, local=10).read_of(LLAMA)
    assert (read.n_selected(16000), read.n_least(16000), read.n_least(40)) == (1001, 65, 40)
    # The least is no more than the most, and without a mass it is the most.
    assert parse(mass=0.9, min_k=600).read_of(LLAMA).n_least(2000) == 601
    assert parse(k=50).read_of(LLAMA).n_least(2000) == 51


def test_a_mass_with_nothing_to_choose_is_refused() -> None:
    with pytest.raises(OptionsError, match=r"mass=0.9 means nothing with k=128 and min_k=256.*: set min_k below k"):
        parse(mass=0.9, k=128)
    assert parse(mass=0.9, k=257).mass == 0.9


def test_sharing_where_nothing_is_shared_is_refused() -> None:
    with pytest.raises(OptionsError, match=r"sharing='all' means nothing with retention='window'.*leave it out"):
        parse(sharing="all", retention="window")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retention": "all"}, "got retention='all': set retention 'window', or positions 'original'"),
        ({"retention": "heavy_hitter"}, "got retention='heavy_hitter': set retention 'window'"),
        ({"prefill": "full"}, "got prefill='full': set prefill 'bounded'"),
        ({"format": "int8"}, "got format='int8': set format 'model'"),
        ({"read": "sparq"}, "got read='sparq': set read 'dense'"),
        ({"budget": 0.5}, "budget=0.5 grows with the prompt: set a budget in tokens"),
        ({"sinks": 0}, "sinks=0 keeps none: set sinks >= 1"),
        ({"positions": "original", "trained": 100}, "trained=100 means nothing while positions are original: set pos"),
    ],
)
def test_positions_ask_for_what_they_need(changes: dict[str, Any], message: str) -> None:
    given = {"retention": "window", "read": "dense", "prefill": "bounded", "positions": "capped", "budget": 512}
    assert parse(**given).positions == "capped"
    with pytest.raises(OptionsError, match=message):
        parse(**{**given, **changes})


def test_local() -> None:
    assert [parse(k=k).read_of(LLAMA).n_local(1000) for k in (1, 3, 4, 7, 8, 128)] == [1, 1, 2, 2, 3, 33]
    assert [parse(k=8, local=n).read_of(LLAMA).n_local(1000) for n in (0, 1, 8)] == [1, 2, 9]
    # A k of 256 up to 2,340 tokens and of 7/64 of more: what there is no room for is not read.
    assert [parse(local=300).read_of(LLAMA).n_local(n) for n in (2000, 2700, 8000)] == [257, 296, 301]


@pytest.mark.parametrize(("k", "local"), [(8, 9), (1, 64), (1, 2)])
def test_more_newest_tokens_than_are_read_are_refused(k: int, local: int) -> None:
    with pytest.raises(OptionsError, match=f"local={local} is more than k={k}.*: use local <= {k}, or k >= {local}$"):
        parse(k=k, local=local)
    parse(k=local, local=local)


@pytest.mark.parametrize(
    ("mean_value", "shape", "floor"),
    [
        ("on", LLAMA, 0.0),
        ("off", LLAMA, 1.0),
        ("auto", LLAMA, 1.0),
        ("on", MHA, 0.0),
        ("off", MHA, 1.0),
        ("auto", MHA, 0.0),
    ],
)
def test_mean_value(mean_value: str, shape: HeadShape, floor: float) -> None:
    """auto: the authors' choice of always for one KV head per query head, and never for more."""
    assert parse(mean_value=mean_value).read_of(shape).alpha_floor == floor


def test_mean_value_follows_how_a_group_is_reduced() -> None:
    grouped = HeadShape(head_size=64, n_heads=8, n_kv_heads=2)
    assert parse(group_reduce="probs").read_of(grouped).alpha_floor == 0.0
    assert parse(group_reduce="logits").read_of(grouped).alpha_floor == 1.0
    assert parse(group_reduce="probs", mean_value="off").read_of(grouped).alpha_floor == 1.0


@pytest.mark.parametrize(
    ("backend", "given", "format_and_read"),
    [
        ("sparq", {}, ("model", "sparq")),
        ("flexgen", {}, ("int4", "dense")),
        ("kivi", {}, ("kivi4", "dense")),
        ("kivi", {"format": "kivi2"}, ("kivi2", "dense")),
        ("quest", {"dense_layers": 0}, ("model", "spans")),
        ("flexgen", {"read": "sparq"}, ("int4", "sparq")),
        ("sparq", {"format": "int4"}, ("int4", "sparq")),
    ],
)
def test_presets(backend: str, given: dict[str, Any], format_and_read: tuple[str, str]) -> None:
    """A backend's name sets defaults; what the user gives wins; axes compose."""
    options = parse_options({"sparq": given}, backend)
    assert (options.format, options.read) == format_and_read
    assert options.model_copy(update={"format": "model", "read": "sparq"}) == Options()


def test_every_backend_has_a_preset() -> None:
    assert {name.lower() for name in BACKENDS} == set(PRESETS)
    assert get_args(Options.model_fields["format"].annotation) == tuple(FORMATS)


def test_the_rest_passes_through() -> None:
    options = parse(group_reduce="probs", dense_below=77, local=3)
    read = options.read_of(LLAMA)
    assert (read.group_reduce, read.dense_below, read.local) == ("probs", 77, 3)
    assert Options().read_of(LLAMA).dense_below == MEASURED_BREAK_EVEN
    assert parse(dense_below=0).read_of(LLAMA).dense_below == 0


def test_where_sparse_begins() -> None:
    # k = 10 cached tokens and the current one: 11 tokens are all read, of 12 one is not.
    read = SparqRead(r=16, min_k=10)
    assert [read.is_dense(s) for s in (1, 10, 11, 12, 13)] == [True, True, True, False, False]
    assert [read.n_selected(s) for s in (1, 10, 11, 12, 13)] == [1, 10, 11, 11, 11]
    read = SparqRead(r=16, min_k=10, dense_below=20)
    assert [read.is_dense(s) for s in (12, 19, 20, 21)] == [True, True, False, False]


slopes = st.floats(1, 64).map(lambda c: Fraction(7 / (8 * c)).limit_denominator(4096))
reads = st.builds(
    SparqRead,
    r=st.just(16),
    min_k=st.integers(1, 5000),
    k_per_token=st.one_of(st.just(Fraction(0)), slopes),
    local=st.one_of(st.none(), st.integers(0, 10_000)),
    mass=st.one_of(st.none(), st.floats(0.01, 0.99)),
    least_k=st.integers(1, 10_000),
    dense_below=st.integers(0, 5000),
)


@given(reads, st.integers(1, 1_000_000))
def test_numbers_of_a_read(read: SparqRead, s: int) -> None:
    k, selected, local = read.k(s), read.n_selected(s), read.n_local(s)
    assert k >= read.min_k
    assert k == max(read.min_k, int(s * read.k_per_token))  # int truncates, and all is positive
    assert 1 <= local <= read.n_least(s) <= selected <= s
    assert read.n_least(s) == selected or (read.mass and read.n_least(s) in (local, read.least_k + 1))
    assert selected == min(s, k + 1)
    wanted = k // 4 if read.local is None else read.local
    assert local == min(s, min(wanted, k) + 1)
    assert read.is_dense(s) == (s < read.dense_below or selected == s)


@given(reads, st.integers(1, 1_000_000))
def test_more_context_never_reads_less(read: SparqRead, s: int) -> None:
    assert read.k(s + 1) - read.k(s) in (0, 1)  # the slope is at most 7/8
    assert read.n_selected(s + 1) >= read.n_selected(s)
    assert read.n_local(s + 1) >= read.n_local(s)
    assert read.is_dense(s) or not read.is_dense(s + 1) or read.k(s + 1) > read.k(s)


@given(
    st.floats(1, 1000),
    st.sampled_from([32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512]),
    st.sampled_from([("int4", 4), ("int8", 8), ("model", 16)]),
)
def test_compression_means_what_it_says(compression: float, head_size: int, ranking: tuple[str, int]) -> None:
    name, bits = ranking
    options = parse(compression=compression, min_k=1, ranking=name)
    read = options.read_of(HeadShape(head_size=head_size, n_heads=8, n_kv_heads=2))
    assert 1 <= read.r <= head_size
    assert abs(read.r - head_size / compression) <= 0.5 or read.r == 1
    dense, scanned = 65536 * 2 * 16 * head_size, 65536 * bits * head_size / compression
    assert scanned + read.k(65536) * 2 * 16 * head_size == pytest.approx(dense / compression, abs=dense / 2048)


REFUSED = [
    ({"k": 0}, "k=0", "greater than or equal to 1", "Cached tokens attended to exactly"),
    ({"r": 0}, "r=0", "greater than or equal to 1", "Query components"),
    ({"r": 2.0}, "r=2.0", "integer", "Query components"),
    ({"k": "128"}, "k='128'", "integer", "Cached tokens"),
    ({"k": True}, "k=True", "integer", "Cached tokens"),
    ({"local": -1}, "local=-1", "greater than or equal to 0", "newest tokens"),
    ({"min_k": 0}, "min_k=0", "greater than or equal to 1", "Floor"),
    ({"mass": 1.0}, "mass=1.0", "less than 1", "share of the estimated probability"),
    ({"mass": 0.0}, "mass=0.0", "greater than 0", "share of the estimated probability"),
    ({"mass": float("nan")}, "mass=nan", "less than 1", "share of the estimated probability"),
    ({"mass": "0.9"}, "mass='0.9'", "number", "share of the estimated probability"),
    ({"compression": 0.5}, "compression=0.5", "greater than or equal to 1", "Bytes of a dense read"),
    ({"compression": float("inf")}, "compression=inf", "finite", "Bytes of a dense read"),
    ({"compression": float("nan")}, "compression=nan", "finite|greater", "Bytes of a dense read"),
    ({"compression": "8"}, "compression='8'", "number", "Bytes of a dense read"),
    ({"ranking": "int2"}, "ranking='int2'", "'int4', 'int8' or 'model'", "channel-major"),
    ({"format": "int3"}, "format='int3'", f"or {[*FORMATS][-1]!r}", "How full blocks are stored"),
    ({"group_size": 4}, "group_size=4", "greater than or equal to 8", "share a scale"),
    ({"read": "sparse"}, "read='sparse'", "'sparq', 'spans', 'infllm' or 'dense'", "decode step"),
    ({"mean_value": True}, "mean_value=True", "'auto', 'on' or 'off'", "probability of unread tokens"),
    ({"group_reduce": "max"}, "group_reduce='max'", "'logits' or 'probs'", "query group"),
    ({"dense_layers": -1}, "dense_layers=-1", "greater than or equal to 0", "First layers"),
    ({"dense_below": -1}, "dense_below=-1", "'auto' or a number of tokens from 0", "read densely"),
    ({"dense_below": "never"}, "dense_below='never'", "'auto' or a number of tokens from 0", "read densely"),
    ({"dense_below": 1.5}, "dense_below=1.5", "'auto' or a number of tokens from 0", "read densely"),
    ({"sharing": True}, "sharing=True", "'prompts' or 'all'", "Which blocks prefix caching shares"),
    ({"lossless": 3}, "lossless=3", "boolean", "drafts tokens with this read"),
    ({"lossless": True, "drafts": 0}, "drafts=0", "greater than or equal to 1", "for each verification"),
]


@pytest.mark.parametrize(("options", "value", "rule", "remedy"), REFUSED, ids=[row[1] for row in REFUSED])
def test_a_bad_value_is_refused(options: dict[str, Any], value: str, rule: str, remedy: str) -> None:
    with pytest.raises(OptionsError) as error:
        parse_options({"sparq": options})
    message = str(error.value)
    assert message.startswith(f"sparq option {value} is not usable: ")
    assert re.search(rule, message), message
    assert remedy in message, message
    assert message.count("sparq option") == 1, "one finding per option"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("topk", None),
        ("compresion", "compression"),
        ("K", None),
        ("minK", "min_k"),
        ("mean", "mean_value"),
        ("locals", "local"),
    ],
)
def test_an_unknown_option_is_refused(given: str, meant: str | None) -> None:
    with pytest.raises(OptionsError) as error:
        parse_options({"sparq": {given: 1}})
    message = str(error.value)
    assert f"unknown sparq option {given!r}." in message
    assert ("Did you mean" in message) == (meant is not None)
    if meant:
        assert f"Did you mean {meant!r}?" in message
    for name in Options.model_fields:
        assert name in message.split("Known options: ")[1].split(", ")


def test_all_findings_at_once() -> None:
    with pytest.raises(OptionsError) as error:
        parse_options({"sparq": {"k": 0, "rr": 1, "dense_below": "x"}})
    message = str(error.value)
    assert all(part in message for part in ("k=0", "'rr'", "dense_below='x'"))
    assert len(message.split("; ")) == 3


@pytest.mark.parametrize("value", ["compression=4", 4, ["k"], True])
def test_something_else_than_an_object_is_refused(value: object) -> None:
    with pytest.raises(OptionsError, match=re.escape(f"must be an object of options, got {value!r}")) as error:
        parse_options({"sparq": value})
    assert '{"sparq": {"compression": 4}}' in str(error.value)


def test_r_beyond_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"r=129 is larger than the model's head size 128: use r <= 128"):
        parse(r=129).read_of(LLAMA)
    assert parse(r=128).read_of(LLAMA).r == 128


def test_errors_are_value_errors() -> None:
    assert issubclass(OptionsError, ValueError)


def test_drafts_without_lossless_are_refused() -> None:
    with pytest.raises(
        OptionsError, match="drafts=5 means nothing without lossless: set lossless true, or leave it out"
    ):
        parse(drafts=5)
    assert parse(drafts=5, lossless=True).drafts == 5


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"compression": 4}, '{"sparq": {"compression": 4}}'),
        ({"other": 1, "budget": 64}, '{"sparq": {"budget": 64}}'),
        ({"spark": {"compression": 4}}, '{"sparq": {"compression": 4}}'),
        ({"SPARQ": {"r": 8}}, '{"sparq": {"r": 8}}'),
        ({"h2o": {"budget": 64}}, '{"sparq": {"budget": 64}}'),
    ],
)
def test_options_where_nothing_reads_them_are_refused(given: dict[str, Any], right: str) -> None:
    """The engine would start without them and say nothing."""
    with pytest.raises(OptionsError, match=rf"read by nothing.* write --additional-config '{re.escape(right)}'"):
        parse_options(given)


def test_what_belongs_to_others_is_left_to_them() -> None:
    assert parse_options({"sparq": {"r": 8}, "compression": 4, "k": {"a": 1}}).r == 8
    assert parse_options({"spark": "a word", "parts": {"a": 1}, "other": {"compression": 4}}) == parse_options({})
