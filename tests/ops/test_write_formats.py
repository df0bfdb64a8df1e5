"""`write` on quantized pages: every byte that the contract defines, however the tokens arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import ALL, HUGE_BYTE, KERNELS, UNUSED, Case, Tokens, World, build, each, load, write_in_chunks
from tests.ops.cases import device_of as device
from tests.ops.shapes import FORMATS, TINY_FORMATS
from vllm_sparq.formats import QUANTIZED as QUANTIZED_FORMATS
from vllm_sparq.layout import Pages
from vllm_sparq.ops.codec import decode_page
from vllm_sparq.ops.write.reference import write as reference

NAMES = {True: ("key_codes", "key_scales", "value_codes", "value_scales"), False: ("records",)}
"""Parts of a full block, by whether K is channel-major."""


def defined(world: World) -> torch.Tensor:
    """bool, like the buffer: what the contract says something of. All but the pages of requests, and of those the parts
    of full blocks, the sums of blocks that have begun and the staged tokens of each newest block."""
    layout, n = world.case.layout, world.case.block_size
    mask = torch.ones_like(world.buffer, dtype=torch.bool, device="cpu")
    pages = Pages(mask.view(torch.uint8).as_strided(world.pages.data.shape, world.pages.data.stride(), 128), layout)
    owned = world.block_table[world.block_table != UNUSED].long().cpu()
    pages.data[owned] = 0

    def allow(page: int, name: str) -> None:
        if name == "records":  # what fills a record up to a whole word is nobody's
            _, key_scales, value_scales, _ = layout.record_parts
            records = pages.part("records")[page]
            for first, start, side in ((0, key_scales, "key"), (value_scales, value_scales, "value")):
                n_numbers = layout.head_size // layout.group(side) * layout.coding(side).scale_numbers
                records[..., first : start + n_numbers * layout.dtype.itemsize] = 1
        elif name in layout.parts:
            part = layout.parts[name]
            pages.data[page, :, part.offset : part.offset + part.nbytes] = 1

    for blocks, s in zip(world.block_table.tolist(), world.case.lens, strict=False):
        for block in range(-(-s // n)):
            allow(blocks[block], "value_sum")
            for name in (*NAMES[layout.channel_keys], "ranking", "scales") if (block + 1) * n <= s else ():
                allow(blocks[block], name)
        for position in range((s - 1) // n * n, s):
            ahead, place = layout.staged_at(position % n)
            start = place * layout.record_bytes
            pages.data[blocks[position // n + 1 + ahead], :, start : start + layout.record_bytes] = 1
    return mask


def normal_form(world: World, mask: torch.Tensor) -> torch.Tensor:
    """The buffer with undefined bytes zero, and one zero and one NaN in scales, whose kinds may differ."""
    copy = torch.where(mask, world.buffer.cpu(), 0)
    pages = Pages(copy.as_strided(world.pages.data.shape, world.pages.data.stride(), 128), world.case.layout)
    n = world.case.block_size
    for blocks, s in zip(world.block_table.tolist(), world.case.lens, strict=False):
        for page in blocks[: s // n]:
            ranking = [pages.scales] if "scales" in world.case.layout.parts else []
            for scales in (pages.key_scales, pages.value_scales, *ranking):
                x = scales[page]
                scales[page] = torch.where(x.isnan(), torch.nan, torch.where(x == 0, 0.0, x))
    return copy


def assert_same(got: World, want: World) -> None:
    """All that is defined, poison of other pages included. Value sums may differ in the order of their terms."""
    case, n = got.case, got.case.block_size
    for blocks, s in zip(got.block_table.tolist(), case.lens, strict=False) if case.value_sum else ():
        for head in range(case.kv_heads):
            absolute = torch.zeros(case.head_size)
            for block in range(-(-s // n)):
                ours, theirs = (world.pages.value_sum[blocks[block], head] for world in (got, want))
                bound = tolerances.value_sum(block * n, absolute)
                same = (ours.cpu() - theirs).abs() <= bound
                both_nan = ours.cpu().isnan() & theirs.isnan()
                assert (same | both_nan).all(), f"value_sum of block {block}, head {head}"
                ours.copy_(theirs)
                if (block + 1) * n <= s:
                    absolute += decode_page(want.pages, blocks[block], head)[1].abs().sum(0)
    mask = defined(got)
    wrong = (normal_form(got, mask) != normal_form(want, mask)).nonzero().flatten()
    assert wrong.numel() == 0, f"{wrong.numel()} bytes differ, first: {where(got, int(wrong[0]))}"


def where(world: World, byte: int) -> str:
    """A byte of the buffer in words."""
    page, rest = divmod(byte - 128, world.pages.data.stride(0))
    head, offset = divmod(rest, world.pages.data.stride(1))
    at = (world.block_table == page).nonzero().tolist()
    owner = f"block {at[0][1]} of request {at[0][0]}" if at else "nobody's"
    names = [p.name for p in world.case.layout.parts.values() if p.offset <= offset < p.offset + p.nbytes]
    return f"page {page} ({owner}) head {head} byte {offset} ({', '.join(names)} or staged tokens)"


def steps(case: Case) -> list[Case]:
    """Decode; prompts; and chunks that end within, at, and blocks after the one that was open."""
    n = case.block_size
    sizes = (n, 3, 2 * n + 1, n - 1, 10**9)
    chunks = tuple(min(s, sizes[b % len(sizes)]) for b, s in enumerate(case.lens))
    return [replace(case, new=new) for new in (tuple(min(s, 1) for s in case.lens), case.lens, chunks)]


WRITTEN = tuple(step for case in FORMATS for step in steps(case))
TINY = tuple(replace(case, lens=(33, 49, 97), new=(33, 1, 60)) for case in TINY_FORMATS)


@pytest.mark.parametrize(("implementation", "case"), each(WRITTEN, tiny=TINY, implementations=KERNELS))
def test_quantized_pages_are_those_of_the_reference(implementation: str, case: Case) -> None:
    got = build(case, written="context", device=device(implementation))
    want = build(case, written="context")
    got.write(load("write", implementation))
    want.write(reference)
    assert_same(got, want)


def long(case: Case) -> Case:
    n = case.block_size
    return replace(case, lens=(5 * n + 7, 4 * n), new=(4 * n, 3 * n + 1))


LONG = tuple(long(case) for case in FORMATS if case.value_sum)


@pytest.mark.parametrize(("implementation", "case"), each(LONG, tiny=TINY[:1], implementations=KERNELS))
@pytest.mark.parametrize("shuffle", [1, 2])
def test_long_steps_are_those_of_the_reference(implementation: str, case: Case, shuffle: int) -> None:
    """Several blocks fill at once, over several threads, in other permutations and over another poison."""
    got = build(case, written="context", device=device(implementation), shuffle=shuffle, poison=HUGE_BYTE)
    want = build(case, written="context", shuffle=shuffle, poison=HUGE_BYTE)
    got.write(load("write", implementation))
    want.write(reference)
    assert_same(got, want)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("shuffle", range(8))
def test_staged_tokens_are_read_before_their_pages_are_written(implementation: str, shuffle: int) -> None:
    """The next block is staged in pages that the begun one is still staged in, and another thread may be at it."""
    shape = Case(format="kivi2", heads=1, kv_heads=1, head_size=128, block_size=128, ranking=None, value_sum=False)
    case = replace(shape, dtype=torch.bfloat16, lens=(228,) * 12, new=(108,) * 12)
    assert case.layout.n_staging_blocks > 1
    got = build(case, written="context", device=device(implementation), shuffle=shuffle)
    want = build(case, written="context", shuffle=shuffle)
    got.write(load("write", implementation))
    want.write(reference)
    assert_same(got, want)


def hostile_rows(n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Rows of n elements that break careless quantizers."""
    big, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    ramp = torch.arange(n, dtype=torch.float64)
    rows = [
        torch.zeros(n),
        torch.full((n,), -0.0),
        torch.where(ramp % 2 == 0, 0.0, -0.0),
        torch.full((n,), 3.1415926),
        torch.full((n,), -3.1415926),
        torch.where(ramp == 1, torch.nan, ramp),
        torch.where(ramp == n - 1, torch.inf, ramp),
        torch.where(ramp == 0, -torch.inf, ramp),
        torch.full((n,), torch.nan),
        torch.full((n,), torch.inf),
        torch.where(ramp % 2 == 0, big, -big),  # in fp32 and bf16 the range is beyond the type
        torch.where(ramp % 2 == 0, big, 0.0),
        torch.full((n,), big),
        torch.full((n,), -big),
        tiny / 8 * ramp,  # denormal elements and steps
        -tiny / 64 * (ramp % 2),
        torch.where(ramp == 3, tiny / 128, 0.0),
        ramp % 16,  # exact codes
        (ramp % 7) / 2,  # halves, to be rounded to even
        (ramp % 31) / 2 - 7.5,
        (ramp % 255) / 2 - 63.5,
        1000 + ramp % 3,
        1 + 2.0**-7 * (ramp % 2),  # neighbours in bf16
        -100 + 1e-3 * ramp,
    ]
    return [row.to(dtype) for row in rows]


