"""Whether an answer of `sparq_decode` is right: the tokens read, and the output given those tokens.

Which tokens an implementation reads shows in its output once V is replaced by unit vectors (`tokens_read`). So ties do
not loosen the tolerance of the output: any set is right that scores within their error bound may lead to, and the
output must be that of the set.

A kernel may sum in another order and round ``scale * q * step`` to the model's type, or to whole numbers of 16 bits;
in the sum over a group that ranks tokens, where nothing else needs it, to bytes (`tolerances.bytes_of`).
Its scores of query head g differ from ours by at most
``e_g = tolerances.SCORE * max_t sum_c |scale_g q_c| (|zero_c| + step_c code_c) + tolerances.whole_numbers``. Hence:

* What tokens are ranked by moves by at most ``m_t = sum_g e_g`` (``logits``), or ``m_t = sum_g p_gt (exp(2 e_g) - 1)``
  (``probs``: a term and the sum it is divided by move by a factor ``exp(e_g)`` each). A token read may be worse than
  one left out by no more than both margins.
* The log-odds of alpha are a difference of two log-sum-exps that move by e_g each: 2 e_g. The slope of a probability in
  its log-odds is at most 1/4, so alpha moves by e_g / 2, and the output by that times ``|exact - mean|``.
* So does what a set of tokens holds of the probability: the mean over the group moves by ``mean_g e_g / 2``. With
  ``read.mass`` the tokens read hold no less than the mass but for that, and without the last of them no more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from tests.ops import tolerances
from tests.ops.cases import Case, Tokens, World, build
from tests.ops.oracle import Array, capped, numbers, probabilities, repository, sinks_of
from tests.ops.rounding import multiplied, rounded_dense_decode
from vllm_sparq.layout import Pages
from vllm_sparq.ops.codec import unpack
from vllm_sparq.ops.dense_decode.reference import cached_tokens
from vllm_sparq.ops.dense_decode.reference import dense_decode as dense_reference
from vllm_sparq.reads import SpansRead, SparqRead


def cached(world: World, b: int, head: int) -> tuple[Array, Array]:
    """K and V [S, D] of a request, as its pages hold them."""
    keys, values = cached_tokens(world.pages, world.block_table[b].cpu(), world.case.lens[b], head)
    return keys.cpu().double().numpy(), values.cpu().double().numpy()


def ranked_by(world: World, key: Array, b: int, head: int) -> tuple[Array, Array]:
    """What tokens are ranked with: keys [S, D], and ``|zero| + step code`` [S, D] (their own size without codes).

    A kernel may take ``middle``, half of the largest code, off the codes of channel-major K and add ``step middle`` to
    zero; so for these the code counts as no less than that.
    """
    keys, size, n = key.copy(), np.abs(key), world.case.block_size
    pages, layout = world.pages, world.case.layout
    for block in range((len(key) - (layout.quantized is not None)) // n):
        rows, page = slice(block * n, block * n + n), int(world.block_table[b, block])
        if layout.channel_keys:
            bits, scales = layout.coding("key").bits, pages.key_scales[page, head].cpu().double()
            codes = unpack(pages.key_codes[page, head].cpu(), bits).double().numpy()
            step, zero = scales.repeat_interleave(layout.group("key"), 1).unbind(2)
            size[rows] = (zero.abs().numpy() + step.numpy() * np.maximum(codes, (2**bits - 1) / 2)).T
            continue
        copy = pages.ranking[page, head].cpu()
        if layout.ranking == "model":
            keys[rows] = copy.double().numpy().T
            size[rows] = np.abs(keys[rows])
            continue
        codes = copy.numpy()
        if layout.ranking == "int4":
            codes = np.concatenate([codes % 16, codes // 16], axis=1)
        step, zero = pages.scales[page, head].cpu().double().numpy().T
        keys[rows] = zero + step * codes.T
        size[rows] = np.abs(zero) + step * codes.T
    return keys, size


SHOWN = 2.0**15
"""An element of V whose token is shown: far from underflow, and sums of it are finite in fp16."""


def show(world: World, b: int, shown: range, width: int, blocks: range) -> None:
    """In some blocks of request b make V zero, but `SHOWN` on channels ``width * i ..`` of the i-th token ``shown``."""
    case, pages, n, layout = world.case, world.pages, world.case.block_size, world.case.layout
    newest = (case.lens[b] - 1) // n
    for block in blocks:
        slots = [(i, t - block * n) for i, t in enumerate(shown) if block * n <= t < min(block * n + n, case.lens[b])]
        rows = torch.zeros(min(n, case.lens[b] - block * n), case.head_size // width, device=world.buffer.device)
        for i, slot in slots:
            rows[slot, i] = SHOWN
        page = int(world.block_table[b, block])
        if layout.quantized is None:
            pages.values[page, :, : len(rows)] = rows.to(case.dtype)
        elif block == newest:
            for slot, row in enumerate(rows.repeat_interleave(width, 1).to(case.dtype)):
                ahead, place = layout.staged_at(slot)
                pages.staged[int(world.block_table[b, block + 1 + ahead]), :, place, 1] = row
        elif layout.coding("value").scale_numbers == 1:
            pages.value_codes[page] = (rows > 0).to(torch.uint8)
            pages.value_scales[page] = SHOWN
        else:
            pages.value_codes[page] = 0
            pages.value_scales[page] = torch.stack([torch.zeros_like(rows), rows], -1).to(case.dtype)


def copy_of(world: World) -> World:
    """The same, in a buffer of its own."""
    buffer, data = world.buffer.clone(), world.pages.data
    return replace(
        world, buffer=buffer, pages=Pages(buffer.as_strided(data.shape, data.stride(), 128), world.case.layout)
    )


def tokens_read(run: Callable[..., None], world: World, read: SparqRead | SpansRead) -> dict[tuple[int, int], Array]:
    """(request, KV head) -> ascending positions that ``run`` reads, for requests that are not read densely.

    V of some tokens at a time is made to show itself, each in channels of its own (whole groups of them where groups
    have a zero, so that no rounding lets it show elsewhere), that of all others is zero: an element of the output is
    not zero just where its token has been read. V has no say in what is read.
    """
    case = world.case
    exact = replace(read, alpha_floor=1.0) if isinstance(read, SparqRead) else read
    group, fmt = case.heads // case.kv_heads, case.layout.quantized
    width = 1 if fmt is None or fmt.value.scale_numbers == 1 else case.layout.group("value")
    n, n_shown = case.block_size, case.head_size // width
    hidden = copy_of(world)
    for b, s in enumerate(case.lens):
        show(hidden, b, range(0), width, range(-(-s // n)))
    seen: dict[tuple[int, int], list[int]] = {}
    for first in range(0, max(case.lens), n_shown):
        probe = copy_of(hidden)
        for b, s in enumerate(case.lens):
            shown = range(first, max(first, min(first + n_shown, s)))
            if shown:
                show(probe, b, shown, width, range(first // n, shown[-1] // n + 1))
        out = probe.decode(run, read=exact).cpu()
        for b, s in enumerate(case.lens):
            for g in range(case.kv_heads if s and not read.is_dense(s) else 0):
                hit = (out[b, g * group : (g + 1) * group, ::width] > 0).any(0)
                seen.setdefault((b, g), []).extend((first + hit.nonzero().flatten()).tolist())
    return {key: np.array(positions) for key, positions in seen.items()}


def assert_right(
    run: Callable[..., None],
    case: Case,
    tokens: Tokens,
    read: SparqRead,
    on: str = "cpu",
    *,
    rounds: bool = False,
    probes: bool = True,
) -> None:
    """``run`` reads tokens that it may read, and answers what follows from them.

    Args:
        run, case, tokens, read, on: the op, and what it is given, where.
        rounds: it multiplies what the codes of quantized pages stand for in the model's type: see `tolerances.OUT`.
        probes: find out what it reads; else it is taken to read what the oracle does.
    """
    world, group = build(case, tokens, device=on), case.heads // case.kv_heads
    got = world.decode(run, read=read).cpu()
    sparse = [b for b, s in enumerate(case.lens) if s and not read.is_dense(s)]
    read_by: dict[tuple[int, int], Array | None] = {(b, g): None for b in sparse for g in range(case.kv_heads)}
    if probes:
        read_by |= tokens_read(run, world, read)
    dense = build(case, tokens).decode(rounded_dense_decode if rounds else dense_reference)
    tolerance = tolerances.OUT[case.dtype]
    for b, s in enumerate(case.lens):
        if s == 0 or read.is_dense(s):
            torch.testing.assert_close(got[b], dense[b], **tolerance)
    for (b, g), chosen in read_by.items():
        s, heads, where = case.lens[b], slice(g * group, (g + 1) * group), f"request {b}, KV head {g}"
        given = numbers(read, s, case.head_size)
        query = tokens.query[b][0, heads].double().numpy()
        key, value = cached(world, b, g)
        keys, size = ranked_by(world, key, b, g)
        if rounds:
            held = zip(("key", "value"), (key, value), strict=True)
            key, value = (multiplied(case.layout, part, torch.from_numpy(x)).double().numpy() for part, x in held)
        sinks = sinks_of(case, heads)
        want = repository(query, keys, key, value, **given, chosen=chosen, sinks=sinks, soft_cap=case.soft_cap)
        shares = probabilities(capped(want.scores, case.soft_cap), sinks)
        error, chosen = score_error(case, query, want.channels, size), want.chosen

        least = given["n_selected"] if read.mass is None else given["n_least"]
        assert least <= len(chosen) <= given["n_selected"], f"{where}: {len(chosen)} tokens read"
        assert set(range(s - given["n_local"], s)) <= set(chosen.tolist()), f"{where}: the newest are not all read"
        margin = np.full(s, error.sum() + ranking_error(case, query, want.channels, size))
        if read.group_reduce == "probs":
            margin = (shares * np.expm1(2 * error)[:, None]).sum(0) + 2.0**-120
        left = np.setdiff1d(np.arange(s), chosen)
        ranked = np.setdiff1d(chosen, np.arange(s - given["n_local"], s))
        worst = (want.rank_by + margin)[ranked].min(initial=np.inf)
        assert worst >= (want.rank_by - margin)[left].max(), f"{where}: a better token is left out"
        if read.mass is not None:
            held, slack = shares.mean(0), error.mean() / 2 + tolerances.MASS
            total, last = 1 - held.sum() + held[chosen].sum(), ranked[(want.rank_by - margin)[ranked] <= worst]
            enough = len(chosen) == given["n_selected"] or total >= read.mass - slack
            assert enough, f"{where}: what is read holds {total:.4f}"
            least_held = total - held[last].max(initial=0.0)
            assert len(chosen) == least or least_held <= read.mass + slack, f"{where}: {least_held:.4f} were enough"

        room = tolerance["atol"] + tolerance["rtol"] * np.abs(want.out)
        if read.alpha_floor < 1:
            room += error[:, None] / 2 * np.abs(want.exact - want.mean)
        miss = (np.abs(got[b, heads].double().numpy() - want.out) / room).max()
        assert miss <= 1, f"{where} (S={s}): off by {miss:.3g} tolerances"


def scaled_query(case: Case, query: Array, channels: Array) -> Array:
    """Those channels of every head [H', r], with scale and temperature."""
    total, held = np.abs(query).sum(1), np.abs(query[:, channels]).sum(1)
    scaled: Array = case.scale * np.sqrt(total / held)[:, None] * query[:, channels]
    return scaled


def ranking_error(case: Case, query: Array, channels: Array, size: Array) -> float:
    """What tokens are ranked by moves by no more where the weights of the summed query are bytes."""
    if case.dtype == torch.float32 or case.layout.ranking != "int4":
        return 0.0
    summed = np.abs(scaled_query(case, query, channels).sum(0))
    return tolerances.bytes_of(len(channels), float((summed * size[:, channels].max(0)).max()))


def score_error(case: Case, query: Array, channels: Array, size: Array) -> Array:
    """The bound e_g [H'] of this file's head; ``size`` [S, D] is ``|zero| + step code``."""
    scaled = np.abs(scaled_query(case, query, channels))
    error: Array = tolerances.SCORE[case.dtype] * (scaled @ size[:, channels].T).max(1)
    if case.dtype != torch.float32:
        error += tolerances.whole_numbers(len(channels), 1.0) * scaled.max(1) * size[:, channels].max()
    return error
