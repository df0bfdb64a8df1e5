// Vectors of AVX-512: 16 floats, or 16 pairs of 16-bit numbers. What each function means is said here; avx2.h and
// neon.h have the same ones.
#pragma once

#include "base/isa/x86.h"

namespace sparq {

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
// first, first + 1 .. of the lanes whose bit is set, and anything after them: W in all.
SPARQ_INLINE void store_numbers(int32_t* to, int first, unsigned bits) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(first), lane);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)bits, numbers));
}
// How many lanes were greater, of all vectors that were added.
struct GreaterCount {
  int total = 0;
  SPARQ_INLINE void add(Vec a, Vec than) { total += __builtin_popcount(greater(a, than)); }
  SPARQ_INLINE int sum() const { return total; }
};

SPARQ_INLINE Vec load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
SPARQ_INLINE Vec load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
SPARQ_INLINE void store(fp16* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Rounded up or down; fp16's infinities are as far as they go.
SPARQ_INLINE void store_up(fp16* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
}
SPARQ_INLINE void store_down(fp16* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
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

// The upper halves of the bits: numbers that bf16 can hold. The conversion above may flush denormals.
SPARQ_INLINE void store_upper(bf16* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)));
}
// The smallest number of bf16 that is not below x >= 0.
SPARQ_INLINE Vec up_to_bf16(Vec x) {
  const __m512i up = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff));
  return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000)));
}

// Whole numbers: as floats, and which of W of them are above a bar.
SPARQ_INLINE Vec load(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
SPARQ_INLINE unsigned above(const int32_t* p, int bar) {
  return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(bar));
}

// a where a number is above the bar, else b.
SPARQ_INLINE Vec select_above(const int32_t* p, int bar, Vec a, Vec b) { return select(above(p, bar), a, b); }

// W bytes, with or without a sign, as floats.
template <bool has_sign>
SPARQ_INLINE Vec load_bytes(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)from);
  return _mm512_cvtepi32_ps(has_sign ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
}
// The low and the high nibbles of W bytes as floats. (Table look-up reads the low four bits of a lane, which saves the
// mask.)
SPARQ_INLINE void load_nibbles(const uint8_t* from, Vec* low, Vec* high) {
  const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
  const Vec table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  *low = _mm512_permutexvar_ps(pair, table);
  *high = _mm512_cvtepi32_ps(_mm512_srli_epi32(pair, 4));
}
// Whole numbers -128 .. 255 to bytes, one each.
SPARQ_INLINE void store_bytes(uint8_t* to, Vec x) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x)));
}

// Pairs of fp16 number at[0] .. at[W - 1], as two vectors.
SPARQ_INLINE void gather_pairs(const uint8_t* pairs, const int32_t* at, Vec* first, Vec* second) {
  const __m512i both = _mm512_i32gather_epi32(_mm512_loadu_si512(at), pairs, 4);
  *first = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
  *second = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
}

// Sums of W vectors: lane i is the sum of a[i].
SPARQ_INLINE Vec reduce_each(const Vec* a) {
  Vec quad[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec* x = a + 4 * i;
    const Vec s = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const Vec t = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    quad[i] = add(_mm512_shuffle_ps(s, t, 0x44), _mm512_shuffle_ps(s, t, 0xee));
  }
  const Vec s = add(_mm512_shuffle_f32x4(quad[0], quad[1], 0x44), _mm512_shuffle_f32x4(quad[0], quad[1], 0xee));
  const Vec t = add(_mm512_shuffle_f32x4(quad[2], quad[3], 0x44), _mm512_shuffle_f32x4(quad[2], quad[3], 0xee));
  return add(_mm512_shuffle_f32x4(s, t, 0x88), _mm512_shuffle_f32x4(s, t, 0xdd));
}

// x = whole + part, 0 <= part < 1; `whole` is for `scale_by_power` alone, which here rounds down itself.
SPARQ_INLINE void split(Vec x, Vec* whole, Vec* part) {
  *whole = x;
  *part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
// p 2^n, with gradual underflow.
SPARQ_INLINE Vec scale_by_power(Vec p, Vec n) { return _mm512_scalef_ps(p, n); }

using Words = __m512i;

SPARQ_INLINE Words zero_words() { return _mm512_setzero_si512(); }
SPARQ_INLINE Words load_words(const void* p) { return _mm512_loadu_si512(p); }
SPARQ_INLINE void store_words(void* p, Words x) { _mm512_storeu_si512(p, x); }
SPARQ_INLINE Words set_pair(int32_t pair) { return _mm512_set1_epi32(pair); }
SPARQ_INLINE Words set_word(int x) { return _mm512_set1_epi16((short)x); }
SPARQ_INLINE Words and_words(Words a, Words b) { return _mm512_and_si512(a, b); }
SPARQ_INLINE Words add_pairs(Words a, Words b) { return _mm512_add_epi32(a, b); }
template <int n>
SPARQ_INLINE Words shift_right(Words x) {
  return _mm512_srli_epi16(x, n);
}
// The low or the high byte of each word, with its sign.
SPARQ_INLINE Words signed_low(Words x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
SPARQ_INLINE Words signed_high(Words x) { return _mm512_srai_epi16(x, 8); }
// sum + a b of both words of each pair.
SPARQ_INLINE Words add_products(Words sum, Words a, Words b) {
#ifdef __AVX512VNNI__
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
SPARQ_INLINE Vec pairs_to_float(Words x) { return _mm512_cvtepi32_ps(x); }
// Low and high word of each pair, as bits of 32.
SPARQ_INLINE Vec low_as_bf16(Words x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
SPARQ_INLINE Vec high_as_bf16(Words x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
}
SPARQ_INLINE Vec low_as_fp16(Words x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
SPARQ_INLINE Vec high_as_fp16(Words x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16))); }
// 2 W floats, rounded, as words in their order; what is beyond 16 bits saturates.
SPARQ_INLINE Words to_words(Vec low, Vec high) {
  const __m256i a = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(low));
  const __m256i b = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(high));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}
// even[0] odd[0] even[1] odd[1] ..
SPARQ_INLINE void in_turn(Vec even, Vec odd, Vec* low, Vec* high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *low = _mm512_permutex2var_ps(even, first, odd);
  *high = _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd);
}
// The first n_bytes (even; at most 2 W) of two rows: pair i is word i of both.
constexpr int LEAST_ROW = 2;  // bytes that a row must have
SPARQ_INLINE Words load_pairs(const uint8_t* even, const uint8_t* odd, int n_bytes) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const auto inside = (__mmask16)((1u << n_bytes / 2) - 1);
  const __m256i a = _mm256_maskz_loadu_epi16(inside, even), b = _mm256_maskz_loadu_epi16(inside, odd);
  return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}
// Dwords 0 .. 3 of W rows, a lane each, from byte `byte` on.
SPARQ_INLINE void turn_over(const uint8_t* const* rows, int byte, Words* to) {
  Words x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto part = [&](int row) { return _mm_loadu_si128((const __m128i*)(rows[row] + byte)); };
    x[i] = _mm512_castsi128_si512(part(i));
    x[i] = _mm512_inserti32x4(x[i], part(4 + i), 1);
    x[i] = _mm512_inserti32x4(x[i], part(8 + i), 2);
    x[i] = _mm512_inserti32x4(x[i], part(12 + i), 3);
  }
  const Words a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const Words c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  to[0] = _mm512_unpacklo_epi64(a, c), to[1] = _mm512_unpackhi_epi64(a, c);
  to[2] = _mm512_unpacklo_epi64(b, d), to[3] = _mm512_unpackhi_epi64(b, d);
}

}  // namespace sparq