def hostile(case: Case) -> Tokens:
    """K and V with such rows as tokens (head 0) and as channels (head 1)."""
    tokens = case.tokens()
    for x in (*tokens.key, *tokens.value):
        for i, row in enumerate(hostile_rows(case.head_size, case.dtype)):
            x[2 * i + 1 : 2 * i + 2, 0] = row
        for i, row in enumerate(hostile_rows(len(x), case.dtype)):
            x[:, 1, 2 * i + 1] = row
    return tokens


_HOSTILE = Case(block_size=64, lens=(130,), new=(100,), ranking=None, value_sum=False)
HOSTILE = tuple(
    replace(_HOSTILE, dtype=dtype, **options)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for options in (
        {"format": "int8"},
        {"format": "int4", "group_size": 16, "ranking": "int4"},
        {"format": "kivi4", "group_size": 16},
        {"format": "kivi2", "group_size": 32},
    )
)


@pytest.mark.parametrize(
    ("implementation", "case"), each(HOSTILE, tiny=HOSTILE[3:12:4] + HOSTILE[4:6], implementations=KERNELS)
)
def test_hostile_groups_are_those_of_the_reference(implementation: str, case: Case) -> None:
    tokens = hostile(case)
    got = build(case, tokens, written="context", device=device(implementation))
    want = build(case, tokens, written="context")
    got.write(load("write", implementation))
    want.write(reference)
    assert_same(got, want)
    scales = want.pages.key_scales[want.block_table[0, :2].long()]
    assert scales.isnan().any()
    assert scales.isfinite().any()


