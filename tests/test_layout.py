"""`layout`: every byte of a page has one owner, and there are as many as the documents say."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparq.attention_backends.shared_pages import pages_of
from vllm_sparq.layout import ALIGNMENT, PageLayout, Pages

HEAD_SIZES = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
BLOCK_SIZES = (16, 32, 48, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANKINGS = (None, "int4", "int8", "model", "bounds", "representatives")

layouts = st.builds(
    PageLayout,
    head_size=st.sampled_from(HEAD_SIZES),
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from(DTYPES),
    ranking=st.sampled_from(RANKINGS),
    value_sum=st.booleans(),
)


def bytes_of_parts(layout: PageLayout) -> int:
    """What the parts hold, from the sizes alone."""
    n, d = layout.block_size, layout.head_size
    size = layout.dtype.itemsize
    per_code = {None: 0, "int4": 0.5, "int8": 1, "model": size}.get(layout.ranking, size / 8)
    scales = 4 * d if layout.ranking in ("int4", "int8") else 0
    return int(2 * n * d * layout.dtype.itemsize + n * d * per_code + scales + 4 * d * layout.value_sum)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_byte_has_one_owner(head_size: int, block_size: int) -> None:
    for dtype, ranking, value_sum in itertools.product(DTYPES, RANKINGS, (False, True)):
        layout = PageLayout(
            head_size=head_size, block_size=block_size, dtype=dtype, ranking=ranking, value_sum=value_sum
        )
        check_owners(layout)


def check_owners(layout: PageLayout) -> None:
    """Add one through each byte of each view: every byte of a part is one then, and the rest, padding, is zero."""
    pages = Pages(torch.zeros(2, 3, layout.page_bytes, dtype=torch.uint8), layout)
    views = [pages.keys, pages.values]
    if layout.ranking is not None:
        views.append(pages.ranking)
    if layout.ranking in ("int4", "int8"):
        views.append(pages.scales)
    if layout.value_sum:
        views.append(pages.value_sum)
    for view in views:
        view.view(torch.uint8).add_(1)
    owned = torch.zeros(layout.page_bytes, dtype=torch.uint8)
    for part in layout.parts.values():
        owned[part.offset : part.offset + part.nbytes] += 1
    assert int(owned.max()) == 1, layout  # no byte is in two parts
    assert pages.data.eq(owned).all(), layout
    assert int(owned.sum()) == bytes_of_parts(layout), layout
    assert not owned[bytes_of_parts(layout) + ALIGNMENT * len(layout.parts) :].any(), layout


@settings(max_examples=300, deadline=None)
@given(layouts)
def test_alignment_and_padding(layout: PageLayout) -> None:
    for part in layout.parts.values():
        assert part.offset % ALIGNMENT == 0
    assert layout.page_bytes % ALIGNMENT == 0
    assert layout.page_bytes == layout.bytes_per_token * layout.block_size
    padding = layout.page_bytes - bytes_of_parts(layout)
    assert 0 <= padding < (len(layout.parts) - 1) * ALIGNMENT + max(ALIGNMENT, 3 * layout.block_size)
    assert next(iter(layout.parts)) == "records"
    assert hash(layout) == hash(dataclasses.replace(layout))


def test_bytes_by_hand() -> None:
    # D = 128, N = 128, bf16, int4, value sums. Records: 128 * 2 * 128 * 2 = 65536 bytes. Codes: 128 * 128 / 2 = 8192.
    # Ranges: 128 * 2 * 2 = 512. Value sum: 128 * 4 = 512. Together 74752 = 128 * 584, whole cache lines throughout.
    layout = PageLayout(head_size=128, block_size=128, dtype=torch.bfloat16, ranking="int4", value_sum=True)
    assert {p.name: (p.offset, p.nbytes) for p in layout.parts.values()} == {
        "records": (0, 65536),
        "ranking": (65536, 8192),
        "scales": (73728, 512),
        "value_sum": (74240, 512),
    }
    assert layout.page_bytes == 74752
    assert layout.bytes_per_token == 584
    assert layout.overhead == pytest.approx(584 / 512 - 1)
    assert {p.name: p.shape for p in layout.parts.values()} == {
        "records": (128, 2, 128),
        "ranking": (128, 64),
        "scales": (128, 2),
        "value_sum": (128,),
    }


def test_padding_by_hand() -> None:
    # D = 80, N = 48, fp16, int4, value sums. Records 48 * 2 * 80 * 2 = 15360 = 240 * 64. Codes 80 * 24 = 1920.
    # Ranges 320 = 5 * 64. Value sum 320: ends at 17920. The least common multiple of 64 and 48 is 192, and 17920 / 192
    # is 93.3, so 94 * 192 = 18048 bytes: 376 a token.
    layout = PageLayout(head_size=80, block_size=48, dtype=torch.float16, ranking="int4", value_sum=True)
    assert (layout.page_bytes, layout.bytes_per_token) == (18048, 376)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_memory_promise(head_size: int) -> None:
    """With the mean value: about 14% beyond a dense cache at blocks of 128 tokens, 27% and 51% for larger copies."""
    promised = {"int4": 0.15, "int8": 0.28, "model": 0.52}
    for ranking, most in promised.items():
        layout = PageLayout(head_size=head_size, block_size=128, dtype=torch.bfloat16, ranking=ranking, value_sum=True)
        assert 0.125 < layout.overhead <= most
    assert PageLayout(head_size=head_size, block_size=128, dtype=torch.bfloat16).overhead == 0
    assert PageLayout(head_size=head_size, block_size=128, dtype=torch.bfloat16, ranking="bounds").overhead == 1 / 16


@pytest.mark.parametrize("fmt", ["model", "int4", "kivi2"])
def test_bounds_of_spans(fmt: str) -> None:
    """[N/16, 2, D] in the model's type, whatever the format; and they rank no tokens for SparQ."""
    layout = PageLayout(head_size=64, block_size=32, dtype=torch.float16, ranking="bounds", format=fmt)
    assert Pages.empty(3, 2, layout).ranking.shape == (3, 2, 2, 2, 64)
    assert Pages.empty(1, 1, layout).ranking.dtype == torch.float16
    assert layout.ranks_tokens == layout.channel_keys
    assert "scales" not in layout.parts


