"""Faults that the tests must find: each is put into a copy of the checkout, and the tests that should see it run there.

    python tests/mutations.py                     # all of them: a table, and exit code 1 if one was not found
    python tests/mutations.py tie nibble          # those whose name has one of these words
    python tests/mutations.py --root ../older     # in another checkout

A mutation is a text that stands exactly once in the sources, and what a plausible slip would have made of it. Files
are not named, so that moving code does not break the list; a text that is gone, or is there twice, ends the run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("vllm_sparq", "attention_backends", "scheduler")
SUFFIXES = (".py", ".cpp", ".h")
PARTS = ("attention_backends", "scheduler", "benchmarks")
"""Folders that install below the package (pyproject.toml)."""


@dataclass(frozen=True)
class Mutation:
    """``find`` becomes ``replace``; ``tests`` are arguments of pytest; paths that do not exist are left out."""

    name: str
    find: str
    replace: str
    tests: str


LAYOUT = "tests/test_layout.py tests/ops/test_write_formats.py -k 'not triton'"
SELECTION = "tests/ops/test_sparq_decode.py tests/ops/test_quest_decode.py tests/ops/test_infllm_decode.py"
EVICTING = "tests/scheduler tests/attention_backends tests/engine/test_eviction.py"

MUTATIONS = (
    # Layout.
    Mutation(
        "layout: a staged token one place too far",
        "return divmod(slot, self.staged_per_page)",
        "return divmod(slot + 1, self.staged_per_page)",
        LAYOUT,
    ),
    Mutation(
        "layout: staging blocks rounded down",
        "return 0 if self.quantized is None else -(-self.block_size // self.staged_per_page)",
        "return 0 if self.quantized is None else self.block_size // self.staged_per_page",
        LAYOUT,
    ),
    Mutation(
        "layout: pages not of whole bytes per token",
        "math.lcm(ALIGNMENT, self.block_size))",
        "ALIGNMENT)",
        LAYOUT,
    ),
    # C++ kernels.
    Mutation(
        "C++: of equal scores the newest stay",
        "ties &= ~(1u << (31 - __builtin_clz(ties)));",
        "ties &= ties - 1;",
        f"{SELECTION} -k cpu",
    ),
    Mutation(
        "C++: the two tokens of a byte in the wrong nibble",
        "fma(high, set1(16.0f), low)",
        "fma(low, set1(16.0f), high)",
        "tests/ops/test_write.py -k cpu",
    ),
    Mutation(
        "C++: the newest block counted from the length, not from the last token",
        "return (len - 1) / pages->block_size;",
        "return len / pages->block_size;",
        "tests/ops/test_dense_decode.py tests/ops/test_sparq_decode.py -k cpu",
    ),
    # Triton kernels.
    Mutation(
        "Triton: the two tokens of a byte in the wrong nibble",
        "early | (late << 4)",
        "(early << 4) | late",
        "tests/ops/test_write.py -k triton",
    ),
    Mutation(
        "Triton: one too few of the tokens with equal scores",
        "oldest = seen + tl.cumsum(equal.to(tl.int32), 0) <= n_equal",
        "oldest = seen + tl.cumsum(equal.to(tl.int32), 0) < n_equal",
        f"{SELECTION} -k triton",
    ),
    Mutation(
        "Triton: a full newest block taken for codes",
        "return tl.maximum(context_len - 1, 0) // N * N",
        "return context_len // N * N",
        "tests/ops/test_dense_decode.py tests/ops/test_sparq_decode.py -k triton",
    ),
    # Block managers, and what a step brings.
    Mutation(
        "manager: the last block of a budget goes back too",
        "capacity = -(-self._with_staging(self.phase(request_id).budget) // self.block_size)",
        "capacity = self._with_staging(self.phase(request_id).budget) // self.block_size",
        EVICTING,
    ),
    Mutation(
        "manager: a preempted request is still taken to be answering",
        "        self.answering.discard(request_id)\n",
        "",
        EVICTING,
    ),
    Mutation(
        "metadata: a replayed row does not see itself",
        "seq_lens=(step.seq_lens[requests] - countdown + 1).to(torch.int32)",
        "seq_lens=(step.seq_lens[requests] - countdown).to(torch.int32)",
        "tests/attention_backends tests/engine/test_sameness.py -k 'not triton'",
    ),
)

BUILD = """
import runpy, sys, setuptools

