#include "codes/attend_codes.h"

#include "codes/codes_float.h"
#include "codes/dot_codes_bf16.h"
#include "codes/dot_int16.h"
#include "codes/key_columns.h"
#include "codes/mix_int16.h"
#include "attend/attention.h"
#include "base/softmax_tile.h"
#include "base/tile.h"

namespace sparq {
namespace {

constexpr int LIST_TILE = 128;  // tokens of a list at a time

// Arrays of pointers to rows.
struct RowPointers {
  const uint8_t** codes;
  const uint8_t** scales;
  int n = 0;

  static RowPointers in(Arena& arena, int capacity) {
    return {arena.take<const uint8_t*>(capacity + 1), arena.take<const uint8_t*>(capacity + 1)};
  }

  void push(const Codes& where, const uint8_t* page, int row) {
    codes[n] = page + where.codes + row * where.code_stride;
    scales[n++] = page + where.scales + row * where.scale_stride;
  }
  CodeRows rows() const {
    codes[n] = codes[n - 1];  // room: see `in`
    return {codes, scales, n};
  }

  // The first n rows of a page.
  CodeRows all(const Codes& where, const CodeShape& shape, const uint8_t* page, int count) {
    n = 0;
    for (int row = 0; row < count; ++row) push(where, page, row);
    const bool dense = where.scale_stride == shape.scale_bytes();
    return {codes, scales, n, dense ? page + where.scales : nullptr};
  }
};

// Attention of up to MAX_TILE_HEADS heads from h0 on.
struct Heads4 {
  const CodeKernels& kernels;
  const Group& group;
  const State& state;
  const Pages& pages;
  int h0, n;

  // Logits of the tokens of a page, [n, stride].
  void score_page(const uint8_t* page, RowPointers& keys, float* logits, int stride, Ahead& ahead) const {
    const CodesQuery& query = group.codes;
    if (!pages.channel_keys) {
      const CodeRows rows = keys.all(pages.key, kernels.key, page, pages.block_size);
      return kernels.dot(kernels.key, query, h0, n, rows, logits, stride, ahead);
    }
    const CodeRows rows = keys.all(pages.key, kernels.key, page, pages.head_size);
    for (int h = 0; h < n; ++h) std::fill_n(logits + (size_t)h * stride, pages.block_size, 0.0f);
    kernels.mix_keys(kernels.key, rows, query.whole + (size_t)h0 * query.stride, query.stride, n, logits, stride,
                     ahead);
  }

  // Adds n_tokens tokens with these logits, which are overwritten.
  void absorb(float* logits, int stride, int n_tokens, const CodeRows& values, Ahead& ahead) const {
    const int d = pages.head_size, n_padded = (int)round_up((size_t)n_tokens, 16);
    for (int h = 0; h < n; ++h) {
      float rescale, *row = logits + (size_t)h * stride;
      if (state.logits != nullptr) keep(row, n_tokens, state.logits + (h0 + h) * state.stride);
      const float sum =
          softmax_tile(row, n_tokens, n_padded, group.scale * LOG2_E, &state.peak[h0 + h], &rescale, row);
      state.total[h0 + h] = state.total[h0 + h] * rescale + sum;
      if (rescale != 1.0f) scale_row(state.acc + (size_t)(h0 + h) * d, d, rescale);
    }
    kernels.mix_values(kernels.value, values, logits, stride, n, state.acc + (size_t)h0 * d, d, ahead);
  }

  void keep(const float* row, int n_tokens, float* to) const {
    const Vec scale = set1(group.scale * LOG2_E);
    for (int i = 0; i < n_tokens; i += W) store(to + i, mul(load(row + i), scale));
  }
};

template <class F>
void few_heads_at_a_time(const CodeKernels& kernels, const Group& group, const State& state, const Pages& pages,
                         F&& f) {
  for (int h0 = 0; h0 < group.n_heads; h0 += MAX_TILE_HEADS)
    f(Heads4{kernels, group, state, pages, h0, std::min(group.n_heads - h0, MAX_TILE_HEADS)});
}

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

void prefetch_row(const Codes& where, const uint8_t* page, int row, int code_bytes, int scale_bytes) {
  const uint8_t *codes = page + where.codes + row * where.code_stride;
  const uint8_t *scales = page + where.scales + row * where.scale_stride;
  for (int byte = 0; byte < code_bytes; byte += 64) prefetch_l2(codes + byte);
  prefetch_l2(codes + code_bytes - 1);
  prefetch_l2(scales), prefetch_l2(scales + scale_bytes - 1);
}

// The tokens of a list, a tile at a time.
class Listed {
 public:
  Listed(const CodeKernels& kernels, const Pages& pages, const Sequence& sequence, const int32_t* tokens, int n)
      : kernels_(kernels), pages_(pages), sequence_(sequence), tokens_(tokens), n_(n) {}

