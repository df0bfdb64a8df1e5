// The scan of int4 codes with weights of 8 bits, four channels an instruction: for the row of scores that ranks tokens
// and is nothing else. A weight (query times step) is off by at most half of a unit, the largest of a page / 127, which
// is at most a thirtieth of what the codes themselves are off by where weights are alike, and where one is large, of
// its own.
#pragma once

#include <algorithm>

#include "codes/int16_weights.h"
#include "rank/scan.h"

namespace sparq {

constexpr int QUAD = 4;  // channels
constexpr int MOST_BYTE_WEIGHTS = 512;

// What the weights of a page become: a score is unit times the sum over bytes, plus base.
struct ByteWeights {
  int8_t* bytes;  // [r] and zeros
  float unit, base;
};

#ifdef __AVX512VNNI__

constexpr int SCAN_BYTES = 64;  // of a row at once

inline bool can_scan_bytes(DType dtype, int r, int row_bytes) {
  return dtype != DType::fp32 && r <= MOST_BYTE_WEIGHTS && row_bytes % SCAN_BYTES == 0;
}

// Weights query (zero + step code) of the r channels of a page; query is zero from r on. What is not finite makes the
// base NaN, and so all scores.
inline void weigh_bytes(const float* query, const uint8_t* scales, const int32_t* channels, int r, ByteWeights& to) {
  constexpr float MIDDLE = 7.5f;
  alignas(64) float weights[MOST_BYTE_WEIGHTS];
  Vec most = zero(), base = zero();
  for (int i = 0; i < r; i += W) {
    Vec step, low;
    gather_pairs(scales, channels + i, &step, &low);
    const Vec q = load(query + i), w = mul(q, step);
    store(weights + i, w);
    most = max(magnitude(w), most);
    base = fma(q, low, base);
  }
  const float largest = reduce_max(most), per_unit = largest > LEAST ? 127.0f / largest : 0.0f;
  to.unit = largest / 127.0f;
  Vec lack = zero();
  for (int i = 0; i < r; i += W) {
    const Vec w = load(weights + i);
    const __m512i whole = _mm512_cvtps_epi32(mul(w, set1(per_unit)));
    lack = add(lack, sub(w, mul(_mm512_cvtepi32_ps(whole), set1(to.unit))));
    _mm_storeu_si128((__m128i*)(to.bytes + i), _mm512_cvtsepi32_epi8(whole));
  }
  to.base = reduce_add(fma(lack, set1(MIDDLE), base));
}

// 64 scores in the order of tokens, of sums that hold dword m of each 128-bit lane in part m.
SPARQ_INLINE void put_quarters(const __m512i* sums, float factor, float base, float* to) {
  const __m512i a = _mm512_shuffle_i32x4(sums[0], sums[1], 0x44), b = _mm512_shuffle_i32x4(sums[2], sums[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(sums[0], sums[1], 0xee), d = _mm512_shuffle_i32x4(sums[2], sums[3], 0xee);
  const __m512i in_order[] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd),
                              _mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) store(to + i * W, fma(_mm512_cvtepi32_ps(in_order[i]), set1(factor), set1(base)));
}

// scores[slot] of a page, from its ranking copy. Row offsets are repeated up to a multiple of QUAD.
inline void scan_bytes(const Scan& scan, const ByteWeights& weights, float* scores) {
  const __m512i mask = _mm512_set1_epi8(15);
  for (int byte = 0; byte < scan.row_bytes; byte += SCAN_BYTES) {
    __m512i both[4], high[4];  // sums of whole bytes, and of their high nibbles, times 16
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) both[m] = high[m] = _mm512_setzero_si512();
    for (int i = 0; i < scan.r; i += QUAD) {
      __m512i row[QUAD];
#pragma GCC unroll 4
      for (int k = 0; k < QUAD; ++k) row[k] = _mm512_loadu_si512(scan.rows + scan.row_offsets[i + k] + byte);
      const __m512i front[] = {_mm512_unpacklo_epi8(row[0], row[1]), _mm512_unpackhi_epi8(row[0], row[1])};
      const __m512i back[] = {_mm512_unpacklo_epi8(row[2], row[3]), _mm512_unpackhi_epi8(row[2], row[3])};
      int32_t four;
      memcpy(&four, weights.bytes + i, 4);
      const __m512i weight = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) {
        const __m512i codes = m % 2 == 0 ? _mm512_unpacklo_epi16(front[m / 2], back[m / 2])
                                         : _mm512_unpackhi_epi16(front[m / 2], back[m / 2]);
        both[m] = _mm512_dpbusd_epi32(both[m], codes, weight);
        high[m] = _mm512_dpbusd_epi32(high[m], _mm512_andnot_si512(mask, codes), weight);
      }
    }
    __m512i low[4];
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m) low[m] = _mm512_sub_epi32(both[m], high[m]);
    put_quarters(low, weights.unit, weights.base, scores + byte);
    put_quarters(high, weights.unit / 16, weights.base, scores + scan.n / 2 + byte);
  }
  for (int i = 0; scan.ahead != nullptr && i < scan.r; ++i) scan.prefetch_row(i);
}

#else

inline bool can_scan_bytes(DType, int, int) { return false; }
inline void weigh_bytes(const float*, const uint8_t*, const int32_t*, int, ByteWeights&) {}
inline void scan_bytes(const Scan&, const ByteWeights&, float*) {}

#endif

}  // namespace sparq
