#include "codes/attend_codes.h"

#include "attend/attention.h"
#include "base/softmax_tile.h"
#include "base/tile.h"
#include "codes/codes_float.h"
#include "codes/dot_codes_bf16.h"
#include "codes/dot_int16.h"
#include "codes/key_columns.h"
#include "codes/listed.h"
#include "codes/mix_int16.h"

namespace sparq {
namespace {

// Attention of one query group over codes.
struct Coded {
  const CodeKernels& kernels;
  const Group& group;
  const State& state;
  const Pages& pages;

  // Logits of the tokens of a page, [n_heads, stride].
  void score_page(const uint8_t* page, RowPointers& keys, float* logits, int stride, Ahead& ahead) const {
    const CodesQuery& query = group.codes;
    if (!pages.channel_keys) {
      const CodeRows rows = keys.all(pages.key, kernels.key, page, pages.block_size);
      return kernels.dot(kernels.key, query, group.n_heads, rows, logits, stride, ahead);
    }
    const CodeRows rows = keys.all(pages.key, kernels.key, page, pages.head_size);
    for (int h = 0; h < group.n_heads; ++h) std::fill_n(logits + (size_t)h * stride, pages.block_size, 0.0f);
    kernels.mix_keys(kernels.key, rows, query.whole, query.stride, group.n_heads, logits, stride, ahead);
  }

  // Adds n_tokens tokens with these logits, which are overwritten.
  void absorb(float* logits, int stride, int n_tokens, const CodeRows& values, Ahead& ahead) const {
    const int d = pages.head_size, n_padded = (int)round_up((size_t)n_tokens, 16);
    for (int h = 0; h < group.n_heads; ++h) {
      float rescale, *row = logits + (size_t)h * stride;
      const float scale = cap_logits(group, row, n_tokens) * LOG2_E;
      if (state.logits != nullptr) keep(row, n_tokens, scale, state.logits + h * state.stride);
      const float sum = softmax_tile(row, n_tokens, n_padded, scale, &state.peak[h], &rescale, row);
      state.total[h] = state.total[h] * rescale + sum;
      if (rescale != 1.0f) scale_row(state.acc + (size_t)h * d, d, rescale);
    }
    kernels.mix_values(kernels.value, values, logits, stride, group.n_heads, state.acc, d, ahead);
  }

