"""Whether an answer of `sparq_decode` is right: the tokens read, and the output given those tokens.

Which tokens an implementation reads shows in its output once V is replaced by unit vectors (`tokens_read`). So ties do
not loosen the tolerance of the output: any set is right that scores within their error bound may lead to, and the
output must be that of the set.

A kernel may sum in another order and round ``scale * q * step`` to the model's type. Its scores of query head g differ
from ours by at most ``e_g = tolerances.SCORE * max_t sum_c |scale_g q_c| (|zero_c| + step_c code_c)``. Hence:

* What tokens are ranked by moves by at most ``m_t = sum_g e_g`` (``logits``), or ``m_t = sum_g p_gt (exp(2 e_g) - 1)``
  (``probs``: a term and the sum it is divided by move by a factor ``exp(e_g)`` each). A token read may be worse than
  one left out by no more than both margins.
* The log-odds of alpha are a difference of two log-sum-exps that move by e_g each: 2 e_g. The slope of a probability in
  its log-odds is at most 1/4, so alpha moves by e_g / 2, and the output by that times ``|exact - mean|``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from ops import tolerances
from ops.cases import Case, Tokens, World, build
from ops.test_oracle import Array, numbers, probabilities, repository

from vllm_sparq.config import SparqRead
from vllm_sparq.layout import Pages
from vllm_sparq.ops.dense_decode.reference import dense_decode as dense_reference


def ranking(world: World, key: Array, b: int, head: int) -> tuple[Array, Array]:
    """What tokens are ranked with: keys [S, D], and ``|zero| + step code`` [S, D] (their own size without codes)."""
    keys, size, n = key.copy(), np.abs(key), world.case.block_size
    pages, scoring = world.pages, world.case.scoring
    for block in range(len(key) // n):
        rows = slice(block * n, block * n + n)
        copy = pages.scoring[int(world.block_table[b, block]), head].cpu()
        if scoring == "model":
            keys[rows] = copy.double().numpy().T
            size[rows] = np.abs(keys[rows])
            continue
        codes = copy.numpy()
        if scoring == "int4":
            codes = np.concatenate([codes % 16, codes // 16], axis=1)
        step, zero = pages.ranges[int(world.block_table[b, block]), head].cpu().double().numpy().T
        keys[rows] = zero + step * codes.T
        size[rows] = np.abs(zero) + step * codes.T
    return keys, size


def tokens_read(run: Callable[..., None], world: World, read: SparqRead) -> dict[tuple[int, int], Array]:
    """(request, KV head) -> ascending positions that ``run`` reads, for requests that are not read densely.

    V of D tokens at a time becomes a unit vector each, that of all others zero: an element of the output is not zero
    just where its token has been read. V has no say in what is read.
    """
    case, size = world.case, world.case.head_size
    group, n = case.heads // case.kv_heads, case.block_size
    seen: dict[tuple[int, int], list[int]] = {}
    for first in range(0, max(case.lens), size):
        probe = replace(world, buffer=world.buffer.clone())
        strides = world.pages.data.stride()
        probe.pages = Pages(probe.buffer.as_strided(world.pages.data.shape, strides, 128), case.layout)
        for b, s in enumerate(case.lens):
            units = torch.zeros(s, size)
            shown = torch.arange(first, max(first, min(first + size, s)))
            units[shown, shown - first] = 2.0**15  # far from underflow, and the sum is finite in fp16
            for block in range(-(-s // n)):
                rows = units[block * n : block * n + n].to(case.dtype)
                probe.pages.values[int(world.block_table[b, block]), :, : len(rows)] = rows.to(world.buffer.device)
        out = probe.decode(run, read=replace(read, alpha_floor=1.0)).cpu()
        for b, s in enumerate(case.lens):
            for g in range(case.kv_heads if s and not read.is_dense(s) else 0):
                hit = (out[b, g * group : (g + 1) * group] > 0).any(0)
                seen.setdefault((b, g), []).extend((first + hit.nonzero().flatten()).tolist())
    return {key: np.array(positions) for key, positions in seen.items()}


def assert_right(run: Callable[..., None], case: Case, tokens: Tokens, read: SparqRead, on: str = "cpu") -> None:
    """``run`` reads tokens that it may read, and answers what follows from them."""
    world, group = build(case, tokens, device=on), case.heads // case.kv_heads
    got, read_by = world.decode(run, read=read).cpu(), tokens_read(run, world, read)
    dense, tolerance = build(case, tokens).decode(dense_reference), tolerances.OUT[case.dtype]
    for b, s in enumerate(case.lens):
        if s == 0 or read.is_dense(s):
            torch.testing.assert_close(got[b], dense[b], **tolerance)
    for (b, g), chosen in read_by.items():
        s, heads, where = case.lens[b], slice(g * group, (g + 1) * group), f"request {b}, KV head {g}"
        given = numbers(read, s, case.head_size)
        query = tokens.query[b][0, heads].double().numpy()
        key, value = (x[b][:, g].double().numpy() for x in (tokens.key, tokens.value))
        keys, size = ranking(world, key, b, g)
        want = repository(query, keys, key, value, **given, chosen=chosen)
        error = score_error(case, query, want.channels, size)

        assert len(chosen) == given["n_selected"], f"{where}: {len(chosen)} tokens read"
        assert set(range(s - given["n_local"], s)) <= set(chosen.tolist()), f"{where}: the newest are not all read"
        margin = np.full(s, error.sum())
        if read.group_reduce == "probs":
            margin = (probabilities(want.scores) * np.expm1(2 * error)[:, None]).sum(0) + 2.0**-120
        left = np.setdiff1d(np.arange(s), chosen)
        ranked = np.setdiff1d(chosen, np.arange(s - given["n_local"], s))
        worst = (want.rank_by + margin)[ranked].min(initial=np.inf)
        assert worst >= (want.rank_by - margin)[left].max(), f"{where}: a better token is left out"

        room = tolerance["atol"] + tolerance["rtol"] * np.abs(want.out)
        if read.alpha_floor < 1:
            room += error[:, None] / 2 * np.abs(want.exact - want.mean)
        miss = (np.abs(got[b, heads].double().numpy() - want.out) / room).max()
        assert miss <= 1, f"{where} (S={s}): off by {miss:.3g} tolerances"


def score_error(case: Case, query: Array, channels: Array, size: Array) -> Array:
    """The bound e_g [H'] of this file's head; ``size`` [S, D] is ``|zero| + step code``."""
    total, held = np.abs(query).sum(1), np.abs(query[:, channels]).sum(1)
    scaled = case.scale * np.sqrt(total / held)[:, None] * np.abs(query[:, channels])
    return tolerances.SCORE[case.dtype] * (scaled @ size[:, channels].T).max(1)
