#include "ranking.h"

#include <algorithm>
#include <cmath>

#include "scan.h"
#include "select.h"

namespace sparq {
namespace {

int row_bytes(const Pages& pages) {
  switch (pages.scoring_type) {
    case Scoring::int4: return pages.block_size / 2;
    case Scoring::int8: return pages.block_size;
    default: return pages.block_size * (pages.dtype == DType::fp32 ? 4 : 2);
  }
}

// The r channels with the largest sum of |q| over the group q [n_heads, D], ascending (ties: lowest channel).
void pick_channels(const float* q, int n_heads, int d, int r, int32_t* channels, float* importance) {
  for (int c = 0; c < d; c += W) {
    Vec sum = zero();
    for (int h = 0; h < n_heads; ++h) {
      const Vec x = load(q + (size_t)h * d + c);
      sum = add(sum, max(x, sub(zero(), x)));
    }
    store(importance + c, sum);
  }
  int n = 0, n_ties = 0;
  const float least = kth_largest(importance, d, r, &n_ties);
  for (int c = 0; c < d && n < r; ++c)
    if (importance[c] > least || (importance[c] == least && n_ties-- > 0)) channels[n++] = c;
  for (int c = 0; n < r; ++c) channels[n++] = c;  // only if q holds NaN
}

// scale * sqrt(|q|_1 / |q[channels]|_1); scale where the chosen part is zero.
float temperature(const float* q, int d, const int32_t* channels, int r, float scale) {
  float all = 0, chosen = 0;
  for (int c = 0; c < d; ++c) all += std::fabs(q[c]);
  for (int i = 0; i < r; ++i) chosen += std::fabs(q[channels[i]]);
  return chosen > 0 ? scale / std::sqrt(chosen / all) : scale;
}

// Weights and bias of a page: q (zero + step code) = q zero + (q step) code.
void apply_ranges(const Ranking& ranking, const uint8_t* page) {
  const auto* pairs = (const uint32_t*)(page + ranking.pages->ranges);
  fp16 *steps = ranking.ranges, *zeros = ranking.ranges + ranking.stride;
  for (int i = 0; i < ranking.r; ++i) {
    const uint32_t pair = pairs[ranking.channels[i]];
    steps[i].bits = (uint16_t)pair;
    zeros[i].bits = (uint16_t)(pair >> 16);
  }
  for (int row = 0; row < ranking.n_rows; ++row) {
    const float* q = ranking.query + row * ranking.stride;  // zero from r on
    float* weights = ranking.weights + row * ranking.stride;
    Vec bias = zero();
    for (int i = 0; i < ranking.r; i += W) {
      bias = fma(load(q + i), load(zeros + i), bias);
      store(weights + i, mul(load(q + i), load(steps + i)));
    }
    ranking.bias[row] = reduce_add(bias);
  }
}

template <class Codes>
void scan_page(const Ranking& ranking, Scan scan, const float* weights, float* scores, int stride) {
  for (int row = 0; row < ranking.n_rows; row += 4, scan.ahead = nullptr) {
    const float* w = weights + row * ranking.stride;
    const float* bias = ranking.bias + row;
    float* to = scores + (size_t)row * stride;
    switch (std::min(ranking.n_rows - row, 4)) {
      case 1: scan_heads<Codes, 1>(scan, w, ranking.stride, bias, to, stride); break;
      case 2: scan_heads<Codes, 2>(scan, w, ranking.stride, bias, to, stride); break;
      case 3: scan_heads<Codes, 3>(scan, w, ranking.stride, bias, to, stride); break;
      default: scan_heads<Codes, 4>(scan, w, ranking.stride, bias, to, stride);
    }
  }
}

}  // namespace

size_t Ranking::n_bytes(int head_size, int n_rows) {
  const size_t stride = round_up((size_t)head_size, 16);
  return 2 * Arena::room<int32_t>(stride) + 3 * Arena::room<float>(n_rows * stride) + Arena::room<float>(n_rows) +
         Arena::room<fp16>(2 * stride);
}

Ranking Ranking::in(Arena& arena, const Pages& pages, int r, int n_rows) {
  const size_t d = pages.head_size, stride = round_up(d, 16);
  const Ranking ranking{&pages, r, n_rows, arena.take<int32_t>(stride), arena.take<int32_t>(stride),
                        arena.take<float>(n_rows * stride), arena.take<float>(n_rows * d),
                        arena.take<float>(n_rows * stride), arena.take<float>(n_rows), arena.take<fp16>(2 * stride),
                        (int)stride};
  std::fill_n(ranking.query, n_rows * stride, 0.0f);
  std::fill_n(ranking.whole_query, n_rows * d, 0.0f);
  std::fill_n(ranking.bias, n_rows, 0.0f);
  std::fill_n(ranking.ranges, 2 * stride, fp16{0});
  return ranking;
}

Ranking make_ranking(const Decode& call, int request, int head, int r, bool per_head, Arena& arena) {
  const int d = call.pages.head_size, n_heads = call.group_size();
  const Ranking ranking = Ranking::in(arena, call.pages, r, per_head ? n_heads : 1);
  const int stride = ranking.stride, bytes = row_bytes(call.pages);
  thread_local Scratch heads;
  float* importance = heads.arena(((size_t)n_heads + 1) * d * sizeof(float)).take<float>(((size_t)n_heads + 1) * d);
  float* q = importance + d;
  for (int h = 0; h < n_heads; ++h)
    call.kernels.widen(call.query.at(request, head * n_heads + h), d, q + (size_t)h * d);
  pick_channels(q, n_heads, d, r, ranking.channels, importance);
  for (int i = 0; i < r; ++i) ranking.row_offsets[i] = ranking.channels[i] * bytes;
  for (int h = 0; h < n_heads; ++h) {
    const float* from = q + (size_t)h * d;
    const float factor = temperature(from, d, ranking.channels, r, call.scale);
    const int row = per_head ? h : 0;
    for (int i = 0; i < r; ++i) {
      const float x = from[ranking.channels[i]] * factor;
      ranking.query[row * stride + i] += x;
      ranking.whole_query[row * d + ranking.channels[i]] += x;
    }
  }
  return ranking;
}

void score_page(const Ranking& ranking, const uint8_t* page, const uint8_t* ahead, float* scores, int stride) {
  const Pages& pages = *ranking.pages;
  const uint8_t* next = ahead != nullptr ? ahead + pages.scoring : nullptr;
  const Scan scan{page + pages.scoring, next, ranking.row_offsets, ranking.r, row_bytes(pages), pages.block_size};
  if (pages.scoring_type == Scoring::model) {
    with_dtype(pages.dtype, [&](auto type) {
      scan_page<ModelCodes<decltype(type)>>(ranking, scan, ranking.query, scores, stride);
    });
    return;
  }
  if (ahead != nullptr)
    for (int byte = 0; byte < 4 * pages.head_size; byte += 64) prefetch_l2(ahead + pages.ranges + byte);
  apply_ranges(ranking, page);
  if (pages.scoring_type == Scoring::int4)
    scan_page<Int4Codes>(ranking, scan, ranking.weights, scores, stride);
  else
    scan_page<Int8Codes>(ranking, scan, ranking.weights, scores, stride);
}

}  // namespace sparq
