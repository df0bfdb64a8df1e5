// How much of a context a read takes: vllm_sparq/reads, which has the meaning of each number. S is the context length.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sparq {

// Tokens of a span. Ranking `bounds`: [N/16, 2, D] of the model's type, the least K and the largest.
constexpr int SPAN_TOKENS = 16;
constexpr int LEAST_SPANS = 3;  // that a read of spans takes
inline int spans_of(int n_tokens) { return (n_tokens + SPAN_TOKENS - 1) / SPAN_TOKENS; }

struct SparqRead {
  int64_t min_k;
  int64_t slope, slope_divisor;  // of k over S
  int64_t dense_below;
  int64_t local;  // -1: a quarter of k
  int64_t least_k;
  int32_t r;
  int32_t probs;  // whether summed probabilities rank tokens, instead of summed logits
  float alpha_floor;
  float mass;  // 1: all of k

  int64_t k(int len) const { return std::max(min_k, len * slope / slope_divisor); }
  int n_selected(int len) const { return (int)std::min<int64_t>(len, k(len) + 1); }
  int n_local(int len) const {
    return (int)std::min<int64_t>(len, (local < 0 ? k(len) / 4 : std::min(local, k(len))) + 1);
  }
  int n_least(int len) const { return std::max(n_local(len), (int)std::min<int64_t>(n_selected(len), least_k + 1)); }
  bool is_dense(int len) const { return len < dense_below || len <= k(len) + 1; }
  bool has_mean() const { return alpha_floor < 1.0f; }
  bool cuts() const { return mass < 1.0f; }
};

struct SpansRead {
  int64_t min_k;
  int64_t slope, slope_divisor;
  int64_t dense_below;

  int n_spans(int len) const {
    const int64_t k = std::max(min_k, len * slope / slope_divisor);
    return (int)std::min<int64_t>(spans_of(len), std::max<int64_t>(LEAST_SPANS, k / SPAN_TOKENS));
  }
  bool is_dense(int len) const { return len < dense_below || n_spans(len) == spans_of(len); }
};

}  // namespace sparq
