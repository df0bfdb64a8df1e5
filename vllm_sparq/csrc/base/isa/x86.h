// What AVX2 and AVX-512 have in common: single numbers, 16 bytes, and matrices of them.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "base/paged.h"

namespace sparq {

#define SPARQ_INLINE inline __attribute__((always_inline))

inline float to_float(fp16 x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }

// Into L2, not L1: T0 was measured 2x slower, for contiguous rows as for rows with gaps.
SPARQ_INLINE void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

// Keeps gcc from computing one of several independent sums after all the others, for which it lacks registers.
template <class V>
SPARQ_INLINE V in_this_order(V x) {
  asm volatile("" : "+v"(x));
  return x;
}
// Keeps a product from being fused with a sum.
template <class V>
SPARQ_INLINE V rounded(V x) {
  asm("" : "+v"(x));
  return x;
}

SPARQ_INLINE void copy_32_bytes(uint8_t* to, const uint8_t* from) {
  _mm256_storeu_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
}

using Bytes = __m128i;

SPARQ_INLINE Bytes load_16_bytes(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
SPARQ_INLINE void store_16_bytes(uint8_t* p, Bytes x) { _mm_storeu_si128((__m128i*)p, x); }
// Bits `shift` on of each byte, those of the mask, which has at most 8 - shift of them.
SPARQ_INLINE Bytes cut_bytes(Bytes x, int shift, int mask) {
  return _mm_and_si128(_mm_srl_epi16(x, _mm_cvtsi32_si128(shift)), _mm_set1_epi8((char)mask));
}
// The first and the last halves of a and b, `bytes` of each in turn.
template <int bytes>
SPARQ_INLINE void interleave(Bytes a, Bytes b, Bytes& low, Bytes& high) {
  if constexpr (bytes == 1) {
    low = _mm_unpacklo_epi8(a, b), high = _mm_unpackhi_epi8(a, b);
  } else if constexpr (bytes == 2) {
    low = _mm_unpacklo_epi16(a, b), high = _mm_unpackhi_epi16(a, b);
  } else {
    low = _mm_unpacklo_epi32(a, b), high = _mm_unpackhi_epi32(a, b);
  }
}

// to[j][i] = from[i][j] of 8 rows and columns; floats between rows.
SPARQ_INLINE void transpose_8x8(const float* from, ptrdiff_t from_stride, float* to, ptrdiff_t to_stride) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) a[k] = _mm256_loadu_ps(from + k * from_stride);
#pragma GCC unroll 4
  for (int k = 0; k < 8; k += 2) {
    b[k] = _mm256_unpacklo_ps(a[k], a[k + 1]);
    b[k + 1] = _mm256_unpackhi_ps(a[k], a[k + 1]);
  }
#pragma GCC unroll 2
  for (int k = 0; k < 8; k += 4) {
    a[k] = _mm256_shuffle_ps(b[k], b[k + 2], 0x44);
    a[k + 1] = _mm256_shuffle_ps(b[k], b[k + 2], 0xee);
    a[k + 2] = _mm256_shuffle_ps(b[k + 1], b[k + 3], 0x44);
    a[k + 3] = _mm256_shuffle_ps(b[k + 1], b[k + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    _mm256_storeu_ps(to + k * to_stride, _mm256_permute2f128_ps(a[k], a[k + 4], 0x20));
    _mm256_storeu_ps(to + (k + 4) * to_stride, _mm256_permute2f128_ps(a[k], a[k + 4], 0x31));
  }
}

}  // namespace sparq
