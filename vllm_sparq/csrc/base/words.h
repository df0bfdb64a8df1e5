// 16-bit whole numbers: products of neighbours, summed in 32 bits. A vector holds W pairs of them, so that sums of
// pairs have the lanes of a vector of floats.
#pragma once

#include "base/simd.h"

namespace sparq {

#ifdef __AVX512F__
using Words = __m512i;

SPARQ_INLINE Words zero_words() { return _mm512_setzero_si512(); }
SPARQ_INLINE Words load_words(const void* p) { return _mm512_loadu_si512(p); }
SPARQ_INLINE void store_words(void* p, Words x) { _mm512_storeu_si512(p, x); }
SPARQ_INLINE Words set_pair(int32_t pair) { return _mm512_set1_epi32(pair); }
SPARQ_INLINE Words set_word(int x) { return _mm512_set1_epi16((short)x); }
SPARQ_INLINE Words and_words(Words a, Words b) { return _mm512_and_si512(a, b); }
SPARQ_INLINE Words add_pairs(Words a, Words b) { return _mm512_add_epi32(a, b); }
template <int n>
SPARQ_INLINE Words shift_right(Words x) { return _mm512_srli_epi16(x, n); }
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

#else
using Words = __m256i;

SPARQ_INLINE Words zero_words() { return _mm256_setzero_si256(); }
SPARQ_INLINE Words load_words(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
SPARQ_INLINE void store_words(void* p, Words x) { _mm256_storeu_si256((__m256i*)p, x); }
SPARQ_INLINE Words set_pair(int32_t pair) { return _mm256_set1_epi32(pair); }
SPARQ_INLINE Words set_word(int x) { return _mm256_set1_epi16((short)x); }
SPARQ_INLINE Words and_words(Words a, Words b) { return _mm256_and_si256(a, b); }
SPARQ_INLINE Words add_pairs(Words a, Words b) { return _mm256_add_epi32(a, b); }
template <int n>
SPARQ_INLINE Words shift_right(Words x) { return _mm256_srli_epi16(x, n); }
SPARQ_INLINE Words signed_low(Words x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
SPARQ_INLINE Words signed_high(Words x) { return _mm256_srai_epi16(x, 8); }
SPARQ_INLINE Words add_products(Words sum, Words a, Words b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
SPARQ_INLINE Vec pairs_to_float(Words x) { return _mm256_cvtepi32_ps(x); }
SPARQ_INLINE Vec low_as_bf16(Words x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
SPARQ_INLINE Vec high_as_bf16(Words x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)));
}
SPARQ_INLINE Vec high_as_fp16(Words x) {
  const __m256i words = _mm256_srli_epi32(x, 16);
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
SPARQ_INLINE Vec low_as_fp16(Words x) { return high_as_fp16(_mm256_slli_epi32(x, 16)); }
SPARQ_INLINE Words to_words(Vec low, Vec high) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high)), 0xd8);
}
SPARQ_INLINE void in_turn(Vec even, Vec odd, Vec* low, Vec* high) {
  const Vec a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
  *low = _mm256_permute2f128_ps(a, b, 0x20), *high = _mm256_permute2f128_ps(a, b, 0x31);
}
constexpr int LEAST_ROW = 2 * W;
SPARQ_INLINE Words load_pairs(const uint8_t* even, const uint8_t* odd, int) {
  const __m256i low = _mm256_setr_epi8(0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1,  //
                                       8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15, -1, -1);
  const __m256i high = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                        -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  const __m256i a = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)even));
  const __m256i b = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)odd));
  return _mm256_or_si256(_mm256_shuffle_epi8(a, low), _mm256_shuffle_epi8(b, high));
}
SPARQ_INLINE void turn_over(const uint8_t* const* rows, int byte, Words* to) {
  Words x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto part = [&](int row) { return _mm_loadu_si128((const __m128i*)(rows[row] + byte)); };
    x[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(part(i)), part(4 + i), 1);
  }
  const Words a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
  const Words c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
  to[0] = _mm256_unpacklo_epi64(a, c), to[1] = _mm256_unpackhi_epi64(a, c);
  to[2] = _mm256_unpacklo_epi64(b, d), to[3] = _mm256_unpackhi_epi64(b, d);
}
#endif

// Numbers are rounded to multiples of a unit, the largest of them / 32767. Where that is less than this, they are zero.
constexpr float LEAST = 1e-30f;

// Keeps gcc from computing one of several independent sums after all the others, for which it lacks registers.
SPARQ_INLINE Words in_this_order(Words x) {
  asm volatile("" : "+v"(x));
  return x;
}

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
