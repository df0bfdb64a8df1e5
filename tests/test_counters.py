"""Counts of the scheduler's process: found by every front end, published by one."""

from __future__ import annotations

import itertools
import random
import select
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_sparq import counters, stat_logger
from vllm_sparq.counters import Counters
from vllm_sparq.retention import Retention

NOTHING = dict.fromkeys(counters.NAMES, 0)
RETENTION = Retention(budget=64, recent=None, sinks=0, rank="attention", bounded=False, interval=1, block_size=16)


WRITER = """
import sys, time
from pathlib import Path
from vllm_sparq.counters import Counters
counters, n = Counters(Path(sys.argv[1])), 0
with counters.writing():
    print("open", flush=True)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        n += 1
        counters.write(blocks_taken=2 * n, preemptions_avoided=n)
    print(n, flush=True)
    sys.stdin.read()
"""
"""A scheduler's process: counts as fast as it can for a second, and keeps its file until nobody listens any more."""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv(counters.RUN, raising=False)


def config(instance_id: str, n_front_ends: int) -> Any:
    """vLLM's configuration, as far as counters look at it."""
    return SimpleNamespace(
        instance_id=instance_id, parallel_config=SimpleNamespace(_api_process_count=n_front_ends, _api_process_rank=0)
    )


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, str], float]:
    """(engine, name) -> what Prometheus has of it, all front ends together."""
    monkeypatch.setattr(stat_logger, "_retention_of", lambda _: (RETENTION, 100))
    monkeypatch.setattr(stat_logger, "_takes_choices", lambda _: False)
    found: dict[tuple[int, str], float] = {}

    def register(self: stat_logger.SparqStatLogger) -> dict[str, Any]:
        def inc_of(name: str) -> Any:
            def inc(n: float) -> None:
                key = self.engine_index, name
                found[key] = found.get(key, 0) + n

            return SimpleNamespace(inc=inc)

        return {name: inc_of(name) for name in (*stat_logger.FROM_LENGTHS, *stat_logger.FROM_SCHEDULER)}

    monkeypatch.setattr(stat_logger.SparqStatLogger, "_register", register)
    return found


def test_what_is_taken_once_is_gone() -> None:
    scheduler, front_end = Counters.of(config("a", 1), 0), Counters.of(config("a", 1), 0)
    assert front_end.take() == {}  # nobody counts yet
    with scheduler.writing():
        assert front_end.take() == {}
        scheduler.write(blocks_taken=3, preemptions_avoided=1)
        assert front_end.take() == NOTHING | {"blocks_taken": 3, "preemptions_avoided": 1}
        assert front_end.take() == {}
        scheduler.write(blocks_taken=7)
        assert front_end.take() == NOTHING | {"blocks_taken": 4}
        scheduler.write(dense_requests=2)
        assert front_end.take() == NOTHING | {"dense_requests": 2}
    assert not scheduler.path.exists()


def test_a_front_end_that_looks_too_early_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any moment while the file is made: vLLM's front end ends all requests where its logger fails."""
    write_bytes = Path.write_bytes
    early = Counters(tmp_path / "of.counters")
    found = []

    def looked_at(self: Path, data: bytes) -> int:
        self.touch()
        found.append(early.take())
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", looked_at)
    with Counters(tmp_path / "of.counters").writing():
        assert found == [{}]
        assert not early.is_open
        assert early.take() == {}
        assert early.is_open
    assert list(tmp_path.iterdir()) == []


def test_engines_do_not_share() -> None:
    with Counters.of(config("a", 1), 0).writing():
        assert Counters.of(config("a", 1), 1).path != Counters.of(config("a", 1), 0).path
        assert Counters.of(config("b", 1), 0).path != Counters.of(config("a", 1), 0).path


def test_engines_that_ray_starts_are_found() -> None:
    """vLLM gives their configurations names of their own, which their front end never hears of."""
    assert Counters.of(config("a_dp1", 1), 1).path == Counters.of(config("a", 1), 1).path
    assert Counters.of(config("a_dp1", 1), 1).path != Counters.of(config("a_dp0", 1), 0).path


def test_what_was_taken_is_not_taken_back() -> None:
    """A count below what was taken: nothing, and afterwards only what goes beyond."""
    scheduler, front_end = Counters.of(config("a", 1), 0), Counters.of(config("a", 1), 0)
    with scheduler.writing():
        scheduler.write(blocks_taken=5, dense_requests=1)
        assert front_end.take() == NOTHING | {"blocks_taken": 5, "dense_requests": 1}
        scheduler.write(blocks_taken=3)
        assert front_end.take() == {}
        scheduler.write(dense_requests=2)
        assert front_end.take() == NOTHING | {"dense_requests": 1}
        scheduler.write(blocks_taken=7)
        assert front_end.take() == NOTHING | {"blocks_taken": 2}


def test_a_scheduler_that_counts_meanwhile(published: dict[tuple[int, str], float]) -> None:
    """A reader that saw zeros, or half of a number, in the middle of a write would publish the rest twice."""
    logger = stat_logger.SparqStatLogger(config("a", 1), 0)
    command = [sys.executable, "-c", WRITER, str(Counters.of(config("a", 1), 0).path)]
    seen = [dict(logger.totals)]
    pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    with subprocess.Popen(command, **pipes) as scheduler:
        assert scheduler.stdout is not None
        assert scheduler.stdout.readline() == b"open\n"
        while not select.select([scheduler.stdout], [], [], 0)[0]:
            logger.record(None, None)
            seen.append(dict(logger.totals))
        n_written = int(scheduler.stdout.readline())
        logger.record(None, None)
    assert len({one["preemptions_avoided"] for one in seen}) > 5  # else they did not run side by side
    assert all(new[name] >= old[name] for old, new in itertools.pairwise(seen) for name in NOTHING)
    assert logger.totals["preemptions_avoided"] == published[0, "preemptions_avoided"] == n_written
    assert logger.totals["blocks_taken"] == published[0, "blocks_taken"] == 2 * n_written


def test_two_front_ends_publish_each_count_once(published: dict[tuple[int, str], float]) -> None:
    """As under `vllm serve --data-parallel-size 2`: three configurations with ids of their own, one parent process."""
    counters.name_run(config("of the parent", 2))
    engines = [Counters.of(config("of the parent", 2), index) for index in (0, 1)]
    loggers = [
        stat_logger.SparqStatLogger(config(f"of front end {rank}", 2), engine_index)
        for rank in (0, 1)
        for engine_index in (0, 1)
    ]
    rng, totals = random.Random(0), [0, 0]
    with engines[0].writing(), engines[1].writing():
        for _ in range(200):
            index = rng.randrange(2)
            totals[index] += rng.randrange(3)
            engines[index].write(blocks_taken=2 * totals[index], preemptions_avoided=totals[index])
            rng.choice(loggers).record(None, None)
        for logger in loggers:
            logger.record(None, None)
    for index in (0, 1):
        assert published[index, "preemptions_avoided"] == totals[index] > 0
        assert published[index, "blocks_taken"] == 2 * totals[index]


def test_one_front_end_needs_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines started by one process, each with its front end, must not meet."""
    counters.name_run(config("a", 1))
    assert counters.RUN not in counters.os.environ