@pytest.mark.parametrize("size", [0, -16, 1, 8, 17, 24, 100])
def test_refused_block_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=rf"block size {size} .* multiple of 16 tokens.*--block-size 128"):
        PageLayout(head_size=64, block_size=size, dtype=torch.bfloat16)


@pytest.mark.parametrize("size", [0, -64, 8, 72, 100])
def test_refused_head_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=rf"head size {size} is not supported.*multiple of 16"):
        PageLayout(head_size=size, block_size=16, dtype=torch.bfloat16)


def test_refused_ranking() -> None:
    known = r"\['model', 'bounds', 'representatives', 'int4', 'int8'\]"
    with pytest.raises(ValueError, match=f"'int2' is not one of {known}"):
        PageLayout(head_size=64, block_size=16, dtype=torch.bfloat16, ranking="int2")


def test_layout_is_frozen() -> None:
    layout = PageLayout(head_size=64, block_size=16, dtype=torch.bfloat16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.head_size = 128  # type: ignore[misc]
    with pytest.raises(TypeError):
        PageLayout(64, 16, torch.bfloat16)  # type: ignore[misc]


LAYOUT = PageLayout(head_size=64, block_size=16, dtype=torch.bfloat16, ranking="int4", value_sum=True)


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(2, 1, LAYOUT.page_bytes, dtype=torch.int8),
        torch.zeros(2, LAYOUT.page_bytes, dtype=torch.uint8),
        torch.zeros(2, 1, LAYOUT.page_bytes + 64, dtype=torch.uint8),
        torch.zeros(2, 1, 2 * LAYOUT.page_bytes, dtype=torch.uint8)[..., ::2],
    ],
    ids=["dtype", "dimensions", "size", "stride"],
)
def test_refused_pages(data: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=rf"uint8 \[P, G, {LAYOUT.page_bytes}\] with contiguous pages, got") as error:
        Pages(data, LAYOUT)
    assert f"{data.dtype} {tuple(data.shape)} with strides {data.stride()}" in str(error.value)


