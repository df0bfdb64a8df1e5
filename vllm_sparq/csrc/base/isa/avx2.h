// Vectors of AVX2: 8 floats, or 8 pairs of 16-bit numbers. avx512.h says what the functions mean.
#pragma once

#include "base/isa/x86.h"

namespace sparq {

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
SPARQ_INLINE void store_numbers(int32_t* to, int first, unsigned bits) {
  const __m256i numbers = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(numbers, front_order(bits)));
}
// Less one a lane: half as many instructions as counting bits.
struct GreaterCount {
  __m256i lanes = _mm256_setzero_si256();
  SPARQ_INLINE void add(Vec a, Vec than) {
    lanes = _mm256_add_epi32(lanes, _mm256_castps_si256(_mm256_cmp_ps(a, than, _CMP_GT_OQ)));
  }
  SPARQ_INLINE int sum() const { return -(int)reduce_add(_mm256_cvtepi32_ps(lanes)); }
};

SPARQ_INLINE Vec load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
SPARQ_INLINE Vec load(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
SPARQ_INLINE void store(fp16* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SPARQ_INLINE void store_up(fp16* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
}
SPARQ_INLINE void store_down(fp16* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
SPARQ_INLINE void store(bf16* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(even, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}

SPARQ_INLINE void store_upper(bf16* p, Vec v) {
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
SPARQ_INLINE Vec up_to_bf16(Vec x) {
  const __m256i up = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(0xffff));
  return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000)));
}

SPARQ_INLINE Vec load(const int32_t* p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)p)); }
SPARQ_INLINE Vec lanes_above(const int32_t* p, int bar) {
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(bar)));
}
SPARQ_INLINE unsigned above(const int32_t* p, int bar) { return (unsigned)_mm256_movemask_ps(lanes_above(p, bar)); }
SPARQ_INLINE Vec select_above(const int32_t* p, int bar, Vec a, Vec b) {
  return _mm256_blendv_ps(b, a, lanes_above(p, bar));
}

template <bool has_sign>
SPARQ_INLINE Vec load_bytes(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)from);
  return _mm256_cvtepi32_ps(has_sign ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
}
SPARQ_INLINE void load_nibbles(const uint8_t* from, Vec* low, Vec* high) {
  const __m256i pair = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
  *low = _mm256_cvtepi32_ps(_mm256_and_si256(pair, _mm256_set1_epi32(15)));
  *high = _mm256_cvtepi32_ps(_mm256_srli_epi32(pair, 4));
}
SPARQ_INLINE void store_bytes(uint8_t* to, Vec x) {
  const __m256i words = _mm256_and_si256(_mm256_cvttps_epi32(x), _mm256_set1_epi32(255));
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(packed, packed));
}

SPARQ_INLINE void gather_pairs(const uint8_t* pairs, const int32_t* at, Vec* first, Vec* second) {
  const __m256i both = _mm256_i32gather_epi32((const int*)pairs, _mm256_loadu_si256((const __m256i*)at), 4);
  const __m256i firsts = _mm256_and_si256(both, _mm256_set1_epi32(0xffff)), seconds = _mm256_srli_epi32(both, 16);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(firsts, seconds), 0xd8);
  *first = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
  *second = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
}

SPARQ_INLINE Vec reduce_each(const Vec* a) {
  Vec quad[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vec* x = a + 4 * i;
    const Vec s = add(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
    const Vec t = add(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
    quad[i] = add(_mm256_shuffle_ps(s, t, 0x44), _mm256_shuffle_ps(s, t, 0xee));
  }
  return add(_mm256_permute2f128_ps(quad[0], quad[1], 0x20), _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
}

SPARQ_INLINE void split(Vec x, Vec* whole, Vec* part) {
  x = max(set1(-160.0f), x);
  *whole = _mm256_floor_ps(x), *part = sub(x, *whole);
}

// p 2^n in two factors, so that each is a normal number and the product underflows gradually.
SPARQ_INLINE Vec scale_by_power(Vec p, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}

using Words = __m256i;

SPARQ_INLINE Words zero_words() { return _mm256_setzero_si256(); }
SPARQ_INLINE Words load_words(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
SPARQ_INLINE void store_words(void* p, Words x) { _mm256_storeu_si256((__m256i*)p, x); }
SPARQ_INLINE Words set_pair(int32_t pair) { return _mm256_set1_epi32(pair); }
SPARQ_INLINE Words set_word(int x) { return _mm256_set1_epi16((short)x); }
SPARQ_INLINE Words and_words(Words a, Words b) { return _mm256_and_si256(a, b); }
SPARQ_INLINE Words add_pairs(Words a, Words b) { return _mm256_add_epi32(a, b); }
template <int n>
SPARQ_INLINE Words shift_right(Words x) {
  return _mm256_srli_epi16(x, n);
}
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

}  // namespace sparq
