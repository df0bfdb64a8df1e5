"""What a read is said to have read, and what it is compared with; no engine."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ops.cases import Case, build, load
from tests.ops.sparq_checks import tokens_read as tokens_shown
from vllm_sparq import cli
from vllm_sparq.benchmarks.quality import mass_curve
from vllm_sparq.reads import SparqRead

CASE = Case(heads=4, kv_heads=2, lens=(40, 0, 65, 12, 100))
READ = SparqRead(r=8, min_k=30, local=3, mass=0.6)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("mass", [None, 0.3, 0.9])
def test_counts_are_what_the_op_reads(implementation: str, mass: float | None) -> None:
    """Known by probing the op, on numbers with nothing near the cut."""
    world, read = build(CASE), SparqRead(r=8, min_k=30, local=3, mass=mass)
    shown = tokens_shown(load("sparq_decode", implementation), world, read)
    want = [len(shown[b, g]) if (b, g) in shown else s for b, s in enumerate(CASE.lens) for g in range(CASE.kv_heads)]
    query = world.query[: world.n_requests]
    found = mass_curve.tokens_read(query, world.pages, world.block_table, world.seq_lens, read, CASE.scale)
    assert found == want
    assert mass is None or len({*found} - {*CASE.lens}) > 2, "reads differ"


def test_a_watched_layer_answers_as_before() -> None:
    run, world, count = load("sparq_decode", "reference"), build(CASE), mass_curve.Count()
    impl = SimpleNamespace(_read_policy=lambda options: partial(run, read=READ))
    count.watch(impl)
    assert world.decode(impl._read_policy(None)).equal(world.decode(run, read=READ))
    assert len(count.numbers) == len(CASE.lens) * CASE.kv_heads
    assert count.mean == sum(count.numbers) / len(count.numbers)
    assert (count.quantile(0.0), count.quantile(1.0)) == (0, max(count.numbers))


class FakeCurve:
    """Reads 33.4 tokens on average with a mass, and answers every other prompt right with a fixed k."""

    def point(self, name: str, options: dict[str, Any], examples: list[int], advance: Any) -> dict[str, Any]:
        adaptive = "mass" in options
        scores = [100.0 if adaptive else 100.0 * (i % 2) for i in examples]
        n_read = 33.4 if adaptive else options["k"] + 1.0
        about = dict(task="recall", length=1024, tokens_read_p10=9, tokens_read_p90=90, low=0.0, high=100.0)
        return dict(read=name, options=options, scores=scores, score=50.0, tokens_read=n_read, **about)


def test_a_mass_is_measured_beside_the_k_that_reads_as_much() -> None:
    adaptive, fixed = mass_curve.pair(FakeCurve(), 0.9, [0, 1, 2, 3], lambda n: None)  # type: ignore[arg-type]
    assert (adaptive["read"], fixed["read"], fixed["tokens_read"]) == ("mass 0.9", "k = 32", 33)
    assert (adaptive["difference"], adaptive["beside"]) == (50.0, "k = 32")
    assert adaptive["difference_low"] < 50 < adaptive["difference_high"]
    json.dumps([adaptive, fixed])
    assert mass_curve.table([adaptive, fixed]).row_count == 2


@pytest.mark.parametrize("task", ["text", "needle:likelihood"])
def test_bits_are_no_points(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["research", "mass", "--tasks", f"repetition,{task}", "--lengths", "400", "--n", "1"]) == 2
    assert f"--tasks {task} is measured in bits, and this table is of points" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "1", "0.9,x", "-0.5"])
def test_shares_that_mean_nothing_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["research", "mass", f"--mass={text}"])
    assert f"argument --mass: {text!r} is not usable: give shares above 0 and below 1" in capsys.readouterr().err
