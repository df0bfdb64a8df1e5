// How much of a context a read takes: vllm_sparq/reads, which has the meaning of each number. S is the context length.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sparq {

// Tokens of a span. Ranking `bounds`: [N/16, 2, D] of the model's type, the least K and the largest. `representatives`:
// twice the mean of REPRESENTATIVES keys, once the WINDOW_SPANS spans after it are full, and until then fp32 [D], the
// sum of the span's queries.
constexpr int SPAN_TOKENS = 16;
constexpr int REPRESENTATIVES = 4;
constexpr int WINDOW_SPANS = 8;
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
  int64_t least;  // spans, the first and the newest ones among them
  int64_t n_first, least_newest;
  int64_t local;  // newest tokens; -1: two thirds of what is read

  int n_spans(int len) const {
    const int64_t k = std::max(min_k, len * slope / slope_divisor);
    return (int)std::min<int64_t>(spans_of(len), std::max(least, k / SPAN_TOKENS));
  }
  // Of a context that is not read in full.
  int n_newest(int len) const {
    const int64_t n = n_spans(len), wanted = local < 0 ? 2 * n / 3 : spans_of((int)local) + 1;
    return (int)std::min(std::max(least_newest, wanted), n - n_first - 1);
  }
  bool is_dense(int len) const { return len < dense_below || n_spans(len) == spans_of(len); }
};

}  // namespace sparq
