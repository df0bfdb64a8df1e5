"""Files of lines: half-written ones, full disks, two writers at once, and places that cannot be written."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from vllm_sparq.benchmarks.common import lines
from vllm_sparq.benchmarks.common.lines import append_lines, check_out, mend, read_lines, replace_lines
from vllm_sparq.console import UsageError

LONG = "x" * (3 * lines.N_TAIL_BYTES)


def numbers(path: Path) -> list[int]:
    return [line["n"] for _, line in read_lines(path)]


@pytest.mark.parametrize("torn", [b'{"n": 3, "text": "cut', b"{", b"\x80\x81", b'{"text": "' + LONG.encode(), b"17"])
@pytest.mark.parametrize("before", ['{"n": 1}\n{"n": 2}\n', ""])
def test_a_torn_last_line_is_cut_off_and_said_so(
    torn: bytes, before: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(before.encode() + torn)
    whole = [1, 2] if before else []
    assert numbers(path) == whole
    assert path.read_bytes().endswith(torn)  # a reader changes nothing: its writer may still be at it
    assert f"passed over the half-written last line, {len(torn):,} bytes" in capsys.readouterr().err
    append_lines(path, [{"n": 9}])
    assert f"{path}: cut off the half-written last line, {len(torn):,} bytes" in capsys.readouterr().err
    assert numbers(path) == [*whole, 9]
    assert path.read_text() == before + '{"n": 9}\n'


def test_a_whole_record_without_its_end_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}')
    assert numbers(path) == [1, 2]
    append_lines(path, [{"n": 3}])
    assert numbers(path) == [1, 2, 3]
    path.write_text('{"n": 1}')
    mend(path)
    assert path.read_text() == '{"n": 1}\n'
    assert capsys.readouterr().err == ""


def test_a_full_disk_adds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_lines(path, [{"n": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    was = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UsageError, match="File too large; nothing was added: give another --out"):
            append_lines(path, [{"n": 2}, {"n": 3, "text": "x" * 2000}])
        with pytest.raises(UsageError, match=r"cannot be written \(File too large\)"):
            replace_lines(path, lambda old: [*old, {"n": 3, "text": "x" * 2000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, was)
    assert path.read_text() == '{"n": 1}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]


def write_many(path: Path, first: int, count: int) -> None:
    for n in range(first, first + count):
        if n % 7 == 0:
            replace_lines(path, lambda old, n=n: [*old, {"n": n}])  # type: ignore[misc]
        else:
            append_lines(path, [{"n": n, "text": "y" * 5000}])


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path, context = tmp_path / "x.jsonl", multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(path, 1000 * i, 60)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(numbers(path)) == [n for i in range(3) for n in range(1000 * i, 1000 * i + 60)]


def test_killed_writers_leave_whole_lines(tmp_path: Path) -> None:
    path, context = tmp_path / "x.jsonl", multiprocessing.get_context("fork")
    for i in range(5):
        writer = context.Process(target=write_many, args=(path, 10_000 * i, 10_000))
        before = path.stat().st_size if path.exists() else 0
        writer.start()
        while not path.exists() or path.stat().st_size < before + 100_000:
            time.sleep(0.01)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    append_lines(path, [{"n": -1}])
    found = numbers(path)
    assert found[-1] == -1
    for i in range(5):
        mine = [n for n in found if 10_000 * i <= n < 10_000 * (i + 1)]
        assert mine == list(range(10_000 * i, 10_000 * i + len(mine)))
        assert mine


def test_a_broken_line_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"n": 1}\n\n\x80\n{"n": 2}\n')
    with pytest.raises(UsageError, match=r"x.jsonl:3 is not a JSON object: repair or remove that line"):
        numbers(path)
    with pytest.raises(UsageError, match=r"x.jsonl:3"):
        replace_lines(path, lambda old: old)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for place in (file / "x.jsonl", tmp_path, Path("/proc/x.jsonl"), Path("/dev/full")):
        with pytest.raises(UsageError, match=r"^--out .*give a"):
            check_out(place)
    check_out(tmp_path / "deep" / "x.jsonl")
    assert not (tmp_path / "deep").exists()
    append_lines(tmp_path / "x.jsonl", [{"n": 1}])
    check_out(tmp_path / "x.jsonl")
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"n": 1}
