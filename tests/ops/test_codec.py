"""The quantized formats: codes within half a scale, packed as documented, and really as small as they say."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.cases import Case
from vllm_sparq.formats import FORMATS, QUANTIZED
from vllm_sparq.layout import PageLayout, Pages
from vllm_sparq.ops.codec import decode_page, encode_page, not_below, quantize, unpack

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPS = {name: (None, 8, 16, 32, 64) if how.has_groups else (None,) for name, how in QUANTIZED.items()}


def page_of(layout: PageLayout, keys: torch.Tensor, values: torch.Tensor) -> Pages:
    pages = Pages(torch.full((1, 1, layout.page_bytes), 0xFF, dtype=torch.uint8), layout)
    encode_page(pages, 0, 0, keys, values)
    return pages


def tokens(layout: PageLayout, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shape = (layout.block_size, layout.head_size)
    keys, values = (torch.randn(shape, generator=gen) * 3 + torch.randn(shape[1], generator=gen) for _ in range(2))
    return keys.to(layout.dtype), values.to(layout.dtype)


def layouts(name: str) -> list[PageLayout]:
    return [
        PageLayout(head_size=d, block_size=n, dtype=dtype, format=name, group_size=g)
        for d, n in ((64, 64), (128, 128), (80, 64), (96, 192))
        for dtype in DTYPES
        for g in GROUPS[name]
        if g is None or d % g == 0
    ]


BY_HAND = {"int8": ("s8", "s8"), "k8v4": ("s8", "t4"), "int4": ("t4", "t4")}
BY_HAND |= {"kivi4": ("c4", "c4"), "k4v2": ("c4", "t2"), "kivi2": ("c2", "c2")}
"""Of K and of V: s signed with one scale a token, t groups of 64 channels, c groups of 32 of KIVI; and the bits."""


def by_hand(data: bytes, layout: PageLayout) -> tuple[list[list[float]], list[list[float]]]:
    """K and V [N][D] of a page, unpacked byte by byte from what `vllm_sparq.layout` says of it; no shared code."""
    n, d, e = layout.block_size, layout.head_size, layout.dtype.itemsize
    assert layout.format in BY_HAND, f"say in BY_HAND how {layout.format} is unpacked, whatever its row says"
    (key_kind, key_bits), (value_kind, value_bits) = ((kind[0], int(kind[1])) for kind in BY_HAND[layout.format])

    def group_of(kind: str) -> int:
        if kind == "s":
            return d
        default = (64 if d % 64 == 0 else d // 2) if kind == "t" else (32 if d % 32 == 0 else 16)
        return layout.group_size or default

    def number(at: int) -> float:
        return torch.frombuffer(bytearray(data[at : at + e]), dtype=layout.dtype).item()

    def element(kind: str, bits: int, row_codes: int, row_scales: int, i: int, length: int) -> float:
        per_run = length * bits // 8
        code = data[row_codes + i % per_run] >> (bits * (i // per_run)) & (2**bits - 1)
        if kind == "s":
            return (code - 256 if code > 127 else code) * number(row_scales)
        at = row_scales + i // group_of(kind) * 2 * e
        return number(at + e) + number(at) * code

    def rows(kind: str, bits: int, codes: int, codes_step: int, scales: int, scales_step: int) -> list[list[float]]:
        return [
            [element(kind, bits, codes + t * codes_step, scales + t * scales_step, c, d) for c in range(d)]
            for t in range(n)
        ]

    value_scale_bytes = d // group_of(value_kind) * (1 if value_kind == "s" else 2) * e
    if key_kind == "c":
        at = {name: part.offset for name, part in layout.parts.items()}
        k_codes, k_scales = n * key_bits // 8, n // group_of("c") * 2 * e
        columns = [
            [
                element("c", key_bits, at["key_codes"] + c * k_codes, at["key_scales"] + c * k_scales, t, n)
                for t in range(n)
            ]
            for c in range(d)
        ]
        keys = [[columns[c][t] for c in range(d)] for t in range(n)]
        v_codes = d * value_bits // 8
        return keys, rows(value_kind, value_bits, at["value_codes"], v_codes, at["value_scales"], value_scale_bytes)
    v_codes = d * key_bits // 8
    k_scales = v_codes + d * value_bits // 8
    pair = 2 * e if "t" in (key_kind, value_kind) else e  # scale and zero point lie in one word
    v_scales = -(-(k_scales + d // group_of(key_kind) * (1 if key_kind == "s" else 2) * e) // pair) * pair
    record = -(-(v_scales + value_scale_bytes) // pair) * pair
    return rows(key_kind, key_bits, 0, record, k_scales, record), rows(
        value_kind, value_bits, v_codes, record, v_scales, record
    )


@pytest.mark.parametrize("name", QUANTIZED)
def test_round_trip_is_within_half_a_step(name: str) -> None:
    for layout in layouts(name):
        keys, values = tokens(layout)
        pages = page_of(layout, keys, values)
        for part, got, want, scales, by_channel in (
            ("key", *(decode_page(pages, 0, 0)[0], keys), pages.key_scales[0, 0], layout.channel_keys),
            ("value", *(decode_page(pages, 0, 0)[1], values), pages.value_scales[0, 0], False),
        ):
            steps = scales[..., 0].float().repeat_interleave(layout.group(part), -1)
            steps = steps.T if by_channel else steps
            slack = 2.0**-20 * (want.float().abs() + 16 * steps)  # fp32: the multiplication, the addition
            if layout.coding(part).midpoints:  # zero is rounded
                zeros = scales[..., 1].float().repeat_interleave(layout.group(part), -1)
                slack = slack + zeros.abs() * torch.finfo(layout.dtype).eps / 2
            assert ((got - want.float()).abs() <= steps / 2 + slack).all(), layout


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_second_unpacker_reads_the_bytes(name: str) -> None:
    for layout in layouts(name):
        if layout.block_size > 64 and layout.dtype != torch.bfloat16:
            continue
        pages = page_of(layout, *tokens(layout, seed=1))
        found = by_hand(bytes(pages.data[0, 0].tolist()), layout)
        for got, want in zip(found, decode_page(pages, 0, 0), strict=True):
            torch.testing.assert_close(torch.tensor(got), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "head_size", "bytes_per_token"),
    [
        # K and V: D codes of 1 byte and one scale of 2 bytes each.
        ("int8", 64, 2 * (64 + 2)),
        ("int8", 128, 2 * (128 + 2)),
        # D/2 bytes of codes, and scale and zero point (4 bytes) for each 64 channels.
        ("int4", 64, 2 * (32 + 4)),
        ("int4", 128, 2 * (64 + 8)),
        # V: D/2 or D/4 bytes of codes, 4 bytes for each 32 channels. K: as many, 4 bytes for a channel and 32 tokens.
        ("kivi4", 128, 2 * (64 + 16)),
        ("kivi2", 64, 2 * (16 + 8)),
        ("kivi2", 128, 2 * (32 + 16)),
        ("k4v2", 64, 32 + 8 + 16 + 4),
        ("k4v2", 128, 64 + 16 + 32 + 8),
        # K in 8 bits with one scale, which fills up to the word of the next; V in 4 bits with a word for 64 channels.
        ("k8v4", 64, 64 + 32 + 4 + 4),
        ("k8v4", 128, 128 + 64 + 4 + 8),
    ],
)
def test_bytes_by_hand(name: str, head_size: int, bytes_per_token: int) -> None:
    """Codes and scales and nothing else: a page has no room in which more could be kept."""
    layout = PageLayout(head_size=head_size, block_size=128, dtype=torch.bfloat16, format=name)
    assert layout.bytes_per_token == bytes_per_token
    assert sum(part.nbytes for part in layout.parts.values()) == 128 * bytes_per_token == layout.page_bytes


def test_two_bits_lose_noise() -> None:
    """Four levels survive 2 bits, what lies between them does not: the page does not remember more than it says."""
    layout = PageLayout(head_size=64, block_size=64, dtype=torch.float32, format="kivi2")
    levels = (torch.arange(64)[:, None] + torch.arange(64)) % 4
    keys, _ = decode_page(page_of(layout, levels.float(), levels.float()), 0, 0)
    torch.testing.assert_close(keys, levels.float())
    noise = 0.2 * torch.rand(64, 64, generator=torch.Generator().manual_seed(3)) * (levels % 3 > 0)
    noisy_keys, noisy_values = decode_page(page_of(layout, levels + noise, levels + noise), 0, 0)
    for got in (noisy_keys, noisy_values):
        torch.testing.assert_close(got, levels.float())


@pytest.mark.parametrize("name", QUANTIZED)
def test_each_format_keeps_what_its_bits_can(name: str) -> None:
    """Decoded values take at most 2^bits levels in a group, and codes use the whole range."""
    layout = PageLayout(head_size=64, block_size=128, dtype=torch.bfloat16, format=name)
    pages = page_of(layout, *tokens(layout))
    keys, _ = decode_page(pages, 0, 0)
    groups = (keys.T if layout.channel_keys else keys).unflatten(-1, (-1, layout.group("key"))).flatten(0, 1)
    assert max(len(group.unique()) for group in groups) <= 2 ** layout.coding("key").bits
    bits = layout.coding("value").bits
    codes = unpack(pages.value_codes[0, 0], bits)
    codes = codes.view(torch.int8) if name == "int8" else codes
    assert codes.max() == (127 if name == "int8" else 2**bits - 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("constant", [0.0, -0.0, 0.3, -7.77, 3e4, 1e-7])
def test_constant_groups_are_exact(name: str, dtype: torch.dtype, constant: float) -> None:
    layout = PageLayout(head_size=64, block_size=64, dtype=dtype, format=name)
    same = torch.full((64, 64), constant).to(dtype)
    for got in decode_page(page_of(layout, same, same), 0, 0):
        torch.testing.assert_close(got, same.float(), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_bad_element_makes_its_group_nan_and_no_other(name: str, bad: float) -> None:
    layout = PageLayout(head_size=64, block_size=64, dtype=torch.bfloat16, format=name)
    keys, values = tokens(layout)
    clean = decode_page(page_of(layout, keys, values), 0, 0)
    keys[5, 40], values[6, 41] = bad, bad
    for part, got, want, row, channel, by_channel in (
        ("key", decode_page(page_of(layout, keys, values), 0, 0)[0], clean[0], 5, 40, layout.channel_keys),
        ("value", decode_page(page_of(layout, keys, values), 0, 0)[1], clean[1], 6, 41, False),
    ):
        group = layout.group(part)
        inside = torch.zeros(64, 64, dtype=torch.bool)
        if by_channel:
            inside[row // group * group :][:group, channel] = True
        else:
            inside[row, channel // group * group :][:group] = True
        assert got[inside].isnan().all()
        torch.testing.assert_close(got[~inside], want[~inside], rtol=0, atol=0)


@pytest.mark.parametrize("name", QUANTIZED)
def test_ranges_at_the_edge_of_the_type(name: str) -> None:
    """The widest range that the type holds reads back; one beyond it reads as NaN, never as a wrong number."""
    fmt = FORMATS[name]
    assert fmt is not None
    for dtype, coding in itertools.product(DTYPES, (fmt.key, fmt.value)):
        largest = torch.finfo(dtype).max
        row = torch.tensor([[-largest / 4, largest / 4] * 32], dtype=dtype)
        _, scales = quantize(row, coding, 64)
        assert scales.isfinite().all()
        tiny = torch.tensor([[0.0, torch.finfo(dtype).smallest_normal] * 32], dtype=dtype)
        codes, scales = quantize(tiny, coding, 64)
        assert scales.isfinite().all()
        assert codes[0, 1] > 0
    for coding in (fmt.key, fmt.value):
        _, scales = quantize(torch.tensor([[-3e38, 3e38] * 32]), coding, 64)
        assert bool(scales.isnan().any()) == (coding.scale_numbers == 2)


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 60000, width=32))
def test_not_below_is_the_next_number_up(x: float) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        found = not_below(torch.tensor([x]), dtype)
        assert found >= x
        below = torch.nextafter(found.to(dtype), torch.tensor([-torch.inf], dtype=dtype))
        assert below.float() < x or x == 0


def test_bad_groups_are_refused() -> None:
    def make(**options: Any) -> PageLayout:
        return Case(**{"block_size": 64, **options}).layout

    with pytest.raises(ValueError, match=r"group_size=48 does not fit head size 64: .* multiple of 8 .* leave it out"):
        make(format="int4", group_size=48)
    with pytest.raises(ValueError, match=r"group_size=12 does not fit"):
        make(format="kivi4", group_size=12)
    with pytest.raises(ValueError, match=r"block size 16 does not hold whole groups of 32 tokens.*--block-size 128"):
        make(format="kivi2", block_size=16)
    with pytest.raises(ValueError, match=r"'int8' has no groups, but group_size=64"):
        make(format="int8", group_size=64)
    with pytest.raises(ValueError, match=r"'model' has no groups"):
        make(group_size=64)
    with pytest.raises(ValueError, match=re.escape(f"format 'int3' is not one of {[*FORMATS]}")):
        make(format="int3")