  int block(int i) const { return tokens_[i] / pages_.block_size; }
  int slot(int i) const { return tokens_[i] % pages_.block_size; }
  const uint8_t* page(int i) const { return sequence_.page(block(i)); }

  void prefetch(int first, int last) const {
    const int value_bytes = kernels_.value.row_bytes(), scale_bytes = kernels_.value.scale_bytes();
    for (int i = first; i < last; ++i) {
      prefetch_row(pages_.value, page(i), slot(i), value_bytes, scale_bytes);
      if (!pages_.channel_keys)
        prefetch_row(pages_.key, page(i), slot(i), kernels_.key.row_bytes(), kernels_.key.scale_bytes());
    }
  }

  void push(int first, int last, const Codes& where, RowPointers& rows) const {
    rows.n = 0;
    for (int i = first; i < last; ++i) rows.push(where, page(i), slot(i));
  }

  // Where K is channel-major: of a page that has few of the tokens they are decoded one by one, else all of its logits
  // are made, and those that are wanted taken from them.
  void score_columns(const Heads4& heads, int first, int last, RowPointers& keys, KeyColumns columns,
                     float* page_logits, int page_stride, float* logits, int stride) const {
    constexpr int MANY = 16, AHEAD = 3;
    for (int i = first; i < std::min(first + AHEAD, last); ++i) prefetch_key(i);
    for (int i = first, stop; i < last; i = stop) {
      for (stop = i + 1; stop < last && block(stop) == block(i);) ++stop;
      if (stop - i < MANY) {
        for (int k = i; k < stop; ++k) {
          if (k + AHEAD < n_) prefetch_key(k + AHEAD);
          kernels_.decode_column(pages_, page(k), slot(k), columns.next(k - first));
        }
        continue;
      }
      Ahead ahead, unused;
      if (stop < n_) page_ahead(pages_, page(stop), &ahead, &unused);
      heads.score_page(page(i), keys, page_logits, page_stride, ahead);
      for (int h = 0; h < heads.n; ++h)
        for (int k = i; k < stop; ++k)
          logits[(size_t)h * stride + k - first] = page_logits[(size_t)h * page_stride + slot(k)];
    }
    columns.flush();
  }

 private:
  void prefetch_key(int i) const { prefetch_column(pages_, kernels_.key, page(i), slot(i)); }

