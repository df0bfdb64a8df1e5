// vllm_sparq/ops/represent: add up the queries of spans, and find the keys that the queries after a span match best.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "api.h"
#include "base/scratch.h"
#include "base/simd.h"

namespace sparq {
namespace {

// One KV head of one request.
template <class T>
struct Spans {
  const Pages& pages;
  Sequence sequence;
  int group;  // query heads

  uint8_t* of(int span) const {
    const int per_block = pages.block_size / SPAN_TOKENS;
    return sequence.page(span / per_block) + pages.ranking + span % per_block * pages.record_bytes();
  }
  float* query_sum(int span) const { return (float*)of(span); }

  // Step 1: the query of a token, the heads of its group together, joins its span's.
  void add_query(const Heads<const T>& query, int64_t row, int token) const {
    float* const sum = query_sum(token / SPAN_TOKENS);
    const bool opens = token % SPAN_TOKENS == 0;
    for (int c = 0; c < pages.head_size; c += W) {
      Vec own = zero();
      for (int h = 0; h < group; ++h) own = add(own, load(query.at(row, sequence.head * group + h) + c));
      store(sum + c, opens ? own : add(load(sum + c), own));
    }
  }

  // Step 2: the window of a span is full.
  void represent(int span, float* window) const {
    const int d = pages.head_size;
    for (int c = 0; c < d; c += W) {
      Vec sum = zero();
      for (int ahead = 1; ahead <= WINDOW_SPANS; ++ahead) sum = add(sum, load(query_sum(span + ahead) + c));
      store(window + c, sum);
    }
    const T* keys[SPAN_TOKENS];
    float score[SPAN_TOKENS];
    for (int i = 0; i < SPAN_TOKENS; ++i) {
      const int token = span * SPAN_TOKENS + i;
      keys[i] = (const T*)sequence.record(token / pages.block_size, token % pages.block_size);
      Vec sum = zero();
      for (int c = 0; c < d; c += W) sum = fma(load(window + c), load(keys[i] + c), sum);
      score[i] = reduce_add(sum);
      if (!std::isfinite(score[i])) score[i] = -INFINITY;
    }
    auto* const to = (T*)of(span);  // of the span's query sum nobody needs to know any longer
    const T* chosen[REPRESENTATIVES];
    choose(keys, score, chosen);
    for (int c = 0; c < d; c += W) {
      Vec sum = zero();
      for (const T* key : chosen) sum = add(sum, finite_or_zero(load(key + c)));
      const Vec mean = mul(sum, set1(1.0f / REPRESENTATIVES));
      store(to + c, mean), store(to + d + c, mean);
    }
  }

  // The keys with the largest scores, in the order of their tokens; of equal ones the oldest.
  static void choose(const T* const* keys, const float* score, const T** chosen) {
    int order[SPAN_TOKENS];
    for (int i = 0; i < SPAN_TOKENS; ++i) order[i] = i;
    std::stable_sort(order, order + SPAN_TOKENS, [&](int a, int b) { return score[a] > score[b]; });
    std::sort(order, order + REPRESENTATIVES);
    for (int i = 0; i < REPRESENTATIVES; ++i) chosen[i] = keys[order[i]];
  }
};

template <class T>
void represent(const Pages& pages, const Tensor& query, const Requests& requests, const int32_t* query_start_loc) {
  constexpr int64_t PARALLEL_ELEMENTS = 64 << 10;  // less is done before a team has woken up
  const Heads<const T> queries(query);
  const int64_t n_heads = pages.n_kv_heads, n_rows = query_start_loc[requests.n] - query_start_loc[0];
#pragma omp parallel for schedule(dynamic, 1) if (n_rows * query.n_heads * pages.head_size > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < requests.n * n_heads; ++i) {
    thread_local Scratch scratch;
    const int b = (int)(i / n_heads), len = requests.lens[b];
    const int64_t start = query_start_loc[b];
    const int n_new = (int)(query_start_loc[b + 1] - start);
    const Sequence sequence{&pages, requests.blocks(b), (int)(i % n_heads)};
    const Spans<T> spans{pages, sequence, query.n_heads / (int)n_heads};
    Arena arena = scratch.arena();
    float* const window = arena.take<float>(pages.head_size);
    for (int token = std::max(len - n_new, 0); token < len; ++token) {
      spans.add_query(queries, start + token - (len - n_new), token);
      const int represented = token / SPAN_TOKENS - WINDOW_SPANS;
      if (token % SPAN_TOKENS == SPAN_TOKENS - 1 && represented >= 0) spans.represent(represented, window);
    }
  }
}

}  // namespace
}  // namespace sparq

SPARQ_API void sparq_represent(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Requests& requests,
                               const int32_t* query_start_loc) {
  sparq::with_dtype(pages.dtype,
                    [&](auto type) { sparq::represent<decltype(type)>(pages, query, requests, query_start_loc); });
}
