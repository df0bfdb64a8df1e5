// One vector type for AVX2 (8 floats) and AVX-512 (16 floats), so that every kernel is written once.
#pragma once

#include <immintrin.h>

#include <cfloat>
#include <cstring>

#include "base/paged.h"

namespace sparq {

#define SPARQ_INLINE inline __attribute__((always_inline))

#ifdef __AVX512F__
using Vec = __m512;
constexpr int W = 16;  // floats in a vector

SPARQ_INLINE Vec zero() { return _mm512_setzero_ps(); }
SPARQ_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
SPARQ_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
SPARQ_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
SPARQ_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
SPARQ_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
SPARQ_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
SPARQ_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
SPARQ_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// max and min return b where either is NaN, as the instructions do.
SPARQ_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
SPARQ_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
SPARQ_INLINE Vec round_even(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SPARQ_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
SPARQ_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
SPARQ_INLINE unsigned greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
SPARQ_INLINE unsigned equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
// a where the bit is set, else b.
SPARQ_INLINE Vec select(unsigned bits, Vec a, Vec b) { return _mm512_mask_blend_ps((__mmask16)bits, b, a); }
// The lanes whose bit is set, moved to the front. (To a register: the store form is microcoded on AMD.)
SPARQ_INLINE Vec compress(unsigned bits, Vec a) { return _mm512_maskz_compress_ps((__mmask16)bits, a); }
SPARQ_INLINE __m512i compress(unsigned bits, __m512i a) { return _mm512_maskz_compress_epi32((__mmask16)bits, a); }

SPARQ_INLINE Vec load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
SPARQ_INLINE Vec load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
SPARQ_INLINE void store(fp16* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#ifdef __AVX512BF16__
SPARQ_INLINE void store(bf16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
#else
SPARQ_INLINE void store(bf16* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7fc0))));
}
#endif

// Whole numbers: as floats, and which of W of them are above a bar.
SPARQ_INLINE Vec load(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
SPARQ_INLINE unsigned above(const int32_t* p, int bar) {
  return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(bar));
}

// p 2^n, with gradual underflow.
SPARQ_INLINE Vec scale_by_power(Vec p, Vec n) { return _mm512_scalef_ps(p, n); }

#else
using Vec = __m256;
constexpr int W = 8;

SPARQ_INLINE Vec zero() { return _mm256_setzero_ps(); }
SPARQ_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
SPARQ_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
SPARQ_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
SPARQ_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
SPARQ_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
SPARQ_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
SPARQ_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
SPARQ_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
SPARQ_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
SPARQ_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
SPARQ_INLINE Vec round_even(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SPARQ_INLINE float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
SPARQ_INLINE float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
SPARQ_INLINE unsigned greater(Vec a, Vec b) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
SPARQ_INLINE unsigned equal(Vec a, Vec b) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
// Lane numbers of the set bits first: a pext over byte indices, widened.
SPARQ_INLINE __m256i front_order(unsigned bits) {
  const uint64_t bytes = _pdep_u64(bits, 0x0101010101010101ull) * 0xff;
  return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)_pext_u64(0x0706050403020100ull, bytes)));
}
SPARQ_INLINE Vec select(unsigned bits, Vec a, Vec b) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), lane), lane);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(on));
}
SPARQ_INLINE Vec compress(unsigned bits, Vec a) { return _mm256_permutevar8x32_ps(a, front_order(bits)); }
SPARQ_INLINE __m256i compress(unsigned bits, __m256i a) { return _mm256_permutevar8x32_epi32(a, front_order(bits)); }

SPARQ_INLINE Vec load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
SPARQ_INLINE Vec load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
SPARQ_INLINE void store(fp16* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SPARQ_INLINE void store(bf16* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(even, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}

SPARQ_INLINE Vec load(const int32_t* p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)p)); }
SPARQ_INLINE unsigned above(const int32_t* p, int bar) {
  const __m256i bits = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(bar));
  return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(bits));
}

// p 2^n in two factors, so that each is a normal number and the product underflows gradually.
SPARQ_INLINE Vec scale_by_power(Vec p, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
#endif

constexpr float LOG2_E = 1.44269504088896341f;

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

// One element, for the odd places outside a loop.
inline float to_float(float x) { return x; }
inline float to_float(fp16 x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }
inline float to_float(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// Into L2, not L1: T0 was measured 2x slower, for contiguous rows as for rows with gaps.
SPARQ_INLINE void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

}  // namespace sparq
