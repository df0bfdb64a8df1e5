"""How far two right answers may lie apart: one table, each row with its reason.

Copies, codes, scales and selected tokens have no row: they are exact.
"""

from __future__ import annotations

import torch

OUT: dict[torch.dtype, dict[str, float]] = {
    # Both sides sum in fp32, in another order: about D * 2^-24 of |q||k| in a logit, so 1e-6 of a weight; and an exp
    # that is good to a few ulp. Values are about 1, contexts below 1000 tokens.
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    # One last rounding on each side: two neighbours, 2^-10 of the value. The absolute part covers weights that a kernel
    # rounds to the model's type before it multiplies V (at most 2^-11 of sum(p |v|), which is about 1).
    torch.float16: {"rtol": 2**-10, "atol": 1e-3},
    # The same with 8 bits: neighbours are 2^-7 apart, the weights good to 2^-9.
    torch.bfloat16: {"rtol": 2**-7, "atol": 4e-3},
}
"""Of an attention output against fp32 or fp64 arithmetic.

CPU kernels may multiply codes of 16-bit models as whole numbers of 16 bits. That fits into these rows:

* An element of the query is rounded to a multiple of the unit ``u = max |q_c| / 32767`` of its group, which moves a
  logit by at most ``scale sum_c u/2 step_c |code_c - middle|``. Half a unit is a 128th of what bf16 rounds of the
  largest element, and less than what fp16 rounds of any that is more than a 32nd of it.
* The weight of a row, ``p_t step_t``, is rounded to a multiple of ``max p max step / 32767`` over up to 128 tokens,
  which moves an element of ``sum_t p_t v_t`` by at most ``128 (2^-16 max p max step) (top / 2)``: 2^-10 of ``max p``
  times the widest range of a group. Zeros, and the middle of the range, are added in fp32, so no mass is lost.
* The same holds for channel-major K with q in the place of p, over channels instead of tokens.

Prefill may round the tokens that codes stand for to bf16 before it multiplies them, as they would lie in pages of the
format ``model``; there is no instruction for more. Triton kernels always round them, to the model's type, but for
signed codes of bf16 models, which they multiply as whole numbers (`tests.ops.rounding.multiplied`). An element moves by
at most 2^-9 of itself, the output by up to ``2^-9 (sum p |v| + sum p |v - out| scale sum |q k|)``, ten times what is
seen. So the tests allow no more than that rounding itself: the output is within these rows of the reference over exact
tokens, or of the reference over rounded ones.
"""

SCORE: dict[torch.dtype, float] = {
    # Sums of at most 256 products in fp32, in any order, either with ``zero`` factored out or not.
    torch.float32: 256 * 2**-24,
    # A kernel may round ``scale * q * step`` once to the model's type (half an ulp: 2^-11, 2^-9), so that the dot
    # product with the codes, exact in it, runs on the type's own instructions; a tenth more for the fp32 sums.
    torch.float16: 1.1 * 2**-11,
    torch.bfloat16: 1.1 * 2**-9,
}
"""Of an approximate score, as a fraction of ``sum_c |scale_g q_c| (|zero_c| + step_c code_c)``."""


def whole_numbers(n: int, largest: float) -> float:
    """Bound on what an approximate score moves by where weights are whole numbers (16-bit models, on CPUs).

    Each of ``n`` weights ``scale * q * step`` is off by half of the largest / 32767, times a code at most half of the
    largest one away from the middle: 2^-17 of ``largest``, the greatest of ``|scale q|`` times that of a range of K.
    """
    return n * 2**-17 * largest


def bytes_of(n: int, largest: float) -> float:
    """Bound on what the score that ranks a token moves by where weights are bytes (int4 copies, 16-bit models, CPUs).

    Each of ``n`` weights ``q * step`` is off by half of the largest / 127, times a code at most 7.5 away from the
    middle: a 508th of ``largest``, the greatest of ``|q|`` times that of a range of K; a hundredth more for fp32.
    """
    return n * largest * 1.01 / 508


MASS = 2**-18
"""Of a share of the probability, beside what follows from its scores.

Sums of some thousand terms in fp32, in any order, and an exp that is good to a few ulp.
"""

BOUND: dict[torch.dtype, float] = {
    # Sums of at most 2 * 256 products in fp32, in any order.
    torch.float32: 512 * 2**-24,
    # The summed query rounded once to the model's type (half an ulp), as in `SCORE`; bounds are in that type already.
    torch.float16: 1.1 * 2**-11,
    torch.bfloat16: 1.1 * 2**-9,
}
"""Of the upper bound of a span, as a fraction of ``sum_c (|a_c high_pc| + |b_c low_pc|)``."""


def value_sum(n_tokens: int, absolute_sum: torch.Tensor) -> torch.Tensor:
    """Bound on the difference of two fp32 sums of ``n_tokens`` numbers in any two orders: n * 2^-24 * sum |v| each."""
    return 2 * n_tokens * 2**-24 * absolute_sum
