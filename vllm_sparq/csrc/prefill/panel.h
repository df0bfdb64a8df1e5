// The arithmetic of prefill on one panel: up to three vectors of query rows against one tile of tokens.
//
// Everything is transposed, tokens (or channels) down and query rows across the lanes:
//
//     scores  S^T [n][rows] = K [n][D] . Q^T [D][rows]        K is read as the cache stores it, one broadcast at a time
//     output  O^T [D][rows] += V^T [D][n] . P^T [n][rows]     so a softmax never reduces across lanes
//
// A *cell* is 32 bits, what one broadcast feeds to one multiply-add: a float, or two bf16 that are summed over.
#pragma once

#include <algorithm>
#include <type_traits>

#include "base/simd.h"

namespace sparq::prefill {

constexpr int GROUP = 16;  // tokens that are loaded together; a block is a multiple of it
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float NOTHING_SEEN = -1e30f;  // below any logit, and finite: differences of it are not NaN

// Rows of A per register block for a panel of NV vectors: enough sums to hide the latency, few enough for registers.
constexpr int block_rows(int nv) { return nv == 1 ? W : W / 2; }

// Rows of cells, anywhere in memory.
struct CellRows {
  const char* first;
  ptrdiff_t row_bytes;  // to the next
};

// Memory that the next tile will read, one piece per group of this tile; fetched while this one is multiplied.
struct Ahead {
  const char* const* pieces;
  int n;      // 0: nothing
  int bytes;  // of a piece
};

// How two cells are multiplied, how many tokens (or channels) a cell holds, what a thread needs for it, and which panel
// of a task fetches what of the next tile.
struct Floats {
  static constexpr int per_cell = 1;
  struct Scope {};
  static SPARQ_INLINE Vec dot(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }
  static Ahead share(Ahead all, int panel, int) { return panel == 0 ? all : Ahead{}; }
};
#ifdef __AVX512BF16__
struct Bf16Pairs : Floats {
  static constexpr int per_cell = 2;
  static SPARQ_INLINE Vec dot(Vec sum, Vec a, Vec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

// Fetches `bytes`, at most N lines, with every cell of a product. (Not a lambda: gcc 12 takes one that only prefetches
// for a function without effect, and drops it.)
template <int N>
struct Fetch {
  const char* from;
  int bytes;

  SPARQ_INLINE void operator()(int cell) const {
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) prefetch_l2(from + cell * bytes + i * 64);
  }
};

// Tokens `first` to `first + n` of one request and KV head.
struct Tile {
  int first, n;
  const CellRows* groups;  // ceil(n / 16) of K, rows past n are zero
  const float* values;     // cells [D/16][value_stride/16][16], or of tiles [D][value_stride]; tokens past n are zero
  int value_stride;        // cells between the slices of 16 channels, or between channels
};

// Up to 3 W query rows of one task. Row r sees the tokens before limits[r]; limits ascend.
struct Panel {
  int nv;              // vectors of rows
  const float* query;  // cells [D / per_cell][rows]
  const int32_t* limits;
  float* output;  // [D][rows], not yet divided by `sums`
  float* tops;    // [rows] greatest logit so far, times log2(e)
  float* sums;    // [rows] of the weights
};

// sums[i][v] = A[i][:] . B[:][v] over `cells`; A by bytes between rows and between cells, B dense; `each(c)` besides.
template <class M, int MR, int NV, class F>
SPARQ_INLINE void multiply(Vec (&sums)[MR][NV], const char* a, ptrdiff_t row, ptrdiff_t cell, const float* b, int cells,
                           F&& each) {
  for (auto& line : sums)
    for (auto& sum : line) sum = zero();
  for (int c = 0; c < cells; ++c, a += cell, b += NV * W) {
    each(c);
    Vec right[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) right[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      float bits;
      memcpy(&bits, a + i * row, sizeof bits);
      const Vec left = set1(bits);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sums[i][v] = M::dot(sums[i][v], left, right[v]);
    }
  }
}

// x where the lane's limit is above `token`, else -inf.
SPARQ_INLINE Vec where_visible(int token, const int32_t* limits, Vec x) {
  return select_above(limits, token, x, set1(-__builtin_inff()));
}

// 2^x for x <= 0, exact at 0, to 9e-5 (degree 3), 3e-6 (4) or 2e-9 and rounding (6); 0 for -inf.
template <int DEGREE>
SPARQ_INLINE Vec exp2_negative(Vec x) {
  static_assert(DEGREE == 3 || DEGREE == 4 || DEGREE == 6);
  constexpr float C[][6] = {
      {0.0770670512f, 0.227644981f, 0.695116789f},
      {0.0134266855f, 0.0522424722f, 0.241280206f, 0.693044845f},
      {0.000216129164f, 0.00124678461f, 0.0096754516f, 0.0554852806f, 0.240229306f, 0.693147044f},
  };
  constexpr int ROW = DEGREE == 6 ? 2 : DEGREE - 3;
  Vec whole, part;
  split(x, &whole, &part);
  Vec p = set1(C[ROW][0]);
#pragma GCC unroll 8
  for (int i = 1; i < DEGREE; ++i) p = fma(p, part, set1(C[ROW][i]));
  return scale_by_power(fma(p, part, set1(1.0f)), whole);
}

// scores [n][rows], times `scale`, of the first n tokens (a multiple of 16); panel.tops becomes the maximum per row.
// Scale and tops come from memory every time: the product needs all the registers.
template <class M, int NV, bool MASKED, bool AHEAD>
void score(const Panel& panel, const Tile& tile, int n, int dim_cells, const float* scale, const int32_t* limits,
           Ahead ahead, float* scores) {
  constexpr int MR = block_rows(NV);
  const int per_cell = ahead.bytes * MR / GROUP / dim_cells;
  for (int j = 0; j < n; j += MR) {
    const CellRows& group = tile.groups[j / GROUP];
    const char* const piece = AHEAD && j / GROUP < ahead.n ? ahead.pieces[j / GROUP] + j % GROUP * (ahead.bytes / GROUP)
                                                           : (const char*)scores;
    Vec sums[MR][NV];
    multiply<M>(sums, group.first + (j % GROUP) * group.row_bytes, group.row_bytes, 4, panel.query, dim_cells,
                Fetch < AHEAD ? MR / 8 : 0 > {piece, per_cell});
    const Vec factor = set1(*scale);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      Vec top = load(panel.tops + v * W);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        Vec s = mul(sums[i][v], factor);
        if (MASKED) s = where_visible(j + i, limits + v * W, s);
        store(scores + ((j + i) * NV + v) * W, s);
        top = max(s, top);
      }
      store(panel.tops + v * W, top);
    }
  }
}

