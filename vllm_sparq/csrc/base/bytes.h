// Small whole numbers between vectors of floats and bytes.
#pragma once

#include "base/simd.h"

namespace sparq {

// W bytes, with or without a sign, as floats.
template <bool has_sign>
SPARQ_INLINE Vec load_bytes(const uint8_t* from) {
#ifdef __AVX512F__
  const __m128i bytes = _mm_loadu_si128((const __m128i*)from);
  return _mm512_cvtepi32_ps(has_sign ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#else
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)from);
  return _mm256_cvtepi32_ps(has_sign ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#endif
}

// Whole numbers -128 .. 255 to bytes, one each.
SPARQ_INLINE void store_bytes(uint8_t* to, Vec x) {
#ifdef __AVX512F__
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x)));
#else
  const __m256i words = _mm256_and_si256(_mm256_cvttps_epi32(x), _mm256_set1_epi32(255));
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(packed, packed));
#endif
}

}  // namespace sparq
