// 16-bit whole numbers: products of neighbours, summed in 32 bits. A vector holds W pairs of them, so that sums of
// pairs have the lanes of a vector of floats.
#pragma once

#include "base/simd.h"

namespace sparq {

// Numbers are rounded to multiples of a unit, the largest of them / 32767. Where that is less than this, they are zero.
constexpr float LEAST = 1e-30f;

// The low or high half of each pair of T, in fp32.
template <class T>
SPARQ_INLINE Vec low_half(Words x) {
  if constexpr (std::is_same_v<T, bf16>) return low_as_bf16(x);
  else return low_as_fp16(x);
}
template <class T>
SPARQ_INLINE Vec high_half(Words x) {
  if constexpr (std::is_same_v<T, bf16>) return high_as_bf16(x);
  else return high_as_fp16(x);
}

// How codes lie in words: planes of `bits`, those of the low byte before those of the high one.
template <int BITS, bool SIGNED>
struct WordCodes {
  static constexpr int bits = BITS, planes = 8 / BITS;
  static constexpr bool has_sign = SIGNED;
  static constexpr float middle = SIGNED ? 0.0f : ((1 << BITS) - 1) * 0.5f;

  // Of one plane: the codes in the low bytes (half 0) or in the high ones.
  template <int plane, int half>
  static SPARQ_INLINE Words take(Words x) {
    constexpr int shift = half * 8 + plane * BITS;
    if constexpr (SIGNED) return half ? signed_high(x) : signed_low(x);
    Words codes = x;
    if constexpr (shift > 0) codes = shift_right<shift>(x);
    if constexpr (shift + BITS < 16) codes = and_words(codes, set_word((1 << BITS) - 1));
    return codes;
  }
};

}  // namespace sparq
