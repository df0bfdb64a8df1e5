#include "rank/ranking_copy.h"

#include <cmath>

#include "base/reads.h"
#include "base/scratch.h"
#include "base/transpose.h"

namespace sparq {
namespace {

constexpr float FP16_MAX = 65504.0f;

// Saturates at what fp16 holds.
SPARQ_INLINE Vec within_fp16(Vec x) { return min(max(x, set1(-FP16_MAX)), set1(FP16_MAX)); }

// Step and zero of W channels.
struct Scale {
  Vec step, zero;
  unsigned has_step;

  // (x - zero) / step, rounded half to even, as a float 0 .. top; 0 in a constant channel.
  SPARQ_INLINE Vec code(Vec x, float top) const {
    const Vec y = round_even(div(sub(finite_or_zero(x), zero), step));
    return select(has_step, min(max(y, sparq::zero()), set1(top)), sparq::zero());
  }
};

// Scales of W channels over N tokens; `keys` is the first, tokens lie `stride` elements apart.
template <class T>
Scale find_scale(const T* keys, int64_t stride, int n_tokens, float top, fp16* steps, fp16* zeros) {
  Vec low = set1(INFINITY), high = set1(-INFINITY);
  for (int t = 0; t < n_tokens; ++t) {
    const Vec x = finite_or_zero(load(keys + t * stride));
    low = min(low, x), high = max(high, x);
  }
  Scale scale;
  store_down(zeros, within_fp16(low));
  scale.zero = load(zeros);
  store_up(steps, within_fp16(div(sub(high, scale.zero), set1(top))));
  scale.step = load(steps);
  scale.has_step = greater(scale.step, zero());
  return scale;
}

// Token-major codes: int4 pairs token t with token t + N/2 in a byte, so rows are N/2 for int4 and N for int8.
template <class T>
void quantize_channels(const T* keys, int64_t stride, int n_tokens, RankingType type, uint8_t* codes,
                       int64_t codes_stride, fp16* steps, fp16* zeros) {
  const float top = type == RankingType::int4 ? 15.0f : 255.0f;
  const Scale scale = find_scale(keys, stride, n_tokens, top, steps, zeros);
  if (type == RankingType::int8) {
    for (int t = 0; t < n_tokens; ++t) store_bytes(codes + t * codes_stride, scale.code(load(keys + t * stride), top));
    return;
  }
  const int half = n_tokens / 2;
  for (int t = 0; t < half; ++t) {
    const Vec low = scale.code(load(keys + t * stride), top), high = scale.code(load(keys + (t + half) * stride), top);
    store_bytes(codes + t * codes_stride, fma(high, set1(16.0f), low));
  }
}

template <class T>
void quantize(const Pages& pages, const T* keys, int64_t stride, uint8_t* page) {
  thread_local Scratch scratch;
  const int d = pages.head_size, n = pages.block_size;
  const int rows = pages.ranking_type == RankingType::int4 ? n / 2 : n;
  const size_t n_codes = round_up(rows, 16) * d;
  Arena arena = scratch.arena();
  uint8_t* codes = arena.take<uint8_t>(n_codes);
  fp16 *steps = arena.take<fp16>(d), *zeros = arena.take<fp16>(d);
  for (int c = 0; c < d; c += W)
    quantize_channels(keys + c, stride, n, pages.ranking_type, codes + c, d, steps + c, zeros + c);

  transpose_bytes(codes, d, rows, d, page + pages.ranking, rows);
  auto* scales = (fp16*)(page + pages.scales);
  for (int c = 0; c < d; ++c) scales[2 * c] = steps[c], scales[2 * c + 1] = zeros[c];
}

template <class T>
void copy(const Pages& pages, const T* keys, int64_t stride, uint8_t* page) {
  constexpr int bytes = sizeof(T);
  const int d = pages.head_size, n = pages.block_size;
  transpose<bytes>((const uint8_t*)keys, stride * bytes, n, d, page + pages.ranking, n * bytes);
}

template <class T>
void bound(const uint8_t* const* rows, int n, int d, T* bounds) {
  for (int c = 0; c < d; c += W) {
    Vec low = set1(INFINITY), high = set1(-INFINITY);
    for (int t = 0; t < n; ++t) {
      const Vec x = finite_or_zero(load((const T*)rows[t] + c));
      low = min(low, x), high = max(high, x);
    }
    store(bounds + c, low), store(bounds + d + c, high);
  }
}

void bound_spans(const Pages& pages, const uint8_t* keys, size_t row_bytes, uint8_t* page) {
  for (int span = 0; span < pages.block_size / SPAN_TOKENS; ++span) {
    const uint8_t* rows[SPAN_TOKENS];
    for (auto& row : rows) row = keys, keys += row_bytes;
    bound_span(pages, rows, SPAN_TOKENS, page + pages.ranking + span * pages.record_bytes());
  }
}

}  // namespace

void bound_span(const Pages& pages, const uint8_t* const* rows, int n, uint8_t* bounds) {
  with_dtype(pages.dtype, [&](auto type) { bound(rows, n, pages.head_size, (decltype(type)*)bounds); });
}

void make_ranking_copy(const Pages& pages, const void* keys, int64_t stride, uint8_t* page) {
  if (pages.ranking_type == RankingType::bounds)
    return bound_spans(pages, (const uint8_t*)keys, stride * pages.element_bytes(), page);
  with_dtype(pages.dtype, [&](auto type) {
    using T = decltype(type);
    pages.ranking_type == RankingType::model ? copy(pages, (const T*)keys, stride, page)
                                             : quantize(pages, (const T*)keys, stride, page);
  });
}

}  // namespace sparq
