"""Block formats: in how many bits, and in which groups, a full block stores its tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """How a full block stores its tokens.

    Attributes:
        bits: of a code.
        channel_keys: whether a group of K is neighbouring tokens of one channel (KIVI) instead of neighbouring channels
            of one token. Groups of V are always neighbouring channels of one token.
        group: default elements of a group, where they divide the head size; 0 is the whole head.
        scale_numbers: 2 for scale and zero point; 1 for a scale alone, codes being signed.
    """

    bits: int
    channel_keys: bool
    group: int
    scale_numbers: int = 2

    def default_group(self, head_size: int) -> int:
        """The largest sensible group for a head size: ``group``, or the largest part of the head that is below it.

        Where groups of K are tokens, a power of two, so that blocks hold whole groups.
        """
        if not self.group:
            return head_size
        parts = [head_size // n for n in range(1, head_size) if head_size % (8 * n) == 0]
        return next(g for g in parts if g <= self.group and not (self.channel_keys and g & (g - 1)))


FORMATS: dict[str, Format | None] = {
    "model": None,
    "int8": Format(bits=8, channel_keys=False, group=0, scale_numbers=1),
    "int4": Format(bits=4, channel_keys=False, group=64),
    "kivi4": Format(bits=4, channel_keys=True, group=32),
    "kivi2": Format(bits=2, channel_keys=True, group=32),
}
"""Block format -> how it stores. ``int4``: FlexGen (arXiv 2303.06865, section 5); ``kivi``: arXiv 2402.02750."""
