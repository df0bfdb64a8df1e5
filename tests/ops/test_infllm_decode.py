"""`quest_decode` with representatives (InfLLM): first spans, a window, and what queries look up between them.

The oracle works from the tokens and the definition in the paper (Xiao et al. 2024, arXiv 2402.04617, section 3), and
shares nothing with `vllm_sparq`.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ops import tolerances
from tests.ops.cases import HUGE_BYTE, Case, Tokens, World, build, load
from tests.ops.oracle import Array, capped, probabilities, sinks_of
from tests.ops.sparq_checks import tokens_read
from tests.ops.test_represent import KEYS, SPAN, WINDOW, brought, filled, summed
from vllm_sparq.ops import quest_decode as contract
from vllm_sparq.ops.dense_decode.reference import dense_decode as dense_reference
from vllm_sparq.ops.dispatch import OVERRIDE
from vllm_sparq.ops.represent import query_sums
from vllm_sparq.ops.represent.reference import represent
from vllm_sparq.reads import InfllmRead, SpansRead

BASE = Case(
    ranking="representatives", value_sum=False, heads=6, kv_heads=2, lens=(190, 192, 193, 0, 300, 700), block_size=48
)
CASES = (
    BASE,
    replace(BASE, block_size=128, dtype=torch.bfloat16, lens=(640, 333)),
    replace(BASE, block_size=16, dtype=torch.float16, head_size=80, heads=2, lens=(410,)),
    replace(BASE, block_size=32, heads=4, kv_heads=1, lens=(500,), sinks=True, soft_cap=5.0),
)
READS = (
    InfllmRead(min_k=1),
    InfllmRead(min_k=1, k_per_token=Fraction(3, 5)),
    InfllmRead(min_k=320, local=130, dense_below=310),
    InfllmRead(min_k=320, local=4096),
)


def decoding(case: Case) -> tuple[World, Tokens]:
    """A decode step over pages whose queries were all seen, and these tokens."""
    whole = replace(case, new=case.lens)
    tokens = whole.tokens()
    last = [q[-1:] for q in tokens.query]
    world = build(case, replace(tokens, query=last))
    return brought_into(world, whole, tokens), tokens


def brought_into(world: World, whole: Case, tokens: Tokens) -> World:
    brought(replace(world, case=whole), tokens, represent, ())
    return world


def newest_of(read: InfllmRead, n: int) -> int:
    """Newest spans of n that are read: two thirds, or what ``local`` tokens need; and one at least is looked up."""
    wanted = n * 2 // 3 if read.local is None else (read.local + SPAN - 1) // SPAN + 1
    return min(max(WINDOW + 1, wanted), n - 2)


def spans_of_the_paper(case: Case, tokens: Tokens, read: InfllmRead, b: int, g: int) -> Array:
    """Ascending."""
    s, group = case.lens[b], case.heads // case.kv_heads
    total = (s + SPAN - 1) // SPAN
    n = max(12, max(read.min_k, int(s * read.k_per_token)) // SPAN)
    n_newest, query = newest_of(read, n), tokens.query[b][-1, g * group : (g + 1) * group].double().numpy()
    scores = {}
    for span in range(1, total - n_newest):
        its = tokens.key[b][span * SPAN : (span + 1) * SPAN, g].double().numpy()
        local = its @ summed(case, tokens, b, g, (span + 1) * SPAN, (span + 1 + WINDOW) * SPAN)
        best = its[np.argsort(-local, kind="stable")[:KEYS]]
        scores[span] = (query @ best.T).sum()
    looked_up = sorted(scores, key=lambda span: -scores[span])[: n - 1 - n_newest]
    return np.array(sorted([0, *looked_up, *range(total - n_newest, total)]))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_it_reads_what_the_paper_reads(implementation: str, case: Case) -> None:
    run, (world, tokens), group = load("quest_decode", implementation), decoding(case), case.heads // case.kv_heads
    dense, tolerance = world.decode(dense_reference), tolerances.OUT[case.dtype]
    for read in READS:
        got, n_sparse = world.decode(run, read=read), 0
        for b, s in enumerate(case.lens):
            if s < read.dense_below or max(12, max(read.min_k, int(s * read.k_per_token)) // SPAN) * SPAN >= s:
                torch.testing.assert_close(got[b], dense[b], **tolerance)
                continue
            for g in range(case.kv_heads):
                heads, n_sparse = slice(g * group, (g + 1) * group), n_sparse + 1
                spans = spans_of_the_paper(case, tokens, read, b, g)
                seen = [t for p in spans for t in range(p * SPAN, min(p * SPAN + SPAN, s))]
                query, key, value = (
                    x.double().numpy() for x in (tokens.query[b][-1, heads], tokens.key[b][:, g], tokens.value[b][:, g])
                )
                logits = capped(case.scale * query @ key[seen].T, case.soft_cap)
                want = torch.from_numpy(probabilities(logits, sinks_of(case, heads)) @ value[seen])
                torch.testing.assert_close(got[b, heads].double(), want, **tolerance)
        assert n_sparse, "nothing was left out"


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_a_planted_key_brings_its_span(implementation: str) -> None:
    """The current query looks for what queries after a span have looked for in it, wherever between both ends it is."""
    case = replace(BASE, heads=1, kv_heads=1, lens=(800,))
    whole = replace(case, new=case.lens)
    tokens = whole.tokens()
    direction = torch.zeros(64)
    direction[:8] = 1
    tokens.key[0][:, 0, :8], tokens.query[0][:, 0, :8] = 0, 1
    for token in (37, 400):
        tokens.key[0][token, 0] += 50 * direction
    world = build(case, replace(tokens, query=[tokens.query[0][-1:]]))
    brought_into(world, whole, tokens)
    read = InfllmRead(min_k=1)  # 12 spans: the first, 9 newest, and two
    seen = tokens_read(load("quest_decode", implementation), world, read)[0, 0]
    assert np.unique(seen // SPAN).tolist() == [0, 37 // SPAN, 400 // SPAN, *range(41, 50)]


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_nothing_but_the_tokens_matters(implementation: str) -> None:
    """Sums of queries that lie where representatives will be are never read as such; nor is what nobody has written."""
    run, read = load("quest_decode", implementation), InfllmRead(min_k=1)
    world, tokens = decoding(BASE)
    plain = world.decode(run, read=read)
    assert plain.isfinite().all()
    other = build(BASE, replace(tokens, query=[q[-1:] for q in tokens.query]), poison=HUGE_BYTE, shuffle=1)
    assert brought_into(other, replace(BASE, new=BASE.lens), tokens).decode(run, read=read).equal(plain)
    for b, s in enumerate(BASE.lens):  # spans without representatives
        for span in range(max(0, s // SPAN - WINDOW), -(-s // SPAN)):
            block, place = divmod(span, BASE.block_size // SPAN)
            query_sums(world.pages)[int(world.block_table[b, block]), :, place] = torch.nan
    assert world.decode(run, read=read).equal(plain)


def test_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    world = filled(replace(BASE, lens=(20,)), represent)
    out = torch.empty_like(world.query[:1])
    given = world.query[:1], world.pages, world.block_table, world.seq_lens
    with pytest.raises(ValueError, match="needs pages with ranking 'bounds'; this layout has 'representatives'"):
        contract.quest_decode(*given, read=SpansRead(min_k=1), scale=1.0, out=out)
    monkeypatch.setenv(OVERRIDE, "triton")
    with pytest.raises(NotImplementedError, match="by representatives on CPU alone"):
        contract.quest_decode(*given, read=InfllmRead(min_k=1), scale=1.0, out=out)
