#include "rank/ranking.h"

#include <algorithm>
#include <cmath>

#include "base/tile.h"
#include "rank/scan.h"
#include "rank/scan_bf16.h"
#include "rank/scan_bytes.h"
#include "rank/scan_int16.h"
#include "rank/select.h"

namespace sparq {
namespace {

constexpr int MAX_ROWS = 8;  // heads whose bias is kept in registers

int row_bytes(const Pages& pages) {
  if (pages.channel_keys) return (int)pages.key.code_stride;
  switch (pages.ranking_type) {
    case RankingType::int4: return pages.block_size / 2;
    case RankingType::int8: return pages.block_size;
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
  const float least = bar_of_largest(importance, d, r, &n_ties);
  for (int c = 0; c < d && n < r; ++c)
    if (importance[c] > least || (importance[c] == least && n_ties-- > 0)) channels[n++] = c;
  for (int c = 0; n < r; ++c) channels[n++] = c;  // only if q holds NaN
}

// scale * sqrt(|q|_1 / |q[channels]|_1); scale where the chosen part is zero.
float temperature(const float* q, int d, const int32_t* channels, int r, float scale) {
  Vec all = zero();
  for (int c = 0; c < d; c += W) all = add(all, magnitude(load(q + c)));
  float chosen = 0;
  for (int i = 0; i < r; ++i) chosen += std::fabs(q[channels[i]]);
  return chosen > 0 ? scale / std::sqrt(chosen / reduce_add(all)) : scale;
}

// Weights and bias of a page: q (zero + step code) = q zero + (q step) code.
void apply_scales(const Ranking& ranking, const uint8_t* page) {
  Vec bias[MAX_ROWS];
  for (int first = 0; first < ranking.n_rows; first += MAX_ROWS) {
    const int n_rows = std::min(MAX_ROWS, ranking.n_rows - first);
    for (int row = 0; row < n_rows; ++row) bias[row] = zero();
    for (int i = 0; i < ranking.r; i += W) {
      Vec step, low;
      gather_pairs(page + ranking.pages->scales, ranking.channels + i, &step, &low);
      for (int row = 0; row < n_rows; ++row) {
        const int at = (first + row) * ranking.stride + i;
        const Vec q = load(ranking.query + at), w = mul(q, step);  // q is zero from r on
        bias[row] = fma(q, low, bias[row]);
        store(ranking.weights + at, w);
        store(ranking.short_weights + at, w);
      }
    }
    for (int row = 0; row < n_rows; ++row) ranking.bias[first + row] = reduce_add(bias[row]);
  }
}

// Whether the chosen rows are multiplied as whole numbers, and with what.
bool has_words(const Pages& pages, int r) {
  return pages.dtype != DType::fp32 && !pages.channel_keys && pages.ranking_type != RankingType::model &&
         can_scan_int16(r, row_bytes(pages));
}

// The same for whole numbers.
void apply_scales_int16(const Ranking& ranking, const uint8_t* page, float middle) {
  alignas(64) float steps[SUM_ROWS], mids[SUM_ROWS];
  const int n_padded = (int)round_up((size_t)ranking.r, 2 * W);
  for (int i = 0; i < n_padded; i += W) {
    Vec step = zero(), low = zero();
    if (i < ranking.r) gather_pairs(page + ranking.pages->scales, ranking.channels + i, &step, &low);
    store(steps + i, step), store(mids + i, fma(set1(middle), step, low));
  }
  const GroupScales scales = GroupScales::of(steps, mids, n_padded);
  for (int row = 0; row < ranking.n_rows; ++row)
    ranking.by_row[row] =
        GroupWeights::of(ranking.numbers[row], scales, ranking.r, middle, ranking.words + (size_t)row * 2 * SCAN_PAIRS);
}

// Calls f(row, count) for all rows, at most five at a time: four heads and their sum. Only the first ones prefetch.
template <class F>
void few_rows_at_a_time(int n_rows, Scan& scan, F&& f) {
  few_at_a_time<5>(n_rows, [&](int row, auto count) {
    f(row, count);
    scan.ahead = nullptr;
  });
}

template <class Codes>
void scan_page(const Ranking& ranking, const uint8_t* copy, Scan scan, const float* weights, float* scores,
               int stride) {
  stage_rows(copy, ranking.row_offsets, ranking.r, scan.row_bytes, ranking.rows);
  few_rows_at_a_time(ranking.n_rows, scan, [&](int row, auto heads) {
    scan_heads<Codes, heads>(scan, weights + row * ranking.stride, ranking.stride, ranking.bias + row,
                             scores + (size_t)row * stride, stride);
  });
}

// Where the CPU multiplies bf16 and the model is bf16, so are the weights of the scan.
bool scan_int4_in_bf16(const Ranking& ranking, const uint8_t* page, Scan scan, float* scores, int stride) {
#ifdef SPARQ_BF16_VECTORS
  if (ranking.pages->dtype != DType::bf16 || scan.n % PAIR_TOKENS != 0) return false;
  apply_scales(ranking, page);
  stage_pairs(page + ranking.pages->ranking, ranking.row_offsets, ranking.r, scan.row_bytes, ranking.rows);
  few_rows_at_a_time(ranking.n_rows, scan, [&](int row, auto heads) {
    scan_heads_bf16<heads>(scan, ranking.short_weights + row * ranking.stride, ranking.stride, ranking.bias + row,
                           scores + (size_t)row * stride, stride);
  });
  return true;
#else
  (void)ranking, (void)page, (void)scan, (void)scores, (void)stride;
  return false;
#endif
}

template <class C>
void scan_words(const Ranking& ranking, const uint8_t* page, Scan scan, float* scores, int stride) {
  apply_scales_int16(ranking, page, C::middle);
  stage_word_pairs(page + ranking.pages->ranking, ranking.row_offsets, ranking.r, scan.row_bytes, ranking.rows);
  few_rows_at_a_time(ranking.n_rows, scan, [&](int row, auto heads) {
    const ScanWeights weights{ranking.words + (size_t)row * 2 * SCAN_PAIRS, ranking.by_row + row};
    scan_heads_int16<C, heads>(scan, weights, scores + (size_t)row * stride, stride);
  });
}

// The chosen rows of channel-major K itself, whose scales differ from one group of tokens to the next.
void score_key_codes(const Ranking& ranking, const uint8_t* page, const uint8_t* ahead, float* scores, int stride) {
  const Codes& key = ranking.pages->key;
  const CodeKernels& kernels = *ranking.codes;
  constexpr int AT_ONCE = 64;  // channels
  const uint8_t *codes[AT_ONCE + 1], *scales[AT_ONCE];
  for (int row = 0; row < ranking.n_rows; ++row) std::fill_n(scores + (size_t)row * stride, kernels.key.n, 0.0f);
  for (int first = 0; first < ranking.r; first += AT_ONCE) {
    const int n = std::min(AT_ONCE, ranking.r - first);
    for (int i = 0; i < n; ++i) {
      const int32_t channel = ranking.channels[first + i];
      const int64_t code = key.codes + channel * key.code_stride, scale = key.scales + channel * key.scale_stride;
      codes[i] = page + code, scales[i] = page + scale;
      if (ahead == nullptr) continue;
      for (int byte = 0; byte < kernels.key.row_bytes(); byte += 64) prefetch_l2(ahead + code + byte);
      prefetch_l2(ahead + scale);
    }
    codes[n] = codes[n - 1];
    Ahead nothing;
    kernels.mix_keys(kernels.key, {codes, scales, n}, ranking.query + first, ranking.stride, ranking.n_rows, scores,
                     stride, nothing);
  }
}

// The same of rows that are scored in the model's type, in bf16 or in 16 bits, or in fp32.
void score_rows(const Ranking& ranking, const uint8_t* page, Scan scan, float* scores, int stride) {
  const Pages& pages = *ranking.pages;
  const uint8_t* const copy = page + pages.ranking;
  const bool int8 = pages.ranking_type == RankingType::int8;
  if (!int8 && scan_int4_in_bf16(ranking, page, scan, scores, stride)) return;
  if (ranking.numbers != nullptr)
    return int8 ? scan_words<WordCodes<8, false>>(ranking, page, scan, scores, stride)
                : scan_words<WordCodes<4, false>>(ranking, page, scan, scores, stride);
  apply_scales(ranking, page);
  if (int8) scan_page<Int8Codes>(ranking, copy, scan, ranking.weights, scores, stride);
  else scan_page<Int4Codes>(ranking, copy, scan, ranking.weights, scores, stride);
}

}  // namespace

Ranking Ranking::in(Arena& arena, const Decode& call, int r, ScoreRows rows) {
  const Pages& pages = call.pages;
  const int n_rows = rows.n();
  const size_t d = pages.head_size, stride = round_up(d, 2 * W);
  Ranking ranking{&pages,
                  &call.codes,
                  r,
                  n_rows,
                  arena.take<int32_t>(stride),
                  arena.take<int32_t>(stride),
                  arena.take<float>(n_rows * stride),
                  arena.take<float>(n_rows * d),
                  arena.take<float>(n_rows * stride),
                  arena.take<bf16>(n_rows * stride),
                  arena.take<float>(n_rows),
                  nullptr,
                  nullptr,
                  nullptr,
                  nullptr,
                  arena.take<uint8_t>((size_t)(r + 1) * row_bytes(pages) + 64),
                  (int)stride};
  if (has_words(pages, r)) {
    ranking.numbers = arena.take<HeadNumbers>(n_rows), ranking.by_row = arena.take<GroupWeights>(n_rows);
    ranking.words = arena.take<int16_t>((size_t)n_rows * 2 * SCAN_PAIRS);
  }
  if (rows.has_sum() && pages.ranking_type == RankingType::int4 && can_scan_bytes(pages.dtype, r, row_bytes(pages)))
    ranking.bytes = arena.take<int8_t>(stride);
  std::fill_n(ranking.channels, stride, 0);
  std::fill_n(ranking.query, n_rows * stride, 0.0f);
  std::fill_n(ranking.whole_query, n_rows * d, 0.0f);
  std::fill_n(ranking.bias, n_rows, 0.0f);
  return ranking;
}

Ranking make_ranking(const Decode& call, int request, int head, int r, ScoreRows rows, Arena& arena) {
  const int d = call.pages.head_size, n_heads = call.group_size();
  const Ranking ranking = Ranking::in(arena, call, r, rows);
  const int stride = ranking.stride, bytes = row_bytes(call.pages);
  thread_local Scratch heads;
  float* importance = heads.arena().take<float>(((size_t)n_heads + 1) * d);
  float* q = importance + d;
  for (int h = 0; h < n_heads; ++h)
    call.kernels.widen(call.query.at(request, head * n_heads + h), d, q + (size_t)h * d);
  pick_channels(q, n_heads, d, r, ranking.channels, importance);
  std::fill(ranking.channels + r, ranking.channels + stride, ranking.channels[r - 1]);  // of no other channel's range
  for (int i = 0; i < (int)round_up(r, QUAD); ++i)
    ranking.row_offsets[i] = ranking.channels[std::min(i, r - 1)] * bytes;
  for (int h = 0; h < n_heads; ++h) {
    const float* from = q + (size_t)h * d;
    const float factor = temperature(from, d, ranking.channels, r, call.logits.scale);
    const auto add_to_row = [&](int row) {
      for (int i = 0; i < r; ++i) {
        const float x = from[ranking.channels[i]] * factor;
        ranking.query[row * stride + i] += x;
        ranking.whole_query[row * d + ranking.channels[i]] += x;
      }
    };
    if (rows.heads) add_to_row(h);
    if (rows.has_sum()) add_to_row(ranking.n_rows - 1);
  }
  for (int row = 0; ranking.numbers != nullptr && row < ranking.n_rows; ++row)
    ranking.numbers[row].take(ranking.query + (size_t)row * stride, r);
  return ranking;
}

void touch_page(const Pages& pages, const uint8_t* page) {
  const int64_t first = pages.channel_keys ? pages.key.codes : pages.ranking;
  const int64_t end = pages.channel_keys  ? pages.value.codes
                      : pages.scales >= 0 ? pages.scales + 4 * pages.head_size
                                          : pages.ranking + (int64_t)pages.head_size * row_bytes(pages);
  for (int64_t byte = first; byte < end; byte += 4096) prefetch_l2(page + byte);
  prefetch_l2(page + end - 1);
}

void score_page(const Ranking& ranking, const uint8_t* page, const uint8_t* ahead, float* scores, int stride) {
  const Pages& pages = *ranking.pages;
  if (pages.channel_keys) return score_key_codes(ranking, page, ahead, scores, stride);
  const uint8_t *copy = page + pages.ranking, *next = ahead != nullptr ? ahead + pages.ranking : nullptr;
  const Scan scan{ranking.rows, next, ranking.row_offsets, ranking.r, row_bytes(pages), pages.block_size};
  if (pages.ranking_type == RankingType::model) {
    with_dtype(pages.dtype, [&](auto type) {
      scan_page<ModelCodes<decltype(type)>>(ranking, copy, scan, ranking.query, scores, stride);
    });
    return;
  }
  if (ahead != nullptr)
    for (int byte = 0; byte < 4 * pages.head_size; byte += 64) prefetch_l2(ahead + pages.scales + byte);
  if (ranking.bytes != nullptr) {
    const int row = ranking.n_rows - 1;
    ByteWeights weights{ranking.bytes, 0, 0};
    weigh_bytes(ranking.query + (size_t)row * ranking.stride, page + pages.scales, ranking.channels, ranking.r,
                weights);
    Scan in_place = scan;
    in_place.rows = copy;
    scan_bytes(in_place, weights, scores + (size_t)row * stride);
    if (row == 0) return;
    return score_rows(ranking.but_bytes(), page, scan, scores, stride);
  }
  score_rows(ranking, page, scan, scores, stride);
}

}  // namespace sparq
