"""Codes become the right numbers in compiled kernels too: the PTX that the interpreter leaves out, for every byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.ops import ptx
from vllm_sparq.ops.triton_common import count, unpack

BYTES = torch.arange(256, dtype=torch.uint8)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Bits:
    """What an instruction has made, until it is said what its bits are of."""

    def __init__(self, words: list[int]) -> None:
        self.words = words

    def to(self, dtype: torch.dtype, bitcast: bool) -> torch.Tensor:
        assert bitcast
        return torch.cat([ptx.numbers(word, dtype) for word in self.words])


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions as the compiler sees them, their text run over four bytes at a time."""

    def inline_asm(asm: str, constraints: str, args: list[torch.Tensor], dtype: Any, pure: bool, pack: int) -> Bits:
        assert (constraints, pure, pack) in [("=r,=r,r", True, 4), ("=r,r", True, 1)]
        words = args[0].view(torch.int32).tolist()
        return Bits([made for word in words for made in ptx.run(asm, [word & ptx.WORD])])

    for module in (count, unpack):
        monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(unpack.tl, "inline_asm_elementwise", inline_asm)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("name", TYPES)
def test_codes_of_every_run(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in range(8 // bits):
        mask = (1 << bits) - 1
        made = unpack.small_codes.fn(BYTES, run * bits, mask, name == "bf16").to(TYPES[name], bitcast=True)
        assert made.tolist() == ((BYTES.int() >> run * bits) & mask).tolist()


@pytest.mark.parametrize("name", TYPES)
def test_signed_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack.tl, "bfloat16", torch.bfloat16)
    made = unpack.signed_numbers.fn(BYTES, TYPES[name])
    assert made.tolist() == BYTES.view(torch.int8).tolist()


def test_a_counter_beyond_its_word_is_none() -> None:
    """Each of two words of counters takes the bins that are its own."""
    places = torch.arange(-32, 68, 4, dtype=torch.int32)
    made = count.one_at.fn(places).words
    assert made == [1 << place if 0 <= place < 32 else 0 for place in places.tolist()]
