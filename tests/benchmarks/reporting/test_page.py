"""`vllm-sparq report`: what it refuses, what it says, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vllm_sparq.benchmarks.reporting import page as report
from vllm_sparq.benchmarks.reporting import plots as report_plots
from vllm_sparq.cli import main

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"

ORIGIN = {"commit": "abc", "dirty": True, "cpu": "a <fast> processor", "vllm": "0.32.0", "torch": "2.13"}


def records() -> list[dict[str, Any]]:
    """Some of every kind; int4 loses everywhere."""
    found: list[dict[str, Any]] = []
    for method, slope in (("dense", 2.0), ("int4", 4.0), ("sparq", 0.5)):
        for context in (1024, 4096, 16384):
            times = {"median_tpot_ms": 10 + slope * context / 1024, "speedup_vs_vllm": 2 / slope, "share_of_bound": 0.5}
            found.append({"bench": "engine", "model": "m", "method": method, "context": context, "batch": 1, **times})
        server = {"kv_capacity_tokens": 1000, "max_concurrency": 2.5, "preemptions": 3, "attention": "4 × Impl"}
        served = {"output_throughput": 100 / slope, "mean_ttft_ms": 1.0, "mean_tpot_ms": 2.0, "p99_itl_ms": 3.0}
        found.append({"bench": "serve", "model": "m", "method": method, "rate": "inf", **served, "sparq": server})
        whole = {"input_len": 500, "output_len": 30, "num_prompts": 16, "command": "throughput", "elapsed_time": slope}
        whole["tokens_per_second"] = 100 / slope
        found.append({"bench": "requests", "model": "m", "method": method, **whole, "sparq": server})
        trace = {"n": 8, "rate": 2.0, "prompt_len": 100, "output_len": 50, "pool": 4.0, "seed": 0}
        rates = {"request_throughput": 1 / slope, "p99_ttft_ms": 5.0, "p99_tpot_ms": 6.0}
        found.append({"bench": "pressure", "model": "m", "method": method, **trace, **rates, **server})
        for replicas in (1, 2):
            pool = {"replicas": replicas, "runner": "data", "rows": 8, "attention": "4 × Impl"}
            shared = {"output_tokens_per_second": replicas / slope, "per_replica": {"a": {"rows": 8}}}
            found.append({"bench": "ray", "model": "m", "method": method, **pool, **shared})
        for length in (512, 2048):
            bytes_ = {"kv_bytes_moved": 1e6 * slope, "kv_bytes_held": 100.0}
            cell = {"task": "needle", "length": length, "method": method, "n": 5, "metric": "x", "score": 90.0}
            found.append({"bench": "quality", **cell, **bytes_})
            for i in range(5):
                found.append({"task": "needle", "length": length, "method": method, "depth": i / 5, "score": i % 2})
    shape = {"context": 1024, "batch": 1, "heads": 8, "kv_heads": 2, "head_dim": 64, "bandwidth_gb_per_s": 60.0}
    for method in ("vllm", "dense", "sparq"):
        timed = {"median_us": 10.0, "gb_per_s": 20.0, "speedup_vs_vllm": 1.0, "speedup_vs_dense": 0.5}
        found.append({"bench": "ops", "method": method, **shape, **timed})
        chunk = {"chunk": 2048, "share_of_bound": 0.7, "median_us": 1e5, "speedup_vs_vllm": 1.5}
        found.append({"bench": "ops_prefill", "method": method, **shape, **chunk})
    return [record | ORIGIN for record in found]


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_everything_is_on_the_page_and_loses_where_it_loses(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(write(tmp_path / "results", records())), "--out", str(out)]) == 0
    page = out.read_text()
    pictures = {path.stem for path in (tmp_path / "page-pictures").glob("*.png")}
    assert pictures == set(report_plots.PICTURES)
    assert page.count("<img ") == len(pictures)
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r"(src|href)=['\"](?!data:)", page)  # it needs no other file
    for section in report.SECTIONS:
        assert f"<h2 id='{section}'>" in page
    for section in ("engine", "requests", "pressure", "serve", "ray"):
        rows = re.findall(r"<tr>(.*?)</tr>", page.split(f"<h2 id='{section}'>")[1].split("<h2 ")[0])
        assert any("int4" in row for row in rows)
        assert all(("slower than dense" in row) == ("int4" in row) for row in rows)
    assert "a &lt;fast&gt; processor" in page
    assert "uncommitted" in page


@pytest.mark.parametrize("name", ["results.html", "results"])
def test_pictures_go_beside_the_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never among the records, whose folder a page is easily named after."""
    results = write(tmp_path / "results", records())
    (tmp_path / "elsewhere").mkdir()
    out = (tmp_path if name.endswith(".html") else tmp_path / "elsewhere") / name
    assert main(["report", str(results), "--out", str(out)]) == 0
    assert [path.name for path in results.iterdir()] == ["x.jsonl"]
    assert len(list((out.parent / "results-pictures").glob("*.png"))) == len(report_plots.PICTURES)


def test_the_newest_of_the_same_measurement_counts() -> None:
    old, new = ({"bench": "ray", "method": "dense", "replicas": 1, "seconds": s} for s in (1, 2))
    other = {"bench": "ray", "method": "dense", "replicas": 2, "seconds": 3}
    assert [one["seconds"] for one in report.newest([old, other, new])] == [2, 3]


def test_lines_and_where_they_cross() -> None:
    lines = [{"context": 1000 * x, "median_tpot_ms": 3 + 2 * x} for x in (1, 2, 4)]
    slope, intercept = report_plots.fitted(lines) or (0, 0)
    assert (1000 * slope, intercept) == pytest.approx((2, 3))
    assert report_plots.fitted(lines[:1]) is None
    assert report_plots.break_even((0.001, 5.0), (0.002, 3.0)) == pytest.approx(2000)
    assert report_plots.break_even((0.001, 2.0), (0.002, 3.0)) == 0
    assert report_plots.break_even((0.003, 2.0), (0.002, 3.0)) is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no results"),
        ([{"schema": 99}], "is a result of schema 99, and this version reads schemas 1 to 2"),
    ],
)
def test_bad_folders(
    lines: list[dict[str, Any]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(write(tmp_path / "r", lines)), "--out", str(tmp_path / "x.html")]) == 2
    assert message in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err


def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Without an error on its console; with every picture decoded and every table filled."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    page, pictures = report.build(records())
    probe = """<script>
window.addEventListener('load', () => {
  const images = [...document.images].filter(image => image.complete && image.naturalWidth > 100).length;
  const rows = [...document.querySelectorAll('table')].map(table => table.rows.length);
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  document.body.setAttribute('data-seen', JSON.stringify({images, rows, wide}));
});</script>"""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", probe + "</body>"))
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
        "--window-size=1200,900",
    ]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    done = subprocess.run([browser, *words], capture_output=True, text=True, timeout=120, check=True)
    seen = re.search(r"data-seen=\"([^\"]*)\"", done.stdout)
    assert seen, done.stderr[-2000:]
    found = json.loads(seen[1].replace("&quot;", '"'))
    assert found["images"] == len(pictures) == len(report_plots.PICTURES)
    assert len(found["rows"]) == 1 + len(report.SECTIONS)
    assert min(found["rows"]) >= 4
    assert not found["wide"]
    assert "CONSOLE" not in done.stderr


def test_own_results_make_a_page() -> None:
    from vllm_sparq.benchmarks.common.records import read_records

    page, pictures = report.build(read_records(RESULTS))
    assert {"engine-speed", "ops-speed", "ops-bandwidth"} <= pictures.keys()
    assert "Llama-3.2-1B shape" in page