// A step of attention's factor and cap of the logits, both with log2(e); a cap of 0 is none.
struct ScaleAndCap {
  float scale, cap;
};

// shares[token][lane] += the weight of the token in the rows of the lane, for `count` tokens from j on, whose products
// sum(token - j, vector) gives.
template <int NV, int DEGREE, class F>
SPARQ_INLINE void add_block_shares(int j, int count, const int32_t* limits, const ScaleAndCap& logits,
                                   const float* lses, float* shares, F&& sum) {
  const Vec factor = set1(logits.scale);
  const bool masked = limits[0] < j + count;
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) {
    Vec share = load(shares + (j + i) * W);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      Vec s = mul(sum(i, v), factor);
      if (logits.cap != 0.0f) s = soft_capped(s, logits.cap);
      if (masked) s = where_visible(j + i, limits + v * W, s);
      share = add(share, exp2_negative<DEGREE>(sub(s, load(lses + v * W))));
    }
    store(shares + (j + i) * W, share);
  }
}

// The second pass, when lses[rows] are known, the logarithms (base 2) of the sums over all tokens, infinite for rows
// that do not count.
template <int NV, int DEGREE, class M>
void add_shares(M, const Panel& panel, const Tile& tile, int head_size, const ScaleAndCap& logits, const float* lses,
                float* shares) {
  constexpr int MR = block_rows(NV), ROWS = NV * W;
  const int seen = std::min(tile.n, panel.limits[ROWS - 1] - tile.first);
  int32_t limits[ROWS];
  for (int r = 0; r < ROWS; ++r) limits[r] = panel.limits[r] - tile.first;
  for (int j = 0; j < seen; j += MR) {
    const CellRows& group = tile.groups[j / GROUP];
    Vec sums[MR][NV];
    multiply<M>(sums, group.first + (j % GROUP) * group.row_bytes, group.row_bytes, 4, panel.query,
                head_size / M::per_cell, Fetch<0>{});
    add_block_shares<NV, DEGREE>(j, MR, limits, logits, lses, shares, [&](int i, int v) { return sums[i][v]; });
  }
}

