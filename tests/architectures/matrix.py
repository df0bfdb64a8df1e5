"""Every tiny model on stock vLLM and on our backends; `make models` runs all and writes the table of docs/models.md.

    python -m tests.architectures.matrix                      all models
    python -m tests.architectures.matrix llama granite-4      some of them
    python -m tests.architectures.matrix --counted            none, and what blocks beside states come to

What a model did is kept in build/models, or else on the page, which is written once all models are there and none is at
fault. A model for which vLLM imports a package that is not installed is left out, and its line on the page stays.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import random
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.architectures import page, seeded
from tests.architectures.configurations import MODELS, REFUSED, Model
from tests.engine.conftest import running_engine
from tests.engine.support import Prompts

DENSE, ALL_READ = "dense", "all read"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    ALL_READ: ("sparq", {"compression": 1, "k": 4096, "ranking": "model", "dense_below": 0}),
    "sparq 1/8": ("sparq", {"compression": 8, "min_k": 16, "dense_below": 0}),
    "quest": ("quest", {"k": 64, "dense_below": 0}),
    "infllm": ("infllm", {"k": 192, "local": 128, "dense_below": 0}),
    "flexgen": ("flexgen", {}),
    "kivi": ("kivi", {}),
    "h2o": ("h2o", {"budget": 128}),
}
RECORDS = Path(__file__).parents[2] / "build" / "models"
LENGTHS = (5, 64, 127, 128, 129, 200, 300, 700)
N_ANSWER = 16


def token_prompts(vocabulary: int = 512) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, vocabulary) for _ in range(n)] for n in LENGTHS]


@dataclass
class Row:
    """What a model did.

    Attributes:
        backends: name of a backend -> layers, with everything read.
        cells: method -> what came of it, for the page.
        refusal: why our backends do not serve it, or "".
        faults: what must not be.
    """

    name: str
    backends: dict[str, int] = field(default_factory=dict)
    cells: dict[str, str] = field(default_factory=dict)
    refusal: str = ""
    faults: list[str] = field(default_factory=list)


def answers(one: Model, folder: Path, backend: str, options: dict[str, Any], **more: Any) -> tuple[Any, dict[str, int]]:
    """Greedy answers, and the layers by backend."""
    arguments: dict[str, Any] = dict(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=one.dtype,
        load_format=seeded.LOAD_FORMAT,
        max_model_len=2048,
        max_num_batched_tokens=512,
    )
    prompts = token_prompts()
    with running_engine(backend, options, **{**arguments, **one.arguments, **more}) as llm:
        found = Prompts.answers(llm, prompts, N_ANSWER)
        layers: dict[str, int] = {}
        if backend != "CPU_ATTN":
            (report,) = llm.collective_rpc("attention_report")
            for layer in report.values():
                layers[layer["backend"]] = layers.get(layer["backend"], 0) + 1
    return found, layers


def same(some: list[list[int]], others: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(some, others, strict=True))


def run(name: str, methods: tuple[str, ...] = tuple(METHODS)) -> Row:
    """A model on stock vLLM and then on each method."""
    one, row = MODELS[name], Row(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = one.write(Path(temporary) / name)
        if name in REFUSED:
            row.refusal, row.faults = _refusal(one, folder, ALL_READ)
            return row
        dense, _ = answers(one, folder, "CPU_ATTN", {})
        if len({tuple(answer) for answer in dense}) < len(dense) / 2:
            row.faults.append("stock answers are too much alike to tell anything")
        n_like_itself = len(dense)
        if one.dtype != "float32":  # what stock makes of the same prompts in other chunks
            again, _ = answers(one, folder, "CPU_ATTN", {}, max_num_batched_tokens=64)
            n_like_itself = same(again, dense)
        for method in methods:
            if method in one.without:
                row.cells[method] = "refused"
                row.faults += _refusal(one, folder, method)[1]
                continue
            found, layers = answers(one, folder, *METHODS[method])
            n_first = sum(a[0] == b[0] for a, b in zip(found, dense, strict=True))
            if method == ALL_READ:
                row.backends = layers
                _judge_all_read(row, same(found, dense), n_like_itself, len(dense))
            else:
                row.cells[method] = f"{n_first}/{len(dense)}"
                if n_first < len(dense) / 4:  # random weights: a code's rounding turns close answers over
                    row.faults.append(f"{method}: only {n_first} first tokens of {len(dense)} agree")
            gc.collect()
    return row


def _judge_all_read(row: Row, n_same: int, n_like_itself: int, n_all: int) -> None:
    if n_same == n_all:
        row.cells[ALL_READ] = "identical"
    else:
        row.cells[ALL_READ] = f"{n_same}/{n_all}; stock itself {n_like_itself}/{n_all}"
    if n_same < n_like_itself:
        row.faults.append(f"{n_same} of {n_all} answers are stock's; of its own in other chunks {n_like_itself} are")


def _refusal(one: Model, folder: Path, method: str) -> tuple[str, list[str]]:
    """What a method's start says of a model that it refuses, and what must not be."""
    try:
        answers(one, folder, *METHODS[method])
    except (ValueError, NotImplementedError) as error:
        found = re.search(r"vllm-sparq cannot start: (.*?)(?: \[type=|$)", str(error), re.DOTALL)
        return ("", [f"refused in other words: {error}"]) if found is None else (found[1].strip(), [])
    return "", ["not refused"]


def main() -> int:
    if sys.argv[1:] == ["--counted"]:
        known = page.rows()
        page.write([known[name] for name in MODELS], counted=True)
        return 0
    seeded.register()
    RECORDS.mkdir(parents=True, exist_ok=True)
    if not sys.argv[1:]:
        for record in RECORDS.glob("*.json"):
            record.unlink()
    for name in sys.argv[1:] or list(MODELS):
        package = MODELS[name].imports
        if package is not None and importlib.util.find_spec(package) is None:
            print(f"left out: {name}, for which vLLM imports {package}, which is not installed", flush=True)
            continue
        try:
            row = run(name)
        except Exception as error:  # whatever vLLM raises; the others go on
            row = Row(name, faults=[f"{type(error).__name__}: {str(error).strip()[:300]}"])
        (RECORDS / f"{name}.json").write_text(json.dumps(asdict(row)))
        print(row, flush=True)
    rows = page.rows() | {path.stem: Row(**json.loads(path.read_text())) for path in RECORDS.glob("*.json")}
    found = [rows[name] for name in MODELS if name in rows]
    faulty = [row.name for row in found if row.faults]
    print(f"{len(found)} of {len(MODELS)} models, at fault: {', '.join(faulty) or 'none'}")
    if len(found) == len(MODELS) and not faulty:
        page.write(found, counted=not sys.argv[1:])
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