  void keep(const float* row, int n_tokens, float scale, float* to) const {
    for (int i = 0; i < n_tokens; i += W) store(to + i, mul(load(row + i), set1(scale)));
  }
};

// Where the codes of a page end, which begin with those of K.
int64_t codes_end(const Pages& pages) {
  return pages.channel_keys ? pages.value.scales + pages.block_size * pages.value.scale_stride
                            : pages.key.codes + pages.block_size * pages.key.code_stride;
}

// What a page's codes of K and of V span, in the two halves in which it is read.
void page_ahead(const Pages& pages, const uint8_t* page, Ahead* keys, Ahead* values) {
  const int64_t first = pages.key.codes, last = codes_end(pages);
  const int64_t middle = pages.channel_keys ? pages.value.codes : (first + last) / 2;
  *keys = Ahead(page + first, middle - first);
  *values = Ahead(page + middle, last - middle);
}

// One line of each 4 kB of a page's codes, so that page walks start early and together.
void touch(const Pages& pages, const uint8_t* page) {
  for (int64_t byte = 0; byte < codes_end(pages); byte += 4096) prefetch_l2(page + byte);
}

// Logits of a tile of a list where K is channel-major. Of a page that has few of the tokens they are decoded one by
// one, else all of its logits are made, and those that are wanted taken from them.
void score_columns(const Coded& coded, const ListTile& tile, const uint8_t* next_page, RowPointers& keys,
                   KeyColumns columns, float* page_logits, float* logits, int stride) {
  constexpr int MANY = 16, AHEAD = 3;
  const Pages& pages = coded.pages;
  const CodeShape& shape = coded.kernels.key;
  const int page_stride = pages.block_size + 16;
  for (int i = 0; i < std::min(AHEAD, tile.n); ++i) prefetch_column(pages, shape, tile.page[i], tile.slot[i]);
  for (int i = 0, stop; i < tile.n; i = stop) {
    stop = i + tile.run(i);
    if (stop - i < MANY) {
      for (int k = i; k < stop; ++k) {
        if (k + AHEAD < tile.n) prefetch_column(pages, shape, tile.page[k + AHEAD], tile.slot[k + AHEAD]);
        coded.kernels.decode_column(pages, tile.page[k], tile.slot[k], columns.next(k));
      }
      continue;
    }
    Ahead ahead, unused;
    const uint8_t* const then = stop < tile.n ? tile.page[stop] : next_page;
    if (then != nullptr) page_ahead(pages, then, &ahead, &unused);
    coded.score_page(tile.page[i], keys, page_logits, page_stride, ahead);
    for (int h = 0; h < coded.group.n_heads; ++h)
      for (int k = i; k < stop; ++k)
        logits[(size_t)h * stride + k] = page_logits[(size_t)h * page_stride + tile.slot[k]];
  }
  columns.flush();
}

// Calls f with how the codes of a part lie in words, where whole numbers are multiplied.
template <class F>
void with_word_codes(const CodeShape& shape, F&& f) {
  if (shape.bits == 8 && !shape.has_zero) f(WordCodes<8, true>{});
  if (shape.bits == 8 && shape.has_zero) f(WordCodes<8, false>{});
  if (shape.bits == 4 && shape.has_zero) f(WordCodes<4, false>{});
  if (shape.bits == 2 && shape.has_zero) f(WordCodes<2, false>{});
}

// Kernels of whole numbers in place of those of fp32, where there are some for these codes.
template <class T>
void use_int16(const Pages& pages, CodeKernels& kernels) {
  if (can_mix_int16(kernels.value))
    with_word_codes(kernels.value, [&](auto codes) { kernels.mix_values = mix_int16<decltype(codes), T>; });
  if (pages.channel_keys && can_mix_int16(kernels.key))
    with_word_codes(kernels.key, [&](auto codes) { kernels.mix_keys = mix_int16<decltype(codes), T>; });
  if (!pages.channel_keys && can_dot_int16(kernels.key))
    with_word_codes(kernels.key, [&](auto codes) {
      using C = decltype(codes);
      if constexpr (C::planes <= MAX_DOT_PLANES) kernels.dot = dot_int16<C, T>, kernels.pair_query = pair_query_int16;
    });
}

// Kernels of the bf16 instructions where there are some for these codes: as fast as whole numbers in the inner loop,
// and weights need no unit.
void use_bf16(const Pages& pages, CodeKernels& kernels) {
#ifdef SPARQ_BF16_VECTORS
  const auto with_codes = [](const CodeShape& shape, auto&& f) {
    if (shape.bits == 4 && shape.has_zero) f(FourBits{});
    if (shape.bits == 2 && shape.has_zero) f(TwoBits{});
  };
  if (can_mix_bf16(kernels.value))
    with_codes(kernels.value, [&](auto codes) { kernels.mix_values = mix_bf16<decltype(codes)>; });
  if (!pages.channel_keys && can_dot_bf16(kernels.key))
    with_codes(kernels.key, [&](auto codes) {
      using C = decltype(codes);
      if constexpr (C::planes == 2) kernels.dot = dot_bf16<C>, kernels.pair_query = pair_query_bf16;
    });
#else
  (void)pages, (void)kernels;
#endif
}

}  // namespace

void attend_blocks(const CodeKernels& kernels, const Group& group, const State& state, const Sequence& sequence,
                   int first_block, int last_block) {
  thread_local Scratch scratch;
  const Pages& pages = *sequence.pages;
  const int n = pages.block_size, stride = n + 16, n_rows = std::max(n, pages.head_size);
  Arena arena = scratch.arena();
  float* const logits = arena.take<float>((size_t)group.n_heads * stride + 16);
  RowPointers key_rows = RowPointers::in(arena, n_rows), value_rows = RowPointers::in(arena, n_rows);
  for (int block = first_block; block < last_block; ++block) {
    const uint8_t* page = sequence.page(block);
    Ahead keys, values;
    if (block + 1 < last_block) page_ahead(pages, sequence.page(block + 1), &keys, &values);
    if (block + 2 < last_block) touch(pages, sequence.page(block + 2));
    if (state.logits != nullptr) fetch_attention(sequence, block * n, n);
    const State now = state.after((block - first_block) * n);
    const Coded coded{kernels, group, now, pages};
    coded.score_page(page, key_rows, logits, stride, keys);
    coded.absorb(logits, stride, n, value_rows.all(pages.value, kernels.value, page, n), values);
  }
}

void attend_coded_tokens(const CodeKernels& kernels, const Group& group, const State& state, const Sequence& sequence,
                         const int32_t* tokens, int n) {
  thread_local Scratch scratch;
  const Pages& pages = *sequence.pages;
  const int page_stride = pages.block_size + 16, stride = LIST_TILE + 16;
  const int n_rows = std::max({LIST_TILE, pages.block_size, pages.head_size});
  Arena arena = scratch.arena();
  float* const page_logits = arena.take<float>((size_t)group.n_heads * page_stride + 16);
  float* const logits = arena.take<float>((size_t)group.n_heads * stride + 16);
  float* const columns_memory = arena.take<float>((size_t)KeyColumns::AT_ONCE * pages.head_size);
  RowPointers page_rows = RowPointers::in(arena, n_rows), rows = RowPointers::in(arena, n_rows);
  ListTile tiles[2];
  tiles[0].take(sequence, tokens, n);
  tiles[0].prefetch(pages, kernels);
  Ahead nothing;
  const Coded coded{kernels, group, state, pages};
  for (int first = 0, i = 0; first < n; first += LIST_TILE, ++i) {
    const ListTile& tile = tiles[i % 2];
    ListTile& next = tiles[(i + 1) % 2];
    next.take(sequence, tokens + first + tile.n, n - first - tile.n);
    next.prefetch(pages, kernels);
    if (pages.channel_keys) {
      const KeyColumns columns(columns_memory, group, logits, stride);
      const uint8_t* const next_page = next.n > 0 ? next.page[0] : nullptr;
      score_columns(coded, tile, next_page, page_rows, columns, page_logits, logits, stride);
    } else {
      tile.push(pages.key, rows);
      kernels.dot(kernels.key, group.codes, group.n_heads, rows.rows(), logits, stride, nothing);
    }
    tile.push(pages.value, rows);
    coded.absorb(logits, stride, tile.n, rows.rows(), nothing);
  }
}

CodeKernels CodeKernels::of(const Pages& pages) {
  CodeKernels kernels{CodeShape::keys(pages), CodeShape::values(pages)};
  with_dtype(pages.dtype, [&](auto type) {
    using T = decltype(type);
    kernels.dot = dot_float<T>;
    kernels.mix_keys = kernels.mix_values = mix_float<T>;
    kernels.decode_column = sparq::decode_column<T>;
    if constexpr (sizeof(T) == 2) use_int16<T>(pages, kernels);
  });
  use_bf16(pages, kernels);
  return kernels;
}

CodesQuery CodeKernels::new_query(int n_heads, Arena& arena) const {
  const size_t n = n_heads, n_pairs = key.row_bytes(), n_groups = key.n_groups();  // four pairs a dword
  CodesQuery query{
      arena.take<float>(n * value.n + 16), nullptr, nullptr, nullptr, nullptr, value.n, (int)n_pairs, (int)n_groups};
  if (pair_query == nullptr) return query;
  query.pairs = arena.take<int32_t>(n * n_pairs);
  query.sums = arena.take<float>(n * n_groups), query.rests = arena.take<float>(n * n_groups);
  query.units = arena.take<float>(n * n_groups);
  return query;
}

void CodeKernels::prepare(const CodesQuery& query, int n_heads) const {
  if (pair_query != nullptr) pair_query(key, query, n_heads);
}

}  // namespace sparq
