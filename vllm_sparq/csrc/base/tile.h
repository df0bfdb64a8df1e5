// The two small matrix products of attention over a tile of tokens that are given by pointers:
// `dot_tile`, logits = q K^T, and `mix_tile`, acc += p V. Dense reads and gathered reads differ in the pointers alone.
#pragma once

#include "base/simd.h"

namespace sparq {

constexpr int TILE = 64;           // tokens; K and V of a tile (32 kB at D = 128, bf16) stay in L1 between the products
constexpr int MAX_TILE_HEADS = 4;  // query heads that share one load of K or V

// How K of type T is multiplied: in fp32, W elements at a time.
template <class T>
struct FloatMac {
  using Query = float;
  using Register = Vec;
  static constexpr int width = W;
  static SPARQ_INLINE Vec query(const float* p) { return load(p); }
  static SPARQ_INLINE Vec key(const T* p) { return load(p); }
  static SPARQ_INLINE Vec query_half(const float* p) { return load(p); }  // unused: every D is a multiple of W
  static SPARQ_INLINE Vec key_half(const T* p) { return load(p); }
  static SPARQ_INLINE Vec mac(Vec acc, Vec q, Vec k) { return fma(q, k, acc); }
};

template <class T>
struct Mac : FloatMac<T> {};

#ifdef SPARQ_BF16_VECTORS
// bf16 in its own type: 32 products per instruction, summed in fp32.
template <>
struct Mac<bf16> {
  using Query = bf16;
  using Register = __m512bh;
  static constexpr int width = 32;
  static SPARQ_INLINE __m512bh key(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static SPARQ_INLINE __m512bh query(const bf16* p) { return key(p); }
  static SPARQ_INLINE __m512bh key_half(const bf16* p) {
    return (__m512bh)_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  }
  static SPARQ_INLINE __m512bh query_half(const bf16* p) { return key_half(p); }
  static SPARQ_INLINE Vec mac(Vec acc, __m512bh q, __m512bh k) { return _mm512_dpbf16_ps(acc, q, k); }
};
#endif

// logits[h][t] = q[h] . K[t] for n tokens (a multiple of W), HH heads; logits rows are `stride` apart. While it
// computes, it prefetches K of the records of `ahead` (n pointers, or null); `mix_tile` does the same for V, so that
// requests to memory are spread over all of the time. (All of it in `dot_tile`: 34 instead of 27 ns a token, four
// heads, D = 128.)
template <class M, class T, int HH, int D>
void dot_tile(const typename M::Query* q, int head_size, const uint8_t* const* rows, int n, const uint8_t* const* ahead,
              float* logits, int stride) {
  constexpr int TT = HH == 1 ? W : HH == 2 ? W / 2 : W / 4;  // tokens at a time: HH * TT <= W accumulators
  const int d = D ? D : head_size;
  const int row_bytes = d * (int)sizeof(T);
  for (int t0 = 0; t0 < n; t0 += TT) {
    Vec acc[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) acc[i] = zero();
    const uint8_t* const* key = rows + t0;
    auto step = [&](auto load_query, auto load_key, int c) __attribute__((always_inline)) {
      typename M::Register query[HH];
#pragma GCC unroll 4
      for (int h = 0; h < HH; ++h) query[h] = load_query(q + h * d + c);
#pragma GCC unroll 16
      for (int t = 0; t < TT; ++t) {
        const auto k = load_key((const T*)key[t] + c);
#pragma GCC unroll 4
        for (int h = 0; h < HH; ++h) acc[h * TT + t] = M::mac(acc[h * TT + t], query[h], k);
      }
    };
    int c = 0;
    for (; c + M::width <= d; c += M::width) step(M::query, M::key, c);
    if (c < d) step(M::query_half, M::key_half, c);
    if (ahead != nullptr) {
      for (int t = t0; t < t0 + TT; ++t)
        for (int byte = 0; byte < row_bytes; byte += 64) prefetch_l2(ahead[t] + byte);
    }
    alignas(64) float sums[W];
    store(sums, reduce_each(acc));
#pragma GCC unroll 4
    for (int h = 0; h < HH; ++h) memcpy(logits + h * stride + t0, sums + h * TT, TT * sizeof(float));
  }
}

// How V of type T is weighted: fp32 weights, W channels at a time.
template <class T>
struct Mix {
  using Weight = float;
  // acc[h][c : c + CC * W] += sum over t of weights[h][t] V[t]; V begins `offset` bytes into a row.
  template <int HH, int CC>
  static SPARQ_INLINE void chunk(const Weight* weights, const uint8_t* const* rows, int n, int offset,
                                 const uint8_t* const* ahead, float* acc, int d) {
    Vec sum[HH][CC];
#pragma GCC unroll 4
    for (int h = 0; h < HH; ++h)
#pragma GCC unroll 4
      for (int c = 0; c < CC; ++c) sum[h][c] = load(acc + h * d + c * W);
    for (int t = 0; t < n; ++t) {
      const T* value = (const T*)(rows[t] + offset);
      if (ahead != nullptr)
        for (int byte = 0; byte < CC * W * (int)sizeof(T); byte += 64) prefetch_l2(ahead[t] + offset + byte);
      Vec v[CC];
#pragma GCC unroll 4
      for (int c = 0; c < CC; ++c) v[c] = load(value + c * W);
#pragma GCC unroll 4
      for (int h = 0; h < HH; ++h) {
        const Vec p = set1(weights[h * TILE + t]);
#pragma GCC unroll 4
        for (int c = 0; c < CC; ++c) sum[h][c] = fma(p, v[c], sum[h][c]);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < HH; ++h)
#pragma GCC unroll 4
      for (int c = 0; c < CC; ++c) store(acc + h * d + c * W, sum[h][c]);
  }
};

#ifdef SPARQ_BF16_VECTORS
// bf16 weights, two tokens per instruction. Rows come in pairs: an odd last token is paired with a row of weight 0.
template <>
struct Mix<bf16> {
  using Weight = bf16;
  template <int HH, int CC>
  static SPARQ_INLINE void chunk(const bf16* weights, const uint8_t* const* rows, int n, int offset,
                                 const uint8_t* const* ahead, float* acc, int d) {
    Vec sum[HH][CC];
#pragma GCC unroll 4
    for (int h = 0; h < HH; ++h)
#pragma GCC unroll 4
      for (int c = 0; c < CC; ++c) sum[h][c] = load(acc + h * d + c * W);
    for (int t = 0; t < n; t += 2) {
      const uint8_t *even = rows[t] + offset, *odd = rows[t + 1] + offset;
      if (ahead != nullptr)
        for (int byte = 0; byte < 2 * CC * W; byte += 64) {
          prefetch_l2(ahead[t] + offset + byte);
          prefetch_l2(ahead[t + 1] + offset + byte);
        }
      __m512bh v[CC];  // channel c of both tokens, side by side
#pragma GCC unroll 4
      for (int c = 0; c < CC; ++c) v[c] = interleave(even + 2 * c * W, odd + 2 * c * W);
#pragma GCC unroll 4
      for (int h = 0; h < HH; ++h) {
        int pair;
        memcpy(&pair, weights + h * TILE + t, 4);
        const __m512bh p = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int c = 0; c < CC; ++c) sum[h][c] = _mm512_dpbf16_ps(sum[h][c], v[c], p);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < HH; ++h)
#pragma GCC unroll 4
      for (int c = 0; c < CC; ++c) store(acc + h * d + c * W, sum[h][c]);
  }
  static SPARQ_INLINE __m512bh interleave(const uint8_t* even, const uint8_t* odd) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
    return (__m512bh)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
};
#endif

// acc[h] += sum over n tokens of weights[h][t] V[t], for HH heads; acc rows are D apart, weights rows TILE.
template <class T, int HH, int D>
void mix_tile(const typename Mix<T>::Weight* weights, int head_size, const uint8_t* const* rows, int n,
              const uint8_t* const* ahead, float* acc) {
  constexpr int CC = W == 16 ? 4 : 2;  // accumulators: HH * CC, at most half of the registers
  const int d = D ? D : head_size;
  int c = 0;
  for (; c + CC * W <= d; c += CC * W)
    Mix<T>::template chunk<HH, CC>(weights, rows, n, (d + c) * (int)sizeof(T), ahead, acc + c, d);
  for (; c < d; c += W) Mix<T>::template chunk<HH, 1>(weights, rows, n, (d + c) * (int)sizeof(T), ahead, acc + c, d);
}

}  // namespace sparq
