// One vector type for all instruction sets (16 floats with AVX-512, else 8), so that every kernel is written once.
#pragma once

#include <cfloat>
#include <cstring>
#include <type_traits>

#include "base/paged.h"

// Whether vectors of bf16 are multiplied as such. CPUs with AMX do it in tiles of them, and in vectors at half the rate
// of fp32 and a quarter of that of 16-bit whole numbers (Emerald Rapids: one vdpbf16ps in two cycles, two vpdpwssd in
// one).
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define SPARQ_BF16_VECTORS
#endif

#if defined(__AVX512F__)
#include "base/isa/avx512.h"
#elif defined(__AVX2__)
#include "base/isa/avx2.h"
#elif defined(__ARM_NEON)
#include "base/isa/neon_words.h"
#else
#error "csrc is compiled for AVX2, AVX-512 or NEON: setup.py has the options of the compiler"
#endif

namespace sparq {

constexpr float LOG2_E = 1.44269504088896341f;

// Calls f with n, from 1 to MOST, as a constant.
template <int MOST, class F>
SPARQ_INLINE void with_constant(int n, F&& f) {
  if constexpr (MOST > 1)
    if (n < MOST) return with_constant<MOST - 1>(n, f);
  f(std::integral_constant<int, MOST>{});
}

// Calls f(first, count) for all of n rows, at most MOST of them at a time and about as many each time; the count is a
// constant.
template <int MOST, class F>
SPARQ_INLINE void few_at_a_time(int n, F&& f) {
  for (int first = 0, left = (n + MOST - 1) / MOST; left > 0; --left) {
    const int count = (n - first + left - 1) / left;
    with_constant<MOST>(count, [&](auto constant) __attribute__((always_inline)) { f(first, constant); });
    first += count;
  }
}

// 2^x for x <= 0 (softmax: the maximum is subtracted), within 2 ulp, with gradual underflow; NaN stays NaN.
SPARQ_INLINE Vec exp2_negative(Vec x) {
  x = max(set1(-160.0f), x);  // this order keeps NaN; minus infinity must not meet itself below
  const Vec n = round_even(x), r = sub(x, n);
  Vec p = set1(1.535336188319500e-4f);
  p = fma(p, r, set1(1.339887440266574e-3f));
  p = fma(p, r, set1(9.618437357674640e-3f));
  p = fma(p, r, set1(5.550332471162809e-2f));
  p = fma(p, r, set1(2.402264791363012e-1f));
  p = fma(p, r, set1(6.931472028550421e-1f));
  return scale_by_power(fma(p, r, set1(1.0f)), n);
}

// e^(x - peak) for x <= peak. Ratios of results are good to a few ulp: the rounding of peak is common to all.
SPARQ_INLINE Vec exp_below(Vec x, float peak) { return exp2_negative(fma(x, set1(LOG2_E), set1(-peak * LOG2_E))); }

// cap tanh(x / cap), within 3e-7 of the cap; minus infinity (a token that is not there) and NaN stay what they are.
SPARQ_INLINE Vec soft_capped(Vec x, float cap) {
  const Vec y = mul(x, set1(1.0f / cap)), size = max(y, sub(zero(), y));
  const Vec e = exp2_negative(mul(min(size, set1(40.0f)), set1(-2.0f * LOG2_E)));
  const Vec large = div(sub(set1(1.0f), e), add(set1(1.0f), e));  // of |y|
  const Vec square = mul(y, y);
  Vec p = fma(square, set1(-17.0f / 315.0f), set1(2.0f / 15.0f));  // the first terms of tanh(y) / y
  p = fma(fma(p, square, set1(-1.0f / 3.0f)), square, set1(1.0f));
  const Vec least = set1(0.125f);
  const Vec t = select(greater(size, least), select(greater(y, zero()), large, sub(zero(), large)), mul(y, p));
  return select(greater(x, set1(-INFINITY)), mul(t, set1(cap)), x);
}

// 0 where x is infinite or NaN.
SPARQ_INLINE Vec finite_or_zero(Vec x) {
  const Vec magnitude = max(x, sub(zero(), x));
  return select(greater(set1(INFINITY), magnitude), x, zero());
}

// One element, for the odd places outside a loop.
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

}  // namespace sparq
