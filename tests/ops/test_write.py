"""`write`: every byte of every page, against the reference and against what the contract says of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import ALL, KERNELS, NAN_BYTE, Case, Tokens, World, build, each, int32, load, write_in_chunks
from tests.ops.cases import device_of as device
from tests.ops.shapes import SHAPES, TINY
from vllm_sparq.layout import RANKING_BITS, Pages
from vllm_sparq.ops.write.reference import write as reference

APPENDED = (
    Case(lens=(1, 15, 16, 17, 40, 3), new=(1, 15, 16, 1, 33, 0)),
    Case(lens=(48, 32, 33), new=(17, 1, 2), dtype=torch.bfloat16, ranking="int8", head_size=80),
    Case(lens=(64, 31), new=(64, 1), dtype=torch.float16, block_size=32, ranking="model", heads=1, kv_heads=1),
    Case(lens=(40, 16), new=(40, 1), dtype=torch.bfloat16, ranking=None),
    Case(lens=(40, 16), new=(40, 1), dtype=torch.bfloat16, ranking=None, value_sum=False),
    Case(lens=(40, 17), new=(30, 17), dtype=torch.float16, ranking="int4", value_sum=False, head_size=96),
)


def prefilled(case: Case) -> Case:
    """The same batch with a prompt as its step: all of the first request, the last tokens of the others."""
    return replace(case, new=tuple(s if b == 0 else min(s, b * 7) for b, s in enumerate(case.lens)))


MORE = tuple(prefilled(case) for case in SHAPES)


def assert_same_bytes(got: World, want: World, tokens: Tokens) -> None:
    """Whole buffers, poison included. Zeros of scales and bounds may differ in sign, value sums in their order."""
    got_bytes, want_bytes = got.buffer.cpu().clone(), want.buffer.cpu().clone()
    got_pages, want_pages = (
        Pages(b.as_strided(got.pages.data.shape, got.pages.data.stride(), 128), got.case.layout)
        for b in (got_bytes, want_bytes)
    )
    if "scales" in got.case.layout.parts:
        for pages in (got_pages, want_pages):
            pages.scales[pages.scales == 0] = 0.0
    if got.case.ranking == "bounds":
        for pages in (got_pages, want_pages):
            pages.ranking[pages.ranking == 0] = 0.0
    if got.case.value_sum:
        n = got.case.block_size
        for b, (value, s) in enumerate(zip(tokens.value, got.case.lens, strict=True)):
            for block in range(-(-s // n)):
                page = int(got.block_table[b, block])
                before = value[: block * n].float()
                bound = tolerances.value_sum(block * n, before.abs().sum(0))
                ours, theirs = got_pages.value_sum[page], want_pages.value_sum[page]
                same = (ours.view(torch.int32) == theirs.view(torch.int32)) | (ours.isnan() & theirs.isnan())
                # A page that is not open yet keeps its poison, so a NaN must meet a NaN.
                assert (same | ((ours - theirs).abs() <= bound)).all(), f"value_sum of block {block} of request {b}"
                got_pages.value_sum[page] = want_pages.value_sum[page]
    wrong = (got_bytes != want_bytes).nonzero().flatten()
    assert wrong.numel() == 0, f"{wrong.numel()} bytes differ, first: {where(got, int(wrong[0]))}"


def where(world: World, byte: int) -> str:
    """A byte of the buffer in words."""
    page_stride, head_stride, _ = world.pages.data.stride()
    page, rest = divmod(byte - 128, page_stride)
    head, offset = divmod(rest, head_stride)
    names = [p.name for p in world.case.layout.parts.values() if p.offset <= offset < p.offset + p.nbytes]
    return f"page {page} head {head} byte {offset} ({names[0] if names else 'nobody owns it'})"


FEW = (*APPENDED[:3], prefilled(TINY[3]))


@pytest.mark.parametrize(("implementation", "case"), each((*APPENDED, *MORE), tiny=FEW, implementations=KERNELS))
def test_write_leaves_the_same_bytes_as_the_reference(implementation: str, case: Case) -> None:
    run, tokens = load("write", implementation), case.tokens()
    got = build(case, tokens, written="context", device=device(implementation))
    want = build(case, tokens, written="context")
    got.write(run)
    want.write(reference)
    assert_same_bytes(got, want, tokens)


def hostile(case: Case) -> Tokens:
    """Keys that break careless quantizers, one kind per channel."""
    tokens = case.tokens()
    big = min(torch.finfo(case.dtype).max, 1e38)
    for key in tokens.key:
        s = len(key)
        ramp = torch.arange(s, dtype=torch.float32)
        kinds = [
            torch.zeros(s),
            torch.full((s,), -0.0),
            torch.full((s,), 3.1415926),  # constant, no fp16
            torch.full((s,), -1e-3),
            torch.where(ramp % 5 == 2, torch.inf, ramp),
            torch.where(ramp % 5 == 2, -torch.inf, -ramp),
            torch.where(ramp % 7 == 0, torch.nan, 1 + ramp / 64),
            torch.full((s,), torch.nan),
            torch.full((s,), torch.inf),
            torch.where(ramp % 2 == 0, big, -big),  # beyond fp16 both ways, the range beyond fp32
            torch.where(ramp % 2 == 0, big, 0.5),
            torch.where(ramp % 2 == 0, -big, 0.5),
            torch.full((s,), big),
            torch.full((s,), -big),
            60000 + 16 * ramp,  # crosses the largest fp16
            1e-7 * ramp,  # steps below the smallest normal fp16
            1e-9 * ramp,  # steps below the smallest fp16
            1 + 2**-9 * (ramp % 2),  # one step apart
            ramp % 16,  # exact codes
            ramp % 16 - 7.5,  # zero and every half exact
            (ramp % 31) / 2,  # rounding half to even
            1000.7 + ramp % 3,  # zero rounds down by far more than a step
        ]
        key[:] = key.float().roll(1, 0).to(case.dtype)
        for c, kind in enumerate(kinds):
            key[:, 0, c] = kind.to(case.dtype)
    for value in tokens.value:
        for token, channel, bad in [(5, 0, torch.nan), (3, 1, torch.inf), (4, 2, torch.inf), (6, 2, -torch.inf)]:
            value[token : token + 1, 0, channel] = bad
    return tokens


HOSTILE = (
    *(
        Case(lens=(16, 40), new=(16, 40), dtype=dtype, ranking=ranking, heads=2)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for ranking in ("int4", "int8")
    ),
    Case(lens=(130,), new=(130,), dtype=torch.bfloat16, block_size=128),
    Case(lens=(32,), new=(32,), ranking="model"),
)


@pytest.mark.parametrize(("implementation", "case"), each(HOSTILE, tiny=HOSTILE[:6:2], implementations=KERNELS))
def test_hostile_channels_leave_the_same_bytes_as_the_reference(implementation: str, case: Case) -> None:
    run, tokens = load("write", implementation), hostile(case)
    got = build(case, tokens, written="context", device=device(implementation))
    want = build(case, tokens, written="context")
    got.write(run)
    want.write(reference)
    assert_same_bytes(got, want, tokens)


def codes_of(pages: Pages, page: int, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [D, N], scale and zero point [D, 1] of a page in float64, unpacked anew."""
    packed = pages.ranking[page, head].cpu().numpy()
    if pages.layout.ranking == "int4":
        packed = np.concatenate([packed % 16, packed // 16], axis=1)
    step, zero = pages.scales[page, head].cpu().double().numpy().T[:, :, None]
    return packed.astype(np.float64), step, zero


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("ranking", ["int4", "int8"])
@pytest.mark.parametrize("kind", ["random", "hostile"])
def test_codes_are_within_half_a_step(implementation: str, ranking: str, kind: str) -> None:
    case = Case(lens=(33,), new=(33,), ranking=ranking, dtype=torch.bfloat16)
    tokens = case.tokens() if kind == "random" else hostile(case)
    world = build(case, tokens, written="context", device=device(implementation))
    world.write(load("write", implementation))
    top, fp16_max = 2 ** RANKING_BITS[ranking] - 1, 65504.0
    for block, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        x = tokens.key[0][block * 16 : block * 16 + 16, head].double().numpy().T  # [D, N]
        x = np.where(np.isfinite(x), x, 0.0)
        codes, step, zero = codes_of(world.pages, int(world.block_table[0, block]), head)
        low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
        with np.errstate(over="ignore"):
            next_zero = np.nextafter(zero.astype(np.float16), np.float16(np.inf)).astype(np.float64)
            step_below = np.nextafter(step.astype(np.float16), np.float16(-np.inf)).astype(np.float64)
        assert ((zero <= low) | (zero == -fp16_max)).all()
        assert ((next_zero > low) | (zero == fp16_max)).all(), "zero is not the largest fp16 below"
        ideal = (high - zero) / top
        rounding = ideal * 2**-23  # the quotient is an fp32
        assert ((step >= ideal - rounding) | (step == fp16_max)).all()
        assert ((step_below < ideal + rounding) | (step == 0)).all(), "step is not the smallest fp16 above"
        fits = (np.abs(low) <= fp16_max) & (ideal <= fp16_max)
        error = np.abs(zero + step * codes - x)
        assert (error <= step / 2 * (1 + 2**-20) + np.abs(x) * 2**-23)[fits[:, 0]].all()
        assert (codes[step[:, 0] <= 0] == 0).all()  # constant, or all below what fp16 can hold
        assert fits.mean() > 0.5


@pytest.mark.parametrize("implementation", ALL)
def test_page_by_hand(implementation: str) -> None:
    # One head, 17 tokens of blocks of 16. K channel 0 is 0, 1, .. 15: zero 0, step (15 - 0) / 15 = 1, codes 0 .. 15.
    # Channel 1 is -2 but for a 5.5 at token 3: zero -2, step 7.5 / 15 = 0.5, code 15 there and 0 elsewhere.
    # Channel 2 alternates 1 and 31: zero 1, step 2; codes 0 and 15.
    # Channel 3 is 15 at token 0, 2.5 at token 9 and else 0: zero 0, step 1, and 2.5 rounds half to even: 2.
    # All others are 0: step 0, code 0.
    # V of token t is t + 1 in every channel, so the second page opens with 1 + .. + 16 = 136.
    case = Case(heads=1, kv_heads=1, head_size=16, lens=(17,), new=(17,))
    key, value = torch.zeros(17, 1, 16), torch.arange(1.0, 18.0)[:, None, None].repeat(1, 1, 16)
    key[:, 0, 0] = torch.arange(17.0)
    key[:, 0, 1] = -2.0
    key[3, 0, 1] = 5.5
    key[:, 0, 2] = torch.tensor([1.0, 31.0]).repeat(9)[:17]
    key[9, 0, 3], key[0, 0, 3] = 2.5, 15.0
    tokens = Tokens([torch.zeros(17, 1, 16)], [key], [value])
    world = build(case, tokens, written="context", device=device(implementation))
    world.write(load("write", implementation))
    first, second = world.block_table[0, :2].tolist()
    pages = world.pages
    assert pages.scales[first, 0, :5].tolist() == [[1, 0], [0.5, -2], [2, 1], [1, 0], [0, 0]]
    # Token n in the low nibble of byte n, token n + 8 in the high one.
    assert pages.ranking[first, 0, 0].tolist() == [16 * (n + 8) + n for n in range(8)]
    assert pages.ranking[first, 0, 1].tolist() == [0, 0, 0, 15, 0, 0, 0, 0]
    assert pages.ranking[first, 0, 2].tolist() == [0, 255] * 4
    assert pages.ranking[first, 0, 3].tolist() == [15, 32, 0, 0, 0, 0, 0, 0]
    assert not pages.ranking[first, 0, 4:].any()
    assert (pages.value_sum[first] == 0).all()
    assert (pages.value_sum[second] == 136).all()
    assert pages.keys[first, 0].cpu().equal(key[:16, 0])
    assert pages.values[second, 0, 0].cpu().equal(value[16, 0])
    assert (pages.ranking[second] == NAN_BYTE).all()


CUTS = [list(range(1, 49)), [15, 16, 17], [1, 31, 33, 48], [16, 32], [7, 40]]


@pytest.mark.parametrize(("implementation", "cuts"), each(CUTS, tiny=CUTS[1:3]))
def test_chunks_leave_the_same_bytes_as_the_whole(implementation: str, cuts: list[int]) -> None:
    case = Case(lens=(49, 16, 33), dtype=torch.bfloat16, heads=1, kv_heads=1, head_size=32)
    tokens, run, on = case.tokens(), load("write", implementation), device(implementation)
    whole, parts = write_in_chunks(case, tokens, run, [], on), write_in_chunks(case, tokens, run, cuts, on)
    assert whole.buffer.equal(parts.buffer)


@pytest.mark.parametrize(("implementation", "case"), each([*APPENDED, prefilled(TINY[3])], tiny=FEW))
def test_only_the_bytes_of_the_contract_change(implementation: str, case: Case) -> None:
    """Over noise, so that bytes written once more, with what they should hold anyway, show too."""
    world = build(case, written="context", device=device(implementation))
    noise = torch.randint(0, 256, world.buffer.shape, dtype=torch.uint8, generator=case.generator())
    world.buffer.copy_(noise)
    before = world.buffer.clone()
    may_change = torch.zeros_like(before, dtype=torch.bool)
    pages = may_change.as_strided(world.pages.data.shape, world.pages.data.stride(), 128)
    parts, n = case.layout.parts, case.block_size

    def allow(page: int, name: str, start: int = 0, length: int | None = None) -> None:
        if name in parts:
            first = parts[name].offset + start
            pages[page, :, first : first + (parts[name].nbytes if length is None else length)] = True

    token_bytes = parts["records"].nbytes // n
    for b, (s, t) in enumerate(zip(case.lens, case.n_new, strict=True)):
        for position in range(s - t, s):
            page, slot = int(world.block_table[b, position // n]), position % n
            allow(page, "records", slot * token_bytes, token_bytes)
            if slot == 0:
                allow(page, "value_sum")
            if slot == n - 1:
                allow(page, "ranking")
                allow(page, "scales")
    world.write(load("write", implementation))
    changed = before != world.buffer
    stray = (changed & ~may_change).nonzero().flatten()
    assert stray.numel() == 0, f"{stray.numel()} stray bytes, first: {where(world, int(stray[0]))}"
    assert changed[may_change].float().mean() > 0.9


@pytest.mark.parametrize(("implementation", "back_to"), each([47, 40, 33, 32, 31, 16, 5, 0], tiny=[47, 32, 5]))
def test_writing_again_after_a_rollback(implementation: str, back_to: int) -> None:
    case = Case(lens=(48,), dtype=torch.bfloat16, heads=1, kv_heads=1, head_size=32)
    first, second = case.tokens(), replace(case, lens=(48, 1)).tokens()
    run, on = load("write", implementation), device(implementation)
    final = Tokens([], [torch.cat([first.key[0][:back_to], second.key[0][back_to:]])], [])
    final.value = [torch.cat([first.value[0][:back_to], second.value[0][back_to:]])]
    fresh = write_in_chunks(case, final, run, [], on)
    world = write_in_chunks(case, first, run, [], on)
    starts, lens = int32([0, 48 - back_to]).to(on), int32([48]).to(on)
    rest = final.key[0][back_to:].to(on), final.value[0][back_to:].to(on)
    run(*rest, world.pages, world.block_table, starts, lens)
    assert world.buffer.equal(fresh.buffer)


@pytest.mark.parametrize("implementation", ALL)
def test_a_shared_prefix_gives_its_sum(implementation: str) -> None:
    """A request that starts on another's pages (prefix caching) continues from their sum, whatever follows there."""
    case = Case(lens=(40,), heads=1, kv_heads=1, head_size=32)
    tokens, other = case.tokens(), replace(case, lens=(40, 1)).tokens()
    run, on = load("write", implementation), device(implementation)
    world = write_in_chunks(case, tokens, run, [], on)
    owner = world.block_table[0, :3].tolist()
    spare = next(p for p in range(len(world.pages.data)) if p not in owner)
    table = int32([owner[0], owner[1], spare]).to(on)[None]
    tail = other.key[0][32:].to(on), other.value[0][32:].to(on)
    run(*tail, world.pages, table, int32([0, 8]).to(on), int32([40]).to(on))
    assert world.pages.value_sum[spare].equal(world.pages.value_sum[owner[2]])
    assert world.pages.keys[spare, 0, :8].cpu().equal(other.key[0][32:, 0])
    assert world.pages.keys[owner[2], 0, :8].cpu().equal(tokens.key[0][32:, 0])


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_value_sums_of_integers_are_exact(implementation: str, dtype: torch.dtype) -> None:
    case = Case(lens=(50, 17), new=(50, 1), dtype=dtype, kv_heads=1, head_size=80)
    tokens = case.tokens()
    tokens.value = [torch.randint(-200, 200, v.shape, generator=case.generator()).to(dtype) for v in tokens.value]
    world = build(case, tokens, written="context", device=device(implementation))
    world.write(load("write", implementation))
    for b, value in enumerate(tokens.value):
        for block in range(-(-len(value) // 16)):
            got = world.pages.value_sum[int(world.block_table[b, block])].cpu()
            assert got.equal(value[: block * 16].float().sum(0))


@pytest.mark.parametrize("implementation", ALL)
def test_no_tokens_change_nothing(implementation: str) -> None:
    world = build(Case(lens=(20, 16, 5, 0), new=(0, 0, 0, 0)), written="context", device=device(implementation))
    before = world.buffer.clone()
    world.write(load("write", implementation))
    assert world.buffer.equal(before)


SHARING = (
    Case(lens=(40, 57, 70), dtype=torch.bfloat16),
    Case(lens=(40, 57, 70), format="int4", block_size=16, head_size=32),
    Case(lens=(40, 70, 100), format="kivi4", ranking=None, block_size=32, head_size=32),
)
ORDERS = [(0, 1, 2), (2, 1, 0), (1, 2, 0)]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(map(str, order)))
@pytest.mark.parametrize(("implementation", "case"), each(SHARING, tiny=SHARING[:2]))
def test_blocks_that_another_request_of_the_step_brings(
    implementation: str, case: Case, order: tuple[int, ...]
) -> None:
    """Three prompts that begin alike: each brings what the shorter ones do not, wherever it stands in the batch."""
    n, run, on = case.block_size, load("write", implementation), device(implementation)
    longest = max(case.lens)
    key, value = (x[-1] for x in (case.tokens().key, case.tokens().value))
    query = torch.zeros(longest, case.heads, case.head_size, dtype=case.dtype)
    alone = build(
        replace(case, lens=(longest,), new=(longest,)), Tokens([query], [key], [value]), written="context", device=on
    )
    alone.write(run)

    world = build(replace(case, new=case.lens), written="context", device=on)
    shared = [0, *(s // n for s in case.lens)]  # blocks of request b that came with the requests before it
    table = world.block_table.clone()
    for b in range(1, 3):
        table[b, : shared[b]] = table[b - 1, : shared[b]]
    rows = [slice(shared[b] * n, case.lens[b]) for b in order]
    starts = int32([0, *torch.tensor([s.stop - s.start for s in rows]).cumsum(0).tolist()]).to(on)
    new = [torch.cat([x[s] for s in rows]).to(on) for x in (key, value)]
    run(*new, world.pages, table[list(order)], starts, int32([case.lens[b] for b in order]).to(on))
    for b, s in enumerate(case.lens):
        begun = -(-s // n)
        ours, theirs = table[b, :begun].long(), alone.block_table[0, :begun].long()
        assert world.pages.value_sum[ours].equal(alone.pages.value_sum[theirs]), f"request {b}"
