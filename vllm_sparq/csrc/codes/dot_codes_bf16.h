// Logits of tokens whose K is a row of codes, where the CPU multiplies bf16: 16 tokens at a time are turned over, so
// that a lane is a token and a group's step and zero are applied to 16 logits at once, in fp32.
#pragma once

#include <numeric>

#include "codes/codes_bf16.h"
#include "codes/turned.h"

#ifdef SPARQ_BF16_VECTORS

namespace sparq {

inline bool can_dot_bf16(const CodeShape& shape) {
  return shape.dtype == DType::bf16 && shape.has_zero && can_turn(shape);
}

inline float sum_of(const float* x, int n) {
  Vec sum = zero();
  int i = 0;
  for (; i + W <= n; i += W) sum = add(sum, load(x + i));
  return std::accumulate(x + i, x + n, reduce_add(sum));
}

inline void pair_query_bf16(const CodeShape& key, const CodesQuery& query, int n_heads) {
  bf16 words[2 * DOT_BYTES];
  for (int h = 0; h < n_heads; ++h) {
    const float* q = query.whole + (size_t)h * query.stride;
    for (int c = 0; c < key.n; c += W) store_upper(words + c, load(q + c));  // it came from bf16
    write_pairs(key, (const uint16_t*)words, query.pairs + (size_t)h * query.n_pairs);
    for (int g = 0; g < query.n_groups; ++g) query.sums[h * query.n_groups + g] = sum_of(q + g * key.group, key.group);
  }
}

// acc[h][nibble] = q . codes.
template <class C, int HH>
SPARQ_INLINE void dot_segment(const __m512i* turned, const Segment& segment, const int32_t* pairs, int pair_stride,
                              Vec (&acc)[HH][4]) {
  constexpr int CHAINS = HH == 1 ? 2 : 1;  // sums wait for sums: four of them are too few to keep the CPU busy
  const __m512i even = C::table[0].load(), odd = C::table[C::tables - 1].load();
  Vec sum[CHAINS][HH][4];
#pragma GCC unroll 16
  for (int i = 0; i < CHAINS * HH * 4; ++i) (&sum[0][0][0])[i] = zero();
  const auto add_dword = [&](int k, Vec(&to)[HH][4]) __attribute__((always_inline)) {
    const __m512i words = turned[k];
    const __m512i codes[4] = {_mm512_permutexvar_epi16(words, even),
                              _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), odd),
                              _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), even),
                              _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), odd)};
#pragma GCC unroll 4
    for (int h = 0; h < HH; ++h)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const auto q = (__m512bh)_mm512_set1_epi32(pairs[h * pair_stride + k * 4 + i]);
        to[h][i] = _mm512_dpbf16_ps(to[h][i], (__m512bh)codes[i], q);
      }
  };
  for (int k = segment.first; k < segment.last; k += 2) {  // groups are whole pairs of dwords
    add_dword(k, sum[0]);
    add_dword(k + 1, sum[CHAINS - 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < HH * 4; ++i) {
    const Vec first = (&sum[0][0][0])[i];
    (&acc[0][0])[i] = CHAINS == 2 ? add(first, (&sum[CHAINS - 1][0][0])[i]) : first;
  }
}

// logits[h] of 16 rows that are turned over, for HH heads from h0 on.
template <class C, int HH>
void dot_heads_bf16(const TurnedRows<C::planes>& rows, const CodesQuery& query, int h0, float* logits, int stride) {
  const int n_groups = query.n_groups;
  const int32_t* const pairs = query.pairs + (size_t)h0 * query.n_pairs;
  const float* const sums = query.sums + (size_t)h0 * n_groups;
  Vec total[HH];
#pragma GCC unroll 4
  for (int h = 0; h < HH; ++h) total[h] = zero();
  const auto step_of = [&](int g) { return _mm512_castsi512_ps(_mm512_slli_epi32(rows.scales[g], 16)); };
  const auto apply = [&](int g, int h, Vec dot) { total[h] = fma(step_of(g), dot, total[h]); };
  for (int s = 0; s < rows.n_segments; ++s) {
    const Segment& segment = rows.segments[s];
    Vec acc[HH][4];
    dot_segment<C, HH>(rows.codes, segment, pairs, query.n_pairs, acc);
#pragma GCC unroll 4
    for (int h = 0; h < HH; ++h) {
      const Vec even = add(acc[h][0], acc[h][2]), odd = add(acc[h][1], acc[h][3]);
      apply(segment.group[0], h, even), apply(segment.group[1], h, odd);
    }
  }
  // Zeros go by group and not by segment: a group may be in both planes, or in several segments.
  for (int g = 0; g < n_groups; ++g) {
    const Vec low = _mm512_castsi512_ps(_mm512_and_si512(rows.scales[g], _mm512_set1_epi32((int)0xffff0000)));
    const Vec base = fma(set1(C::middle), step_of(g), low);
#pragma GCC unroll 4
    for (int h = 0; h < HH; ++h) total[h] = fma(base, set1(sums[h * n_groups + g]), total[h]);
  }
#pragma GCC unroll 4
  for (int h = 0; h < HH; ++h) store(logits + (size_t)(h0 + h) * stride, total[h]);
}

template <class C>
void dot_bf16(const CodeShape& shape, const CodesQuery& query, int n_heads, const CodeRows& rows, float* logits,
              int stride, Ahead& ahead) {
  TurnedRows<C::planes> turned(shape);
  const int share = ahead.share((rows.n + W - 1) / W);
  for (int t = 0; t < rows.n; t += W) {
    turned.take(shape, rows, t);
    ahead.step(share);
    few_at_a_time<MAX_TILE_HEADS>(
        n_heads, [&](int h, auto heads) { dot_heads_bf16<C, heads>(turned, query, h, logits + t, stride); });
  }
}

}  // namespace sparq

#endif