  const CodeKernels& kernels_;
  const Pages& pages_;
  const Sequence& sequence_;
  const int32_t* tokens_;
  int n_;
};

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
    with_word_codes(kernels.key,
                    [&](auto codes) { kernels.mix_keys = kernels.score_keys = mix_int16<decltype(codes), T>; });
  if (!pages.channel_keys && can_dot_int16(kernels.key))
    with_word_codes(kernels.key, [&](auto codes) {
      using C = decltype(codes);
      if constexpr (C::planes <= MAX_DOT_PLANES) kernels.dot = dot_int16<C, T>, kernels.pair_query = pair_query_int16;
    });
}

// Kernels of the bf16 instructions in place of those that they beat, where there are some for these codes.
void use_bf16(const Pages& pages, CodeKernels& kernels) {
#ifdef __AVX512BF16__
  const auto use = [&](auto codes) {
    using C = decltype(codes);
    if (C::has_zero != (pages.has_zero != 0)) return;
    if (can_mix_bf16(kernels.value)) kernels.mix_values = mix_bf16<C, 1>;
    if constexpr (C::has_zero)
      if (pages.channel_keys && can_mix_bf16(kernels.key))
        kernels.mix_keys = mix_bf16<C, 2>, kernels.score_keys = mix_bf16<C, 1>;
    if constexpr (C::planes <= MAX_DOT_PLANES)
      if (!pages.channel_keys && can_dot_bf16(kernels.key))
        kernels.dot = dot_bf16<C>, kernels.pair_query = pair_query_bf16;
  };
  if (pages.bits == 8) use(EightBits{});
  if (pages.bits == 4) use(FourBits{});
  if (pages.bits == 2) use(TwoBits{});
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
  float* const logits = arena.take<float>(MAX_TILE_HEADS * stride + 16);
  RowPointers rows = RowPointers::in(arena, n_rows);
  for (int block = first_block; block < last_block; ++block) {
    const uint8_t* page = sequence.page(block);
    Ahead keys, values;
    if (block + 1 < last_block) page_ahead(pages, sequence.page(block + 1), &keys, &values);
    if (block + 2 < last_block) touch(pages, sequence.page(block + 2));
    if (state.logits != nullptr) fetch_attention(sequence, block * n, n);
    few_heads_at_a_time(kernels, group, state.after((block - first_block) * n), pages, [&](const Heads4& heads) {
      heads.score_page(page, rows, logits, stride, keys);
      heads.absorb(logits, stride, n, rows.all(pages.value, kernels.value, page, n), values);
    });
  }
}

void attend_coded_tokens(const CodeKernels& kernels, const Group& group, const State& state, const Sequence& sequence,
                         const int32_t* tokens, int n) {
  thread_local Scratch scratch;
  const Pages& pages = *sequence.pages;
  const int page_stride = pages.block_size + 16, stride = LIST_TILE + 16;
  const int n_rows = std::max(LIST_TILE, pages.head_size);
  Arena arena = scratch.arena();
  float* const page_logits = arena.take<float>(MAX_TILE_HEADS * page_stride + 16);
  float* const logits = arena.take<float>(MAX_TILE_HEADS * stride + 16);
  float* const columns_memory = arena.take<float>((size_t)KeyColumns::AT_ONCE * pages.head_size);
  RowPointers rows = RowPointers::in(arena, n_rows);
  const Listed list(kernels, pages, sequence, tokens, n);
  Ahead nothing;
  list.prefetch(0, std::min(n, LIST_TILE));
  for (int first = 0; first < n; first += LIST_TILE) {
    const int last = std::min(n, first + LIST_TILE);
    list.prefetch(last, std::min(n, last + LIST_TILE));
    few_heads_at_a_time(kernels, group, state, pages, [&](const Heads4& heads) {
      if (pages.channel_keys) {
        const float* const query = group.codes.whole + (size_t)heads.h0 * group.codes.stride;
        const KeyColumns columns(pages.head_size, columns_memory, query, group.codes.stride, heads.n, logits, stride);
        list.score_columns(heads, first, last, rows, columns, page_logits, page_stride, logits, stride);
      } else {
        list.push(first, last, pages.key, rows);
        kernels.dot(kernels.key, group.codes, heads.h0, heads.n, rows.rows(), logits, stride, nothing);
      }
      list.push(first, last, pages.value, rows);
      heads.absorb(logits, stride, last - first, rows.rows(), nothing);
    });
  }
}

CodeKernels CodeKernels::of(const Pages& pages) {
  CodeKernels kernels{CodeShape::keys(pages), CodeShape::values(pages)};
  with_dtype(pages.dtype, [&](auto type) {
    using T = decltype(type);
    kernels.dot = dot_float<T>;
    kernels.mix_keys = kernels.score_keys = kernels.mix_values = mix_float<T>;
    kernels.decode_column = sparq::decode_column<T>;
    if constexpr (sizeof(T) == 2) use_int16<T>(pages, kernels);
  });
  use_bf16(pages, kernels);
  return kernels;
}

CodesQuery CodeKernels::new_query(int n_heads, Arena& arena) const {
  const size_t n = n_heads, n_pairs = key.row_bytes(), n_groups = key.n_groups();  // four pairs a dword
  CodesQuery query{arena.take<float>(n * value.n + 16), nullptr, nullptr, nullptr, nullptr, value.n, (int)n_pairs,
                   (int)n_groups};
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
