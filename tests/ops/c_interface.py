"""The interface between Python and the C++ kernels, as each of them states it, and where the two differ."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_sparq.ops import native

CSRC = Path(native.__file__).parents[1] / "csrc"

KINDS = {"int64_t": "l", "int32_t": "i", "float": "f"}
"""C type -> the letter of `native.C_TYPES`; a pointer is ``p``, an enum ``i``, a struct's address has its own."""


STRUCT_LETTERS = {
    kind._type_.__name__.removesuffix("Struct"): letter
    for letter, kind in native.C_TYPES.items()
    if issubclass(kind, ctypes._Pointer)
}


@dataclass(frozen=True)
class Interface:
    """Types are letters of `native.C_TYPES`, or of a field names of structs.

    Attributes:
        functions: name -> types of the arguments.
        structs: name -> fields with their types, in order.
        enums: name -> values by name.
        constants: by name.
    """

    functions: Mapping[str, tuple[str, ...]]
    structs: Mapping[str, tuple[tuple[str, str], ...]]
    enums: Mapping[str, Mapping[str, int]]
    constants: Mapping[str, int]


def source() -> str:
    """The text of all kernels."""
    return "\n".join(path.read_text() for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cpp"))


def of_source(text: str) -> Interface:
    """What C++ text says.

    Raises:
        ValueError: two declarations of a function differ, or a struct that Python knows cannot be found.
    """
    text = re.sub(r"//.*", "", text)
    enums = {name: _enumerators(body) for name, body in re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", text)}
    functions: dict[str, tuple[str, ...]] = {}
    for name, arguments in re.findall(r"SPARQ_API\s+void\s+(\w+)\(([^)]*)\)", text):
        kinds = tuple(_kind(argument.rsplit(None, 1)[0], enums) for argument in arguments.split(","))
        if functions.setdefault(name, kinds) != kinds:
            raise ValueError(f"{name} is declared with {functions[name]} and with {kinds}")
    constants = {name: int(value) for name, value in re.findall(r"constexpr int ([A-Z_]+) = (\d+);", text)}
    structs = {name: _fields(text, name, enums) for name in of_python().structs}
    return Interface(functions, structs, enums, constants)


def _enumerators(body: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", body)}


def _fields(text: str, name: str, enums: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Declarations before the first method of a struct."""
    found = re.search(rf"struct {name} \{{(.*?)\n\}};", text, re.DOTALL)
    if found is None:
        raise ValueError(f"no `struct {name} {{` in csrc")
    fields = []
    for line in found[1].split(";"):
        if "(" in line:
            break
        if declared := re.fullmatch(r"\s*((?:const )?\w+\*?) ([\w, ]+)", line):
            fields += [(field, _kind(declared[1], enums)) for field in declared[2].split(", ")]
    return tuple(fields)


def _kind(declared: str, enums: Mapping[str, object]) -> str:
    plain = declared.replace("const ", "").replace("sparq::", "").strip()
    if plain.endswith("*"):
        return "p"
    if plain.endswith("&"):
        return STRUCT_LETTERS.get(plain[:-1], plain)
    return "i" if plain in enums else KINDS.get(plain, plain)


def of_python() -> Interface:
    """What `vllm_sparq.ops.native` says."""
    letters = {kind: letter for letter, kind in native.C_TYPES.items()}
    structs = {}
    for struct in native.STRUCTS:
        fields = [(name, letters.get(kind) or _struct_name(kind)) for name, kind in struct._fields_]
        structs[_struct_name(struct)] = tuple(fields)
    return Interface(
        {name: tuple(signature) for name, signature in native.FUNCTIONS.items()},
        structs,
        {kind.__name__: {member.name: member.value for member in kind} for kind in native.ENUMS},
        native.CONSTANTS | {"ABI_VERSION": native.ABI_VERSION},
    )


def _struct_name(struct: type[ctypes.Structure]) -> str:
    return struct.__name__.removesuffix("Struct")


def differences(cpp: Interface, python: Interface) -> list[str]:
    """In words; empty where both mean the same. Constants of C++ alone are its own business."""
    found = []
    for what in ("functions", "structs", "enums", "constants"):
        theirs, ours = getattr(cpp, what), getattr(python, what)
        names = ours if what == "constants" else theirs | ours
        for name in names:
            if theirs.get(name) != ours.get(name):
                found.append(f"{what}: {name} is {theirs.get(name)} in C++ and {ours.get(name)} in Python")
    return found
