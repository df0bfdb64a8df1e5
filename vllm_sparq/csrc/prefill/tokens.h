// Between the layouts that Python sees and the ones panel.h computes on: tiles of tokens in, rows out.
#pragma once

#include <type_traits>

#include "codes/coded_tokens.h"
#include "prefill/amx.h"
#include "prefill/panel.h"

namespace sparq::prefill {

// Which multiplication a model's type runs on, how many tokens a tile holds, and how good its exponential must be.
template <class T>
struct Model {
  using M = Floats;
  static constexpr int tile = 128;  // V of it, D = 128: 64 KB
  static constexpr int degree = std::is_same_v<T, float> ? 6 : std::is_same_v<T, fp16> ? 4 : 3;
  static constexpr int panel_vecs = 3;
  static constexpr bool turns_values = false;               // rows of V are tokens, else channels
  static int key_size(int head_size) { return head_size; }  // elements of a row of Q and K, with zeros at the end
};
#if defined(__AMX_BF16__)
template <>
struct Model<bf16> {
  using M = Bf16Tiles;
  static constexpr int tile = 256;
  static constexpr int degree = 3;
  static constexpr int panel_vecs = 2;
  static constexpr bool turns_values = true;
  static int key_size(int head_size) { return (int)round_up((size_t)head_size, M::step); }
};
#elif defined(__AVX512BF16__)
template <>
struct Model<bf16> : Model<fp16> {
  using M = Bf16Pairs;
  static constexpr int tile = 256;
  static constexpr int degree = 3;
};
#endif

// to[j][i] = from[i][j]; both sizes are multiples of 8.
inline void transpose(const float* from, int rows, int columns, float* to) {
  for (int i = 0; i < rows; i += 8)
    for (int j = 0; j < columns; j += 8)
      transpose_8x8(from + i * (ptrdiff_t)columns + j, columns, to + j * (ptrdiff_t)rows + i, rows);
}

// Builds one Tile after another in its own buffers.
template <class T>
class TileLoader {
  using M = typename Model<T>::M;
  static constexpr int TOKENS = Model<T>::tile;
  // A K row that already is a row of cells is used where it lies.
  static constexpr bool IN_PLACE = std::is_same_v<T, float> || M::per_cell == 2;
  using Key = std::conditional_t<IN_PLACE, T, float>;  // of decoded tokens too
  static constexpr bool TURNED = Model<T>::turns_values;

 public:
  // Odd in lines: spreads over L1 sets.
  static constexpr int value_stride() { return TURNED ? TOKENS / M::per_cell + 16 : (TOKENS / M::per_cell + 1) * 16; }

  TileLoader(const Pages& pages, Arena& arena, bool keys_alone = false)
      : keys_alone_(keys_alone),
        head_size_(pages.head_size),
        key_size_(Model<T>::key_size(head_size_)),
        keys_(arena.take<Key>(TOKENS * key_size_)),
        values_(arena.take<float>(n_values(head_size_))),
        pairs_(arena.take<float>(TURNED ? GROUP / 2 * head_size_ : 0)),
        rows_(arena.take<Key>(GROUP * head_size_)),
        coded_(pages, arena),
        coded_bytes_(pages.quantized() ? coded_token_bytes(pages) : 0) {}

  // Tokens of the pages.
  Tile load(const Sequence& sequence, int first, int n) {
    for (int j = 0; j < n; j += GROUP) {
      if (sequence.pages->quantized()) {
        add_coded(j / GROUP, sequence, first + j);
      } else {
        add_records(j / GROUP, record(sequence, first + j), std::min(GROUP, n - j));
      }
    }
    return tile(first, n);
  }

  // The memory of those tokens; of channel-major ones, an even share of the page.
  Ahead ahead(const Sequence& sequence, int first, int n) {
    const Pages& pages = *sequence.pages;
    const int pieces = n / GROUP, block_size = pages.block_size;
    for (int i = 0; i < pieces; ++i) {
      const int token = first + i * GROUP;
      pieces_[i] = coded_bytes_ > 0 ? (const char*)sequence.page(token / block_size) + token % block_size * coded_bytes_
                                    : (const char*)record(sequence, token);
    }
    return {pieces_, pieces, GROUP * (coded_bytes_ > 0 ? coded_bytes_ : 2 * head_size_ * (int)sizeof(T))};
  }

