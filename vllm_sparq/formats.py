"""Block formats: in how many bits, and in which groups, a full block stores its tokens' K and V."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coding:
    """How one of K and V is stored.

    Attributes:
        bits: of a code.
        group: default elements of a group, where they divide the head size; 0 is the whole head.
        channels: whether a group is neighbouring tokens of one channel (KIVI's K) instead of neighbouring channels of
            one token.
        scale_numbers: 2 for scale and zero point; 1 for a scale alone, codes being signed.
        midpoints: whether codes stand for the middles of equal cells of a group's range; else the outermost stand for
            its ends. Of few bits, most elements are nearer to a middle.
    """

    bits: int
    group: int
    channels: bool = False
    scale_numbers: int = 2
    midpoints: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise ValueError(f"no op reads codes of {self.bits} bits: use 2, 4 or 8")
        if self.group % 8:
            raise ValueError(f"group {self.group} is not a multiple of 8 elements: use one, or 0 for the whole head")
        if self.scale_numbers == 1 and (self.bits != 8 or self.midpoints):
            raise ValueError(
                f"codes with a scale alone are of 8 bits without midpoints, got bits={self.bits} and "
                f"midpoints={self.midpoints}: use scale_numbers 2"
            )

    def default_group(self, head_size: int) -> int:
        """The largest sensible group for a head size: ``group``, or the largest part of the head that is below it.

        Where groups of K are tokens, a power of two, so that blocks hold whole groups.
        """
        if not self.group:
            return head_size
        parts = [head_size // n for n in range(1, head_size) if head_size % (8 * n) == 0]
        return next(g for g in parts if g <= self.group and not (self.channels and g & (g - 1)))


@dataclass(frozen=True)
class Format:
    """How a full block stores its tokens.

    Attributes:
        key: of K.
        value: of V, whose groups are always neighbouring channels of one token.
        rotated: whether V is stored as a rotation of itself (`vllm_sparq.rotation`), which spreads what stands out in
            one channel over all, and which attention turns back in its output.
    """

    key: Coding
    value: Coding
    rotated: bool = False

    def __post_init__(self) -> None:
        if self.value.channels:
            raise ValueError("a group of V is channels of one token, for reads of few tokens: leave channels to K")
        if self.key.channels and self.key.scale_numbers == 1:
            raise ValueError("K by channel has a zero point in every op: use scale_numbers 2")

    @property
    def channel_keys(self) -> bool:
        """Whether K is channel-major, which makes it rank tokens as it is."""
        return self.key.channels

    @property
    def has_groups(self) -> bool:
        """Whether ``group_size`` means anything."""
        return bool(self.key.group or self.value.group)


def _both(coding: Coding) -> Format:
    return Format(coding, coding)


TOKEN_8 = Coding(bits=8, group=0, scale_numbers=1)
TOKEN_4 = Coding(bits=4, group=64)

FORMATS: dict[str, Format | None] = {
    "model": None,
    "int8": _both(TOKEN_8),
    "k8v4": Format(key=TOKEN_8, value=TOKEN_4),
    "int4": _both(TOKEN_4),
    "kivi4": Format(key=Coding(bits=4, group=32, channels=True), value=Coding(bits=4, group=32)),
    "k4v2": Format(
        key=Coding(bits=4, group=32, channels=True), value=Coding(bits=2, group=64, midpoints=True), rotated=True
    ),
    "kivi2": Format(key=Coding(bits=2, group=32, channels=True), value=Coding(bits=2, group=32)),
}
"""Block format -> how it stores. ``int4``: FlexGen (arXiv 2303.06865, section 5); ``kivi``: arXiv 2402.02750.

K is what breaks on real models, by outlier channels in 4 bits per token and by 2 bits at all; V does not: ``k8v4`` and
``k4v2`` spend their bits there (docs/decisions/0013, 0017).
"""

QUANTIZED: dict[str, Format] = {name: how for name, how in FORMATS.items() if how is not None}
"""Those that store codes."""