def test_parts_that_a_layout_lacks() -> None:
    pages = Pages.empty(1, 1, PageLayout(head_size=64, block_size=16, dtype=torch.bfloat16))
    for name in ("ranking", "scales", "value_sum"):
        with pytest.raises(KeyError, match=name):
            getattr(pages, name)


@pytest.mark.parametrize("heads_first", [False, True])
def test_pages_of_the_engine(heads_first: bool) -> None:
    """The tensor vLLM allocates is seen, not copied; and pages may be cut from any strides that keep them whole."""
    shape = (5, 3, LAYOUT.block_size, LAYOUT.bytes_per_token)
    cache = torch.zeros(shape, dtype=torch.uint8)
    if heads_first:
        cache = torch.zeros(shape[1], shape[0], *shape[2:], dtype=torch.uint8).transpose(0, 1)
    pages = pages_of(cache, LAYOUT)
    assert pages.data.shape == (5, 3, LAYOUT.page_bytes)
    assert pages.data.data_ptr() == cache.data_ptr()
    pages.keys[4, 2, 15] = 1.0
    pages.value_sum[1, 0] = 2.0
    flat = cache.flatten(2)
    assert flat[4, 2, 15 * 256 : 15 * 256 + 128].view(torch.bfloat16).eq(1).all()
    assert flat.count_nonzero() == pages.data.count_nonzero() == 64 * 2 + 64  # bf16 1.0 is 3F80, fp32 2.0 is 40000000


def test_what_is_padded_behind_the_heads_is_theirs() -> None:
    """Pages of two heads with 7,680 bytes of kivi2 each, 16,384 bytes apart: staged tokens use what is left."""
    layout = PageLayout(head_size=64, block_size=160, dtype=torch.bfloat16, format="kivi2")
    roomy = dataclasses.replace(layout, room=8192)
    assert (layout.page_bytes, layout.staged_per_page, layout.n_staging_blocks) == (7680, 30, 6)
    assert (roomy.page_bytes, roomy.staged_per_page, roomy.n_staging_blocks) == (8192, 32, 5)
    assert (roomy.bytes_per_token, roomy.parts) == (layout.bytes_per_token, layout.parts)
    memory = torch.zeros(5 * 16384, dtype=torch.uint8)
    cache = memory.as_strided((5, 2, 160, 48), (16384, 7680, 48, 1))  # as vLLM pads it
    pages = pages_of(cache, roomy)
    pages.staged[:] = 1.0
    assert memory.view(torch.bfloat16).eq(1).all()
    with pytest.raises(ValueError, match="pages lie 15360 bytes apart, which has no room for 2 of 8192 bytes"):
        pages_of(torch.zeros(5, 2, 160, 48, dtype=torch.uint8), roomy)


def test_views() -> None:
    pages = Pages.empty(2, 3, LAYOUT)
    assert pages.keys.shape == pages.values.shape == (2, 3, 16, 64)
    assert pages.ranking.shape == (2, 3, 64, 8)
    assert pages.scales.shape == (2, 3, 64, 2)
    assert pages.value_sum.shape == (2, 3, 64)
    assert [v.dtype for v in (pages.keys, pages.ranking, pages.scales, pages.value_sum)] == [
        torch.bfloat16,
        torch.uint8,
        torch.float16,
        torch.float32,
    ]
    assert pages.values.data_ptr() - pages.keys.data_ptr() == 128  # a K row, then its V row
    assert pages.keys.stride()[2] == 128  # one token is one run of 2 D elements