  // New tokens: rows from `row` of key and value. Always copied: rows of a fused tensor lie a multiple of 4 KB apart,
  // all in one set of L1.
  Tile load(const Heads<const T>& key, const Heads<const T>& value, int head, int64_t row, int first, int n) {
    for (int j = 0; j < n; j += GROUP) {
      const int count = std::min(GROUP, n - j);
      for (int i = j + GROUP; i < std::min(j + 2 * GROUP, n); ++i) {
        prefetch_row(key.at(row + i, head));
        prefetch_row(value.at(row + i, head));
      }
      add_keys(j / GROUP, key.at(row + j, head), key.row_stride, count);
      add_values(j / GROUP, value.at(row + j, head), value.row_stride, count);
    }
    return tile(first, n);
  }

 private:
  static size_t n_values(int head_size) { return (size_t)head_size / (TURNED ? 1 : 16) * value_stride(); }

  // What has been loaded. Values that are turned over are multiplied two groups at a time: the second of a last pair
  // may be none.
  Tile tile(int first, int n) {
    const int n_groups = (n + GROUP - 1) / GROUP;
    if constexpr (TURNED) {
      if (n_groups % 2 == 1 && !keys_alone_)
        for (int d = 0; d < head_size_; ++d)
          std::fill_n(values_ + d * value_stride() + n_groups * GROUP / 2, GROUP / 2, 0.0f);
    }
    return {first, n, groups_, values_, value_stride()};
  }

  // Bytes of K and V of a token, rounded down. They come first in a page, scales of V last.
  static int coded_token_bytes(const Pages& pages) {
    const int64_t last = pages.value.scales + (pages.block_size - 1) * pages.value.scale_stride;
    return (int)(last + CodeShape::values(pages).scale_bytes()) / pages.block_size;
  }

  void add_records(int group, const T* keys, int count) {
    const int row = 2 * head_size_;
    if (IN_PLACE && count == GROUP && key_size_ == head_size_) {
      groups_[group] = {(const char*)keys, row * (ptrdiff_t)sizeof(T)};
    } else {
      add_keys(group, keys, row, count);
    }
    add_values(group, keys + head_size_, row, count);
  }

  // Sixteen tokens of a full block.
  void add_coded(int group, const Sequence& sequence, int token) {
    const int block_size = sequence.pages->block_size, slot = token % block_size;
    const uint8_t* const page = sequence.page(token / block_size);
    if (key_size_ == head_size_) {
      coded_.keys(page, slot, key_rows(group));
      point_at_keys(group);
    } else {
      coded_.keys(page, slot, rows_);
      copy_keys(group, rows_, head_size_, GROUP);
    }
    if (keys_alone_) return;
    coded_.values(page, slot, rows_);
    add_values(group, rows_, head_size_, GROUP);
  }

  template <class R>
  void add_values(int group, const R* values, ptrdiff_t stride, int count) {
    if (keys_alone_) return;
    if constexpr (M::per_cell == 1) {
      for (int j = 0; j < GROUP; ++j) add_value(group * GROUP + j, j < count ? values + j * stride : nullptr);
    } else {
      for (int j = 0; j < GROUP; j += 2) {
        const R* const at = values + j * stride;
        add_value_pair((group * GROUP + j) / 2, j < count ? at : nullptr, j + 1 < count ? at + stride : nullptr);
      }
      for (int d = 0; TURNED && d < head_size_; d += 8)
        transpose_8x8(pairs_ + d, head_size_, values_ + d * value_stride() + group * GROUP / 2, value_stride());
    }
  }

  const T* record(const Sequence& sequence, int token) const {
    const Pages& pages = *sequence.pages;
    return (const T*)(sequence.page(token / pages.block_size) + pages.records) +
           (ptrdiff_t)(token % pages.block_size) * 2 * head_size_;
  }

  void prefetch_row(const T* row) const {
    for (int d = 0; d < head_size_; d += 64 / (int)sizeof(T)) prefetch_l2(row + d);
  }

  Key* key_rows(int group) const { return keys_ + (ptrdiff_t)group * GROUP * key_size_; }
  void point_at_keys(int group) { groups_[group] = {(const char*)key_rows(group), key_size_ * (ptrdiff_t)sizeof(Key)}; }