isa, setup = sys.argv[1], setuptools.setup

def of_one(**settings):
    settings["ext_modules"] = [one for one in settings["ext_modules"] if one.name.endswith(f"sparq_{isa}")]
    setup(**settings)

setuptools.setup = of_one
sys.argv = ["setup.py", "-q", "build_ext", "--inplace", "--force"]
runpy.run_path("setup.py")
"""
"""Compiles the kernels of one instruction set, the one that the tests run with."""

WHERE = """
import pathlib, sys
import vllm_sparq, vllm_sparq.attention_backends, vllm_sparq.scheduler, vllm_sparq.benchmarks
here = pathlib.Path.cwd().resolve()
for name in list(sys.modules):
    if name.split(".")[0] == "vllm_sparq":
        assert here in pathlib.Path(sys.modules[name].__file__).resolve().parents, sys.modules[name].__file__
from vllm_sparq.ops import native
print(native.find().isa)
"""


def locate(root: Path, find: str) -> Path:
    """The one source file that has the text, once.

    Raises:
        SystemExit: it is nowhere, or in several places.
    """
    files = [path for part in SOURCES for path in (root / part).rglob("*") if path.suffix in SUFFIXES]
    places = [path for path in sorted(files) for _ in range(path.read_text().count(find))]
    if len(places) != 1:
        names = [str(path.relative_to(root)) for path in places]
        raise SystemExit(f"{find!r} must stand once in the sources; found in {names}: adapt tests/mutations.py")
    return places[0]


def copy_checkout(root: Path, folder: Path) -> None:
    """What git knows or would take in, and the compiled kernels, so that it is what Python imports there."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    shutil.copytree(root / "vllm_sparq" / "lib", folder / "vllm_sparq" / "lib")
    for part in PARTS:
        (folder / "vllm_sparq" / part).symlink_to(folder / part)


def run(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def run_tests(folder: Path, words: list[str]) -> tuple[bool, str | None]:
    """Whether they are red, and then the first that failed (None if the process was killed).

    Raises:
        RuntimeError: pytest itself failed.
    """
    done = run(folder, ["-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=no", *words])
    if done.returncode > 1:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}")
    failed = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode != 0, failed[0].split(" - ")[0] if failed else None


def is_found(mutation: Mutation, root: Path) -> tuple[bool, str]:
    """Whether a test is red with the mutation and green without it, and which.

    Raises:
        RuntimeError: what ran was not the copy, it does not compile, pytest itself failed, or the test is red anyway.
    """
    source = locate(root, mutation.find)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_checkout(root, folder)
        mutated = folder / source.relative_to(root)
        mutated.write_text(mutated.read_text().replace(mutation.find, mutation.replace))
        where = run(folder, ["-c", WHERE])
        if where.returncode:
            raise RuntimeError(f"the copy is not what Python imports: {where.stderr[-1000:]}")
        if mutated.suffix != ".py":
            built = run(folder, ["-c", BUILD, where.stdout.split()[-1]])
            if built.returncode:
                raise RuntimeError(f"{mutation.name}: does not compile: {built.stderr[-2000:]}")
        words = shlex.split(mutation.tests)
        words = [word for word in words if not word.startswith("tests/") or (folder / word).exists()]
        is_red, first = run_tests(folder, words)
        if is_red:
            shutil.copy2(source, mutated)
            shutil.copytree(root / "vllm_sparq" / "lib", folder / "vllm_sparq" / "lib", dirs_exist_ok=True)
            if run_tests(folder, [first] if first else words)[0]:
                raise RuntimeError(f"{mutation.name}: {first or mutation.tests} is red without it too")
        return is_red, first or ("the process was killed" if is_red else "nothing failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("words", nargs="*", help="only mutations whose name has one of these")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to mutate (this one)")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if not args.words or any(word in m.name for word in args.words)]
    for mutation in chosen:
        locate(args.root, mutation.find)
    n_green = 0
    for mutation in chosen:
        begin = time.monotonic()
        found, first = is_found(mutation, args.root.resolve())
        n_green += not found
        colour = "red  " if found else "GREEN"
        print(f"{colour}  {mutation.name}  ({time.monotonic() - begin:.0f} s)\n       {first[:150]}", flush=True)
    print(f"{len(chosen) - n_green} of {len(chosen)} faults found")
    return int(n_green > 0)


if __name__ == "__main__":
    sys.exit(main())