// Turns scores [n][rows], times `factor`, into weights, cells [n / per_cell][rows], in place; returns their sums in
// `sums`.
template <class M, int NV, int DEGREE>
void weigh(float* scores, int n, float factor, const Vec (&tops)[NV], Vec (&sums)[NV]) {
  Vec below[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) sums[v] = zero(), below[v] = sub(zero(), tops[v]);
#ifdef __AVX512BF16__
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#endif
  for (int j = 0; j < n; j += 2) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* const at = scores + (j * NV + v) * W;
      const Vec p0 = exp2_negative<DEGREE>(fma(load(at), set1(factor), below[v]));
      const Vec p1 = exp2_negative<DEGREE>(fma(load(at + NV * W), set1(factor), below[v]));
      sums[v] = add(sums[v], add(p0, p1));
      if constexpr (M::per_cell == 1) {
        store(at, p0);
        store(at + NV * W, p1);
      } else {
#ifdef __AVX512BF16__
        const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(p1, p0);
        store(scores + (j / 2 * NV + v) * W, (Vec)_mm512_permutexvar_epi16(interleave, pairs));
#endif
      }
    }
  }
}

// output = output * decay + V^T weights over the first n tokens.
template <class M, int NV>
void accumulate(const Panel& panel, const Tile& tile, int n, int head_size, const float* weights,
                const Vec (&decay)[NV]) {
  constexpr int MR = block_rows(NV);
  for (int d = 0; d < head_size; d += MR) {
    const float* values = tile.values + d / 16 * (ptrdiff_t)tile.value_stride + d % 16;
    Vec sums[MR][NV];
    multiply<M>(sums, (const char*)values, 4, 64, weights, n / M::per_cell, Fetch<0>{});
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        float* const out = panel.output + ((d + i) * NV + v) * W;
        store(out, fma(load(out), decay[v], sums[i][v]));
      }
    }
  }
}

// Caps scores [n][rows], and the greatest of them in panel.tops, which then takes the greatest of before.
template <int NV>
void cap_scores(const Panel& panel, float cap, int n, const Vec (&old)[NV], float* scores) {
  for (int i = 0; i < n * NV; ++i) store(scores + i * W, soft_capped(load(scores + i * W), cap));
  for (int v = 0; v < NV; ++v) {
    const Vec top = load(panel.tops + v * W), seen = max(old[v], soft_capped(top, cap));
    store(panel.tops + v * W, select(greater(top, set1(NOTHING_SEEN)), seen, old[v]));
  }
}

// One step of the online softmax: all tokens of the tile that some row of the panel sees.
template <int NV, int DEGREE, class M>
void attend(M, const Panel& panel, const Tile& tile, int head_size, const ScaleAndCap& logits, Ahead ahead,
            float* scores) {
  constexpr int ROWS = NV * W;
  const int seen = std::min(tile.n, panel.limits[ROWS - 1] - tile.first);
  if (seen <= 0) return;
  const int n = (seen + GROUP - 1) / GROUP * GROUP;
  int32_t limits[ROWS];
  for (int r = 0; r < ROWS; ++r) limits[r] = std::min(tile.n, panel.limits[r] - tile.first);

  Vec old[NV], tops[NV], sums[NV], decay[NV];
  for (int v = 0; v < NV; ++v) old[v] = load(panel.tops + v * W);
  if (logits.cap != 0.0f) std::fill_n(panel.tops, ROWS, NOTHING_SEEN);  // those of this tile, before the cap
  const int dim_cells = head_size / M::per_cell;
  if (limits[0] < n) {
    score<M, NV, true, false>(panel, tile, n, dim_cells, &logits.scale, limits, ahead, scores);
  } else if (ahead.n > 0) {
    score<M, NV, false, true>(panel, tile, n, dim_cells, &logits.scale, limits, ahead, scores);
  } else {
    score<M, NV, false, false>(panel, tile, n, dim_cells, &logits.scale, limits, ahead, scores);
  }
  if (logits.cap != 0.0f) cap_scores<NV>(panel, logits.cap, n, old, scores);
  for (int v = 0; v < NV; ++v) tops[v] = load(panel.tops + v * W);
  weigh<M, NV, DEGREE>(scores, n, 1.0f, tops, sums);
  for (int v = 0; v < NV; ++v) {
    decay[v] = exp2_negative<6>(sub(old[v], tops[v]));  // accurate: its errors multiply over the tiles
    store(panel.sums + v * W, fma(load(panel.sums + v * W), decay[v], sums[v]));
  }
  accumulate<M, NV>(panel, tile, n, head_size, scores, decay);
}

// Calls f with how many vectors a panel has as a constant.
template <int MOST, class F>
void with_width(int nv, F&& f) {
  if (nv == 1) return f(std::integral_constant<int, 1>{});
  if (nv == 2) return f(std::integral_constant<int, 2>{});
  if constexpr (MOST == 3) f(std::integral_constant<int, 3>{});
}

}  // namespace sparq::prefill