_CHUNKED = Case(lens=(129, 32, 80, 0), block_size=32, dtype=torch.bfloat16, heads=1, kv_heads=1, head_size=32)
CHUNKED = (
    *(replace(_CHUNKED, format=fmt) for fmt in ("int8", "int4")),
    *(replace(_CHUNKED, format=fmt, ranking=None) for fmt in ("kivi4", "kivi2")),
)
CUTS = [list(range(1, 129)), [31, 32, 33], [1, 63, 65, 96], [32, 64], [17, 100]]


IN_CHUNKS = [(case, cuts) for case in CHUNKED for cuts in CUTS]


@pytest.mark.parametrize(
    ("implementation", "case_and_cuts"), each(IN_CHUNKS, tiny=[(CHUNKED[1], CUTS[1]), (CHUNKED[2], CUTS[2])])
)
def test_chunks_are_the_whole(implementation: str, case_and_cuts: tuple[Case, list[int]]) -> None:
    """Codes, scales, value sums and staged tokens do not depend on the steps that a request came in."""
    case, cuts = case_and_cuts
    tokens, run, on = case.tokens(), load("write", implementation), device(implementation)
    whole, parts = (write_in_chunks(case, tokens, run, c, on) for c in ([], cuts))
    mask = defined(whole)
    assert mask.any()
    assert parts.buffer.cpu()[mask].equal(whole.buffer.cpu()[mask])


@pytest.mark.parametrize(("implementation", "fmt"), each(QUANTIZED_FORMATS, tiny=["int8", "kivi2"]))
def test_staging_stays_within_the_contract(implementation: str, fmt: str) -> None:
    """Full blocks of the context, and pages of requests that bring nothing, keep every byte; over noise."""
    case = Case(format=fmt, lens=(90, 64, 40), new=(3, 0, 0), block_size=32, dtype=torch.float16, ranking=None)
    world = build(case, written="context", device=device(implementation))
    before = world.buffer.clone()
    world.write(load("write", implementation))
    changed = (world.buffer != before).as_strided(world.pages.data.shape, world.pages.data.stride(), 128).cpu()
    begun, n_staging = 2, case.layout.n_staging_blocks
    staging = world.block_table[0, begun + 1 : begun + 1 + n_staging].long().cpu()
    places = [case.layout.staged_at(slot) for slot in (87 % 32, 88 % 32, 89 % 32)]
    for ahead, place in places:
        start = place * case.layout.record_bytes
        window = changed[staging[ahead], :, start : start + case.layout.record_bytes]
        assert window.any(-1).all()
        window.zero_()
    assert not changed.any()


@pytest.mark.parametrize("implementation", ALL)
def test_no_tokens_change_nothing_at_all(implementation: str) -> None:
    case = Case(format="int4", lens=(20, 32, 5, 0, 70), new=(0,) * 5, block_size=32)
    world = build(case, written="context", device=device(implementation))
    before = world.buffer.clone()
    world.write(load("write", implementation))
    assert world.buffer.equal(before)
