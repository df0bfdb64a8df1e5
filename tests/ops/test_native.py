"""The C interface: Python and C++ state the same, and a library that was compiled from other sources is refused."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from tests.ops import tolerances
from tests.ops.c_interface import differences, of_python, of_source, source
from tests.ops.cases import Case, build, load, write_in_chunks
from vllm_sparq.formats import FORMATS, TOKEN_4, Coding, Format
from vllm_sparq.ops import instruction_sets, native
from vllm_sparq.retention import Rank

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def test_python_and_cpp_state_the_same_interface() -> None:
    assert differences(of_source(source()), of_python()) == []


def test_every_kind_of_thing_is_compared() -> None:
    """A parser that finds nothing would find no difference either."""
    cpp = of_source(source())
    assert cpp.functions.keys() == native.FUNCTIONS.keys()
    assert len(cpp.structs["Pages"]) == len(native.PagesStruct._fields_) > 15
    assert cpp.enums["DType"] == {"bf16": 0, "fp16": 1, "fp32": 2}
    assert {"SPAN_TOKENS", "WINDOW_SPANS", "ABI_VERSION"} <= cpp.constants.keys()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (r"(int64_t page_stride;)", r"\1 int64_t more;", "structs: Pages"),
        (r"int64_t records;", r"int64_t records_at;", "structs: Pages"),
        (r"(int32_t n_kv_heads;)([^}]*?)(int32_t block_size;)", r"\3\2\1", "structs: Pages"),
        (r"int32_t staged_per_page;", r"int64_t staged_per_page;", "structs: Pages"),
        (r"bf16 = 0, fp16 = 1", r"bf16 = 1, fp16 = 0", "enums: DType"),
        (r"int4 = 1, int8 = 2", r"int4 = 2, int8 = 1", "enums: RankingType"),
        (r"int32_t r;", r"int32_t probs;", "structs: SparqRead"),
        (r"int32_t sinks, sparq::Rank", r"int64_t sinks, sparq::Rank", "functions: sparq_evict"),
        (r"sparq::SparqRead& read", r"sparq::SpansRead& read", "functions: sparq_sparq_decode"),
        (r"constexpr int WINDOW_SPANS = 8", r"constexpr int WINDOW_SPANS = 9", "constants: WINDOW_SPANS"),
        (r"(const int32_t\* key_start_loc,)", r"\1 int32_t more,", "functions: sparq_prefill"),
        (r"(const float\* sinks;)([^}]*?)(float scale;)", r"\3\2\1", "structs: Logits"),
    ],
)
def test_a_change_in_cpp_alone_is_found(old: str, new: str, told: str) -> None:
    text, n_changes = re.subn(old, new, source())
    assert n_changes
    found = differences(of_source(text), of_python())
    assert [line for line in found if line.startswith(told)], found


@pytest.mark.parametrize("field", ["added", "dropped", "swapped", "retyped"])
def test_a_change_of_pages_in_python_alone_is_found(field: str) -> None:
    python = of_python()
    fields = list(python.structs["Pages"])
    changed = {
        "added": [*fields, ("more", "l")],
        "dropped": fields[:-1],
        "swapped": [fields[1], fields[0], *fields[2:]],
        "retyped": [(fields[0][0], "l"), *fields[1:]],
    }[field]
    mutant = replace(python, structs={**python.structs, "Pages": tuple(changed)})
    assert differences(of_source(source()), mutant)[0].startswith("structs: Pages")


@pytest.mark.parametrize("name", native.FUNCTIONS)
def test_a_changed_letter_in_python_alone_is_found(name: str) -> None:
    python, cpp = of_python(), of_source(source())
    letters = python.functions[name]
    for i in range(len(letters)):
        for other in set(native.C_TYPES) - {letters[i]}:
            mutant = {**python.functions, name: (*letters[:i], other, *letters[i + 1 :])}
            assert differences(cpp, replace(python, functions=mutant))[0].startswith(f"functions: {name}")
    assert differences(cpp, replace(python, functions={**python.functions, name: letters[:-1]}))


@pytest.mark.parametrize("kind", native.ENUMS)
def test_swapped_enum_values_in_python_alone_are_found(kind: type) -> None:
    python = of_python()
    (first, a), (second, b), *rest = python.enums[kind.__name__].items()
    mutant = replace(python, enums={**python.enums, kind.__name__: {first: b, second: a, **dict(rest)}})
    assert differences(of_source(source()), mutant)[0].startswith(f"enums: {kind.__name__}")


def test_kernels_know_the_ranks_of_retentions() -> None:
    assert [rank.name for rank in native.Rank] == [*get_args(Rank)]


@pytest.mark.parametrize("isa", instruction_sets.of_machine(platform.machine()))
def test_the_libraries_have_the_interface_of_this_code(isa: str) -> None:
    path = native.LIBRARIES / f"libsparq_{isa}.so"
    if not path.is_file():
        pytest.skip(f"{path} is not built")
    native.check_abi(path)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("body", "theirs"),
    [
        ('extern "C" void sparq_write() {}', "none"),
        ('extern "C" unsigned long sparq_abi() { return 0x2a; }', "000000000000002a"),
    ],
    ids=["no number", "another number"],
)
def test_an_older_library_is_refused_with_the_remedy(
    body: str, theirs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = native.find().isa
    if best is None:
        pytest.skip(f"no CPU kernels: {native.find().reason}")
    library = tmp_path / f"libsparq_{best}.so"
    (tmp_path / "old.cpp").write_text(body)
    assert COMPILER is not None
    subprocess.run([COMPILER, "-shared", "-fPIC", tmp_path / "old.cpp", "-o", library], check=True)
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    native.find.cache_clear()
    try:
        with pytest.raises(
            OSError, match=rf"{library} has the C interface {theirs}, .*{native.abi():016x}.*make setup"
        ):
            native.find()
    finally:
        native.find.cache_clear()


def test_a_library_of_another_architecture_is_refused_with_the_remedy(tmp_path: Path) -> None:
    found = native.find().library
    if found is None:
        pytest.skip(f"no CPU kernels: {native.find().reason}")
    library = tmp_path / found.name
    header = bytearray(found.read_bytes())
    header[18:20] = (243).to_bytes(2, "little")  # e_machine: RISC-V
    library.write_bytes(header)
    with pytest.raises(OSError, match=rf"{library} cannot be loaded on this .*another architecture.*make setup"):
        native.check_abi(library)


@pytest.mark.parametrize("change", ["constant", "enum", "struct", "letter", "version"])
def test_the_number_of_the_interface_depends_on_all_of_it(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.abi()
    if change == "constant":
        monkeypatch.setitem(native.CONSTANTS, "LEAST_SPANS", 4)
    elif change == "enum":
        monkeypatch.setattr(native, "ENUMS", native.ENUMS[1:])
    elif change == "struct":
        monkeypatch.setattr(native, "STRUCTS", native.STRUCTS[1:])
    elif change == "letter":
        monkeypatch.setitem(native.FUNCTIONS, "sparq_evict", "PRppil")
    else:
        monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert native.abi() != before


BY_CHANNEL = Coding(bits=4, group=32, channels=True)
NEW_FORMATS = {
    "zero8": Format(Coding(bits=8, group=64), Coding(bits=8, group=64)),
    "token2": Format(Coding(bits=2, group=32), Coding(bits=2, group=32)),
    "channel8": Format(Coding(bits=8, group=32, channels=True), Coding(bits=8, group=32)),
    "k2v8": Format(Coding(bits=2, group=32, channels=True), Coding(bits=8, group=0, scale_numbers=1)),
    "k4v8": Format(Coding(bits=4, group=64), Coding(bits=8, group=0, scale_numbers=1)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", NEW_FORMATS)
def test_a_format_is_a_row_of_the_table(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are told its numbers; they know none by name."""
    monkeypatch.setitem(FORMATS, name, NEW_FORMATS[name])
    case = Case(head_size=128, block_size=64, dtype=dtype, format=name, ranking=None, value_sum=False, lens=(200, 64))
    want, got = build(case), write_in_chunks(case, case.tokens(), load("write", "cpu"), [100], "cpu")
    for row, s in zip(want.block_table, case.lens, strict=False):
        full = row[: s // case.block_size].long()
        for part in ("key_codes", "key_scales", "value_codes", "value_scales"):
            assert torch.equal(getattr(got.pages, part)[full], getattr(want.pages, part)[full]), part
    out, reference = want.decode(load("dense_decode", "cpu")), want.decode(load("dense_decode", "reference"))
    torch.testing.assert_close(out, reference, **tolerances.OUT[dtype])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (lambda: Coding(bits=6, group=16), "codes of 6 bits: use 2, 4 or 8"),
        (lambda: Coding(bits=4, group=4), "group 4 is not a multiple of 8 elements: use one"),
        (lambda: Coding(bits=4, group=0, scale_numbers=1), "got bits=4 and midpoints=False: use scale_numbers 2"),
        (lambda: Coding(bits=8, group=0, scale_numbers=1, midpoints=True), "midpoints=True: use scale_numbers 2"),
        (lambda: Format(BY_CHANNEL, BY_CHANNEL), "leave channels to K"),
        (lambda: Format(replace(BY_CHANNEL, bits=8, scale_numbers=1), TOKEN_4), "K by channel .* scale_numbers 2"),
    ],
)
def test_a_row_that_no_op_reads_is_refused(row: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        row()


def test_the_libraries_may_lie_elsewhere(tmp_path: Path) -> None:
    """As those of `make sanitize` do."""
    code = "from vllm_sparq.ops import native; print(native.find().reason)"
    env = {**os.environ, "VLLM_SPARQ_LIBRARIES": str(tmp_path)}
    env.pop(native.OVERRIDE, None)
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert f"no compiled kernels in {tmp_path}" in said or "has no AVX2" in said
