// The scan of int4 codes in bf16: two channels per instruction. Codes 0 .. 15 are exact in bf16; the weights (query
// times step) are rounded to it, which is a thirtieth of the error that the codes have already.
#pragma once

#include "base/simd.h"

#ifdef SPARQ_BF16_VECTORS

namespace sparq {

constexpr int PAIR_TOKENS = 128;  // what 64 bytes of a row hold: two runs of 64 tokens, N/2 apart

// Rows of two channels, dword j holding word j of both, in the order of _mm512_unpacklo_epi16: a token's codes side by
// side. [pairs, N / 128, 2] vectors; the second channel of an odd last pair is the first one again, with weight 0.
inline void stage_pairs(const uint8_t* copy, const int32_t* row_offsets, int r, int row_bytes, uint8_t* to) {
  for (int i = 0; i < r; i += 2) {
    const uint8_t *even = copy + row_offsets[i], *odd = copy + row_offsets[i + 1 < r ? i + 1 : i];
    for (int byte = 0; byte < row_bytes; byte += 64, to += 128) {
      const __m512i a = _mm512_loadu_si512(even + byte), b = _mm512_loadu_si512(odd + byte);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(a, b));
    }
  }
}

// The four codes of each word as bf16: nibble s of every word, by table look-up, which ignores the bits above.
SPARQ_INLINE void expand_words(__m512i words, __m512i* codes) {
  // bf16 bits of 0 .. 15, twice: the look-up reads five bits.
  const __m512i table =
      _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100,
                                               0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170));
  codes[0] = _mm512_permutexvar_epi16(words, table);
  codes[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
  codes[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
  codes[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
}

// 64 scores in token order, from sums by nibble of the low and high halves of the words: nibbles s and s + 2 are
// neighbours, and a 128-bit lane of a sum holds 4 words of every 8.
SPARQ_INLINE void store_in_order(const Vec* low, const Vec* high, int s, float* to) {
  const Vec m0 = _mm512_unpacklo_ps(low[s], low[s + 2]), m1 = _mm512_unpackhi_ps(low[s], low[s + 2]);
  const Vec m2 = _mm512_unpacklo_ps(high[s], high[s + 2]), m3 = _mm512_unpackhi_ps(high[s], high[s + 2]);
  const Vec t0 = _mm512_shuffle_f32x4(m0, m1, 0x44), t1 = _mm512_shuffle_f32x4(m2, m3, 0x44);
  const Vec t2 = _mm512_shuffle_f32x4(m0, m1, 0xee), t3 = _mm512_shuffle_f32x4(m2, m3, 0xee);
  store(to, _mm512_shuffle_f32x4(t0, t1, 0x88));
  store(to + 16, _mm512_shuffle_f32x4(t0, t1, 0xdd));
  store(to + 32, _mm512_shuffle_f32x4(t2, t3, 0x88));
  store(to + 48, _mm512_shuffle_f32x4(t2, t3, 0xdd));
}

// Scores of 128 tokens (the z-th 64 bytes of each row) for HH heads; weights are pairs of bf16.
template <int HH>
void scan_pairs(const Scan& scan, int z, const int32_t* weights, int weights_stride, const float* bias, float* scores,
                int stride) {
  constexpr int V = HH <= 2 ? 2 : 1;  // halves at once: at most 20 sums
  alignas(64) Vec sums[HH][2][4];
  for (int half = 0; half < 2; half += V) {
    Vec sum[HH][V * 4];
#pragma GCC unroll 5
    for (int h = 0; h < HH; ++h)
#pragma GCC unroll 8
      for (int i = 0; i < V * 4; ++i) sum[h][i] = set1(bias[h]);
    const bool prefetch = scan.ahead != nullptr && z == 0 && half == 0;
    const uint8_t* words = scan.rows + (z * 2 + half) * 64;
    for (int i = 0; i < (scan.r + 1) / 2; ++i, words += 2 * scan.row_bytes) {
      if (prefetch) scan.prefetch_row(2 * i), scan.prefetch_row(std::min(2 * i + 1, scan.r - 1));
      __m512i codes[V * 4];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) expand_words(_mm512_load_si512(words + v * 64), codes + v * 4);
#pragma GCC unroll 5
      for (int h = 0; h < HH; ++h) {
        const __m512bh w = (__m512bh)_mm512_set1_epi32(weights[h * weights_stride + i]);
#pragma GCC unroll 8
        for (int k = 0; k < V * 4; ++k) sum[h][k] = _mm512_dpbf16_ps(sum[h][k], (__m512bh)codes[k], w);
      }
    }
#pragma GCC unroll 5
    for (int h = 0; h < HH; ++h)
#pragma GCC unroll 8
      for (int k = 0; k < V * 4; ++k) sums[h][half + k / 4][k % 4] = sum[h][k];
  }
  for (int h = 0; h < HH; ++h) {
    float* to = scores + h * stride + z * 64;
    store_in_order(sums[h][0], sums[h][1], 0, to);
    store_in_order(sums[h][0], sums[h][1], 1, to + scan.n / 2);
  }
}

template <int HH>
void scan_heads_bf16(const Scan& scan, const bf16* weights, int weights_stride, const float* bias, float* scores,
                     int stride) {
  for (int z = 0; z < scan.n / PAIR_TOKENS; ++z)
    scan_pairs<HH>(scan, z, (const int32_t*)weights, weights_stride / 2, bias, scores, stride);
}

}  // namespace sparq

#endif
