"""`vllm-sparq report`: one HTML page with the tables and pictures of a folder of results, and the pictures as PNG."""

from __future__ import annotations

import argparse
import base64
import html
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_sparq.backends import PRESETS
from vllm_sparq.benchmarks.common.lines import check_folder, check_out, make_folder, replace_text
from vllm_sparq.benchmarks.common.methods import DENSE
from vllm_sparq.benchmarks.common.records import read_records
from vllm_sparq.benchmarks.engine.cases import SKIPPED
from vllm_sparq.benchmarks.reporting.runs import apart, commit_of, kind_of, names_apart, newest, title_of
from vllm_sparq.benchmarks.reporting.tables import NO_DENSE, Record, Row, tabulate
from vllm_sparq.console import UsageError, place
from vllm_sparq.formats import QUANTIZED

NUMBER = re.compile(r"[-+]?[\d.,]+(%|x|$| at once|, slower| \.\. |, breaks)")
"""How the text of a figure begins."""

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884; }
table { border-collapse: collapse; font-size: .9rem; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8883; text-align: left; vertical-align: top; }
th { border-bottom-width: 2px; } td { white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; background: #fff; border-radius: 4px; }
figcaption { font-size: .9rem; opacity: .8; } .slower { color: #b3261e; } code { font-size: .9em; }
@media (prefers-color-scheme: dark) { .slower { color: #ff8a80; } }
"""

INTRODUCTION = """
<p>A language model writes a token at a time, and for each it reads a cache of everything before: the KV cache. With
long contexts that reading takes most of the time, and the cache most of the memory. <b>vllm-sparq</b> is a plugin for
vLLM that reads few cached tokens (SparQ) or stores them small (quantized blocks). This page compares such methods with
<b>dense</b> attention, vLLM's own, which reads everything: how fast they are, how much they hold, what they cost in
answers. Where a method loses, it says <span class="slower">slower than dense</span>.</p>
"""

GLOSSARY = {
    DENSE: "vLLM's own attention and cache; the baseline of every table. Where single ops are timed, this is our op "
    "that reads everything, and vLLM's is called vllm",
    **{name: preset.summary for name, preset in PRESETS.items()},
    ", ".join(QUANTIZED): "how full blocks are stored; with a plus, how they are read: sparq+int4",
    SKIPPED: "an engine whose output tokens attend to nothing: the limit of any speed-up, not a method",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-sparq report`."""
    parser.epilog = """\
Reads every *.jsonl below the folder, as `bench` and `eval` write them with --out and --record.

examples:
  vllm-sparq report results/ --out report.html
  vllm-sparq report --documents
"""
    parser.add_argument("results", type=place, nargs="?", help="a folder of results, or one file")
    parser.add_argument(
        "--out",
        type=place,
        default=Path("report.html"),
        help="the page, its pictures within; beside it, as PNG, in a folder: PAGE-pictures (default: report.html)",
    )
    parser.add_argument(
        "--documents",
        action="store_true",
        help="write what is generated of a checkout's documents instead: tables, options, figures",
    )


def main(args: argparse.Namespace) -> int:
    """Write the page and the pictures."""
    if args.documents:
        return write_documents()
    if args.results is None:
        raise UsageError("give a folder of results, or one file")
    if not args.results.exists():
        raise UsageError(f"{args.results}: there is no such file or folder")
    check_out(args.out)
    folder = args.out.with_name(f"{args.out.stem}-pictures")  # not the stem: a page is named after its records' folder
    check_folder(folder)
    records = read_records(args.results)
    if not records:
        raise UsageError(
            f"{args.results} holds no results: `vllm-sparq bench ... --out {args.results}/x.jsonl` makes some"
        )
    page, pictures = build(records)
    replace_text(args.out, page)
    if pictures:
        make_folder(folder)
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    where = f"{len(pictures)} pictures, also in {folder}" if pictures else "no pictures"
    print(f"{args.out}: {len(records)} results, {where}")
    return 0


def write_documents() -> int:
    """Write the generated parts of the documents of a checkout, and say which.

    Raises:
        UsageError: this is no checkout.
    """
    from vllm_sparq.benchmarks.reporting import figures, options_page, readme_table

    for path in (*readme_table.write_tables(), options_page.write_page(), *figures.write_figures()):
        print(path.relative_to(readme_table.ROOT))
    return 0


def build(records: Sequence[Record]) -> tuple[str, dict[str, bytes]]:
    """The page, which needs no other file, and its pictures as PNG."""
    pictures: dict[str, bytes] = {}
    parts = []
    for kind, (title, text, drawn) in SECTIONS.items():
        here = [record for record in records if kind_of(record) == kind]
        body = figure_of("needles", list(filter(is_needle, records)), pictures) if kind == "quality" else ""
        groups = apart(kind, newest(here))
        names = names_apart(kind)
        telling = [name for name, values in zip(names, zip(*groups, strict=True), strict=False) if len(set(values)) > 1]
        for values in sorted(groups):
            mine = [one for one in here if tuple(apart(kind, [one])) == (values,)]
            about = {name: value for name, value in zip(names, values, strict=True) if name in telling}
            body += f"<h3>{html.escape(heading(about))}</h3>\n" if about else ""
            body += "".join(figure_of(name, list(filter(fits, mine)), pictures) for name, fits in drawn.items())
            table = tabulate(kind, mine, here, telling)
            body += table_html(table.head, table.rows)
        if body:
            parts.append(f"<h2 id='{kind}'>{title}</h2>\n<p>{text}</p>\n{body}")
    return page_html(records, parts), pictures


def heading(about: Mapping[str, str]) -> str:
    """What the lines of a table share and those of its neighbours do not."""
    return ", ".join(
        value or f"{title_of(name)} not recorded" for name, value in about.items() if value or name != "gpu"
    )


def figure_of(name: str, records: Sequence[Record], pictures: dict[str, bytes]) -> str:
    """A picture, which joins the others under a name of its own; empty if there is nothing to draw."""
    from vllm_sparq.benchmarks.reporting.plots import draw

    if not records:
        return ""
    picture = draw(name, records)
    n_before = sum(other == name or other.startswith(f"{name}-") for other in pictures)
    name = f"{name}-{n_before + 1}" if n_before else name
    pictures[name] = png_of(picture.figure)
    codes = {commit_of(record) for record in newest(records)}
    mixed = f" Points are of {len(codes)} commits, which the table names: a method was in turns with those of its own."
    return figure_html(name, picture.caption + (mixed if len(codes) > 1 else ""), pictures[name])


def is_needle(record: Record) -> bool:
    """Whether a line is an example with a fact that was hidden somewhere."""
    return record.get("task") == "needle" and record.get("depth") is not None and "score" in record


def has_points_and_bytes(record: Record) -> bool:
    """Whether a line has a score of 100, of which more is better, and the bytes that it took."""
    return {"kv_bytes_moved", "kv_bytes_held", "score"} <= record.keys() and not record.get("lower_is_better")


def every(_: Record) -> bool:
    """Where a picture shows all lines of a kind."""
    return True


Fits = Callable[[Record], bool]

SECTIONS: dict[str, tuple[str, str, dict[str, Fits]]] = {
    "engine": (
        "Time per output token",
        "The whole engine, methods in turns on the same machine. The bound is the speed-up of an attention op that "
        "takes no time; at short contexts there is little to gain, since a step is mostly weights.",
        {"engine-speed": every},
    ),
    "requests": (
        "Whole requests",
        "<code>vllm bench latency</code> and <code>vllm bench throughput</code>, an engine of each method after the "
        "other. A method that stores tokens small, or fewer of them, answers more requests at a time.",
        {},
    ),
    "pressure": (
        "A pool that is too small",
        "Answers that outgrow the KV cache, the same trace for all. vLLM preempts requests and computes them again; "
        "evicting methods keep fewer tokens, or give up more of them under pressure.",
        {},
    ),
    "serve": (
        "Serving",
        "<code>vllm bench serve</code> against a real server of each method. TTFT: time to the first token; TPOT: time "
        "per later token; ITL: the gap between two tokens.",
        {"capacity": every},
    ),
    "ray": (
        "Offline generation on several replicas",
        "One data set of prompts, shared out over a fixed pool of engines by Ray. Every row says which replica and "
        "which attention class made it.",
        {"scaling": every},
    ),
    "quality": (
        "Answers",
        "What a method costs in answers, on the same prompts. Scores are of 100, more is better, but for the metric "
        "<code>bits_per_byte</code>: text that is given, in bits, fewer is better, and a plus beside dense is a loss.",
        {"quality-bytes": has_points_and_bytes},
    ),
    "ops": (
        "One attention op",
        "One layer, one output token, from a cold processor cache.",
        {"ops-speed": every, "ops-bandwidth": every},
    ),
    "ops_prefill": (
        "A chunk of a prompt",
        "One layer, from a cold processor cache: new tokens of a prompt attend to those before, in blocks of a format.",
        {},
    ),
}
"""Kind of line -> title, what it is, its pictures and which lines these show."""


def png_of(figure: Any) -> bytes:
    """The file of a figure, which is closed."""
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    return file.getvalue()


def figure_html(name: str, caption: str, png: bytes) -> str:
    """A picture inside the page."""
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    image = f"<img alt='{html.escape(name)}' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>\n"


def table_html(head: Row, rows: Sequence[Row]) -> str:
    """A table. Columns that say the same in every row stand above it, once; columns of figures are set to the right."""
    columns = dict(zip(head, zip(*rows, strict=True), strict=True))
    same = {name: cells[0] for name, cells in columns.items() if len(rows) > 1 and len(set(cells)) == 1}
    above = "; ".join(f"{name}: {cell}" for name, cell in same.items() if cell)
    columns = {name: cells for name, cells in columns.items() if name not in same}
    kinds = {
        name: " class='number'" if all(NUMBER.match(cell) for cell in cells if cell not in ("", NO_DENSE)) else ""
        for name, cells in columns.items()
    }
    out = [f"<p>{html.escape(above)}</p>\n" if above else "", "<table><thead><tr>"]
    out += [f"<th{kinds[name]}>{html.escape(name)}</th>" for name in columns]
    out.append("</tr></thead><tbody>\n")
    for row in zip(*columns.values(), strict=True):
        cells = [f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in zip(kinds.values(), row, strict=True)]
        out.append(f"<tr>{''.join(cells)}</tr>\n")
    text = "".join([*out, "</tbody></table>\n"])
    return text.replace("slower than dense", "<span class='slower'>slower than dense</span>")


def page_html(records: Sequence[Record], parts: Sequence[str]) -> str:
    """The whole page."""

    def seen(*names: str) -> str:
        values = {" ".join(str(r[n]) for n in names if r.get(n) is not None) for r in records}
        return html.escape(", ".join(sorted(value for value in values if value)) or "not recorded")

    gpus = f", {seen('gpu')}" if any(record.get("gpu") for record in records) else ""
    left_out = Counter(kind for kind in map(kind_of, records) if kind and kind not in SECTIONS)
    kinds = ", ".join(f"{n} of <code>{html.escape(kind)}</code>" for kind, n in left_out.items())
    rest = f" Without a table here: {kinds}." if kinds else ""
    dirty = " Some come from a tree with uncommitted changes." if any(r.get("dirty") for r in records) else ""
    about = (
        f"<p>{len(records)} results. Machine: {seen('cpu')}{gpus}. vLLM {seen('vllm')}, torch {seen('torch')}, "
        f"vllm-sparq {seen('vllm-sparq')} at commit {seen('commit')}.{dirty}{rest}</p>"
    )
    words = "".join(f"<tr><td><b>{html.escape(k)}</b></td><td>{html.escape(v)}</td></tr>" for k, v in GLOSSARY.items())
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<title>vllm-sparq: results</title><style>{STYLE}</style></head><body>\n"
        f"<h1>vllm-sparq: results</h1>\n{INTRODUCTION}{about}\n<table><tbody>{words}</tbody></table>\n"
        f"{''.join(parts)}</body></html>\n"
    )
