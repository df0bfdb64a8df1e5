#include "attend/attend.h"

#include <algorithm>
#include <cmath>

#include "base/softmax_tile.h"
#include "base/tile.h"

namespace sparq {
namespace {

template <class T, int HH, int D>
void absorb_heads(const Group& group, const State& state, int h0, const uint8_t* const* rows, int n,
                  const uint8_t* const* ahead) {
  using M = Mac<T>;
  using Weight = typename Mix<T>::Weight;
  alignas(64) float own_logits[HH * TILE];
  alignas(64) Weight weights[HH * TILE];
  const int d = D ? D : group.head_size;
  const int n_padded = (int)round_up((size_t)n, 16);
  const auto* query = (const typename M::Query*)group.query + (size_t)h0 * d;
  float* const logits = state.logits != nullptr ? state.logits + h0 * state.stride : own_logits;
  const int stride = state.logits != nullptr ? (int)state.stride : TILE;
  dot_tile<M, T, HH, D>(query, d, rows, n_padded, ahead, logits, stride);
  for (int h = 0; h < HH; ++h) {
    float rescale;
    float* const row = logits + (size_t)h * stride;
    const float scale = cap_logits(group, row, n);
    const float sum = softmax_tile(row, n, n_padded, scale * LOG2_E, &state.peak[h0 + h], &rescale, weights + h * TILE);
    state.total[h0 + h] = state.total[h0 + h] * rescale + sum;
    if (rescale != 1.0f) scale_row(state.acc + (size_t)(h0 + h) * d, d, rescale);
  }
  mix_tile<T, HH, D>(weights, d, rows, n, ahead, state.acc + (size_t)h0 * d);
}

template <class T, int D>
void absorb(const Group& group, const State& state, const uint8_t* const* rows, int n, const uint8_t* const* ahead) {
  few_at_a_time<MAX_TILE_HEADS>(group.n_heads, [&](int h, auto heads) {
    absorb_heads<T, heads, D>(group, state, h, rows, n, ahead);
    ahead = nullptr;  // once is enough
  });
}

#ifdef SPARQ_BF16_VECTORS
void copy_query(const bf16* from, int d, bf16* to) { memcpy(to, from, d * sizeof(bf16)); }
#endif
template <class T>
void copy_query(const T* from, int d, float* to) {
  for (int c = 0; c < d; c += W) store(to + c, load(from + c));
}

template <class T>
void load_query(const void* from, int head_size, void* to) {
  copy_query((const T*)from, head_size, (typename Mac<T>::Query*)to);
}

template <class T>
void finish(const float* acc, float total, float weight, const float* rest, int head_size, void* out) {
  const Vec factor = set1(weight / total);
  for (int c = 0; c < head_size; c += W)
    store((T*)out + c, fma(load(acc + c), factor, rest != nullptr ? load(rest + c) : zero()));
}

template <class T>
void widen(const void* from, int head_size, float* to) {
  copy_query((const T*)from, head_size, to);
}

// Few tokens (those of an unfinished block), so one head and any head size at a time will do.
template <class T>
void dot(const float* query, int n_heads, int head_size, const uint8_t* const* rows, int n, float* logits, int stride) {
  const int n_padded = (int)round_up((size_t)n, 16);
  int h = 0;
  for (; h + 4 <= n_heads; h += 4)
    dot_tile<FloatMac<T>, T, 4, 0>(query + (size_t)h * head_size, head_size, rows, n_padded, nullptr,
                                   logits + (size_t)h * stride, stride);
  for (; h < n_heads; ++h)
    dot_tile<FloatMac<T>, T, 1, 0>(query + (size_t)h * head_size, head_size, rows, n_padded, nullptr,
                                   logits + (size_t)h * stride, stride);
}

}  // namespace

float cap_logits(const Group& group, float* logits, int n) {
  if (group.soft_cap == 0.0f) return group.scale;
  for (int i = 0; i < n; i += W)
    store(logits + i, soft_capped(mul(load(logits + i), set1(group.scale)), group.soft_cap));
  return 1.0f;
}

void reset(const State& state, int n_heads, int head_size) {
  std::fill_n(state.acc, (size_t)n_heads * head_size, 0.0f);
  std::fill_n(state.peak, n_heads, -INFINITY);
  std::fill_n(state.total, n_heads, 0.0f);
}

void merge(const State& into, const State& from, int n_heads, int head_size) {
  for (int h = 0; h < n_heads; ++h) {
    const float peak = std::max(into.peak[h], from.peak[h]);
    const float a = std::exp2(into.peak[h] - peak), b = std::exp2(from.peak[h] - peak);
    float* acc = into.acc + (size_t)h * head_size;
    const float* other = from.acc + (size_t)h * head_size;
    for (int c = 0; c < head_size; c += W) store(acc + c, fma(load(acc + c), set1(a), mul(load(other + c), set1(b))));
    into.total[h] = into.total[h] * a + from.total[h] * b;
    into.peak[h] = peak;
  }
}

AttendKernels attend_kernels(DType dtype, int head_size) {
  AttendKernels kernels{};
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    with_head_size(head_size, [&](auto size) { kernels.absorb = absorb<T, decltype(size)::value>; });
    kernels.load_query = load_query<T>;
    kernels.query_bytes = sizeof(typename Mac<T>::Query);
    kernels.finish = finish<T>;
    kernels.widen = widen<T>;
    kernels.dot = dot<T>;
  });
  return kernels;
}

}  // namespace sparq