  // What follows the last row belongs to nobody: zero, as what follows the head size.
  void add_keys(int group, const T* keys, ptrdiff_t stride, int count) {
    if constexpr (IN_PLACE) {
      copy_keys(group, keys, stride, count);
    } else {
      Key* const to = key_rows(group);
      for (int j = 0; j < count; ++j)
        for (int d = 0; d < head_size_; d += W) store(to + j * head_size_ + d, sparq::load(keys + j * stride + d));
      memset((void*)(to + count * head_size_), 0, (size_t)(GROUP - count) * head_size_ * sizeof(Key));
      point_at_keys(group);
    }
  }
  void copy_keys(int group, const Key* keys, ptrdiff_t stride, int count) {
    Key* to = key_rows(group);
    for (int j = 0; j < count; ++j, to += key_size_) {
      memcpy(to, keys + j * stride, head_size_ * sizeof(Key));
      std::fill(to + head_size_, to + key_size_, Key{});
    }
    std::fill_n(to, (GROUP - count) * key_size_, Key{});
    point_at_keys(group);
  }

  template <class R>
  void add_value(int token, const R* row) {
    float* to = values_ + token * 16;
    for (int d = 0; d < head_size_; d += 16, to += value_stride()) {
      for (int i = 0; i < 16; i += W) store(to + i, row ? sparq::load(row + d + i) : zero());
    }
  }

  void add_value_pair(int cell, const bf16* even, const bf16* odd) {
#ifdef __AVX512BF16__
    float* to = TURNED ? pairs_ + cell % (GROUP / 2) * head_size_ : values_ + cell * 16;
    for (int d = 0; d < head_size_; d += 16, to += TURNED ? 16 : value_stride()) {
      const Vec high = odd ? sparq::load(odd + d) : zero();
      const __m512i low = even ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(even + d))) : __m512i{};
      store(to, (Vec)_mm512_or_si512((__m512i)high, low));
    }
#endif
  }

  const bool keys_alone_;  // tiles without values
  int head_size_, key_size_;
  Key* keys_;
  float* values_;
  float* pairs_;  // cells [8][D] of a group of tokens, before they are turned over
  Key* rows_;
  CodedTokens<T> coded_;
  int coded_bytes_;  // of a token; 0: records
  CellRows groups_[TOKENS / GROUP];
  const char* pieces_[TOKENS / GROUP];
};

// The query rows of one task: row r is head `r % group` of token `r / group`.
struct RowRange {
  int64_t token0;  // row of the first token of the request, in query and out
  int head0;       // first query head of the KV head
  int group;       // H / G
  int first, n;
};

// The address of every row: f(row of the range, element address in `heads`).
template <class T, class F>
void each_row(const RowRange& range, const Heads<T>& heads, int from, int to, F&& f) {
  for (int r = from; r < std::min(to, range.n); ++r) {
    const int flat = range.first + r;
    f(r, heads.at(range.token0 + flat / range.group, range.head0 + flat % range.group));
  }
}

// Rows `from` to `from + rows` of the range as cells [key_size / per_cell][rows]; rows past the range are zero.
template <class T>
void pack_query(const RowRange& range, const Heads<const T>& query, int head_size, int from, int rows, float* staging,
                float* cells) {
  constexpr int per_cell = Model<T>::M::per_cell;
  const int width = Model<T>::key_size(head_size) / per_cell;
  const int have = std::clamp(range.n - from, 0, rows);
  memset(staging + (ptrdiff_t)have * width, 0, (size_t)(rows - have) * width * sizeof(float));
  each_row(range, query, from, from + rows, [&](int r, const T* row) {
    float* const to = staging + (ptrdiff_t)(r - from) * width;
    if constexpr (per_cell == 2) {
      memcpy(to, row, head_size * sizeof(T));
      std::fill(to + head_size / 2, to + width, 0.0f);
    } else {
      for (int d = 0; d < head_size; d += W) store(to + d, load(row + d));
    }
  });
  transpose(staging, rows, width, cells);
}

// output [D][rows] / sums, rounded, to the rows of `out`.
template <class T>
void emit(const RowRange& range, const Heads<T>& out, int head_size, int from, const Panel& panel, float* staging) {
  transpose(panel.output, head_size, panel.nv * W, staging);
  each_row(range, out, from, from + panel.nv * W, [&](int r, T* row) {
    const float* const sums = staging + (ptrdiff_t)(r - from) * head_size;
    const Vec weight = set1(1.0f / panel.sums[r - from]);
    for (int d = 0; d < head_size; d += W) store(row + d, mul(load(sums + d), weight));
  });
}

}  // namespace sparq::prefill
