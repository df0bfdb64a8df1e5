// Products of bf16 in AMX tiles of 16 rows of 64 bytes: where a CPU has them, sixteen times the rate of its vectors.
#pragma once

#ifdef __AMX_BF16__

#include <immintrin.h>

#include <cstdint>

#include "prefill/panel.h"

namespace sparq::prefill {

constexpr int TILE_ROWS = 16;   // of A and of a result
constexpr int TILE_CELLS = 16;  // of 32 bits, two bf16 each: columns of A, rows of B

// The tile registers of this thread, all of full size. What they were configured as before, by another library that may
// believe they still are, is put back in the end; what they held is lost.
class TileRegisters {
 public:
  TileRegisters() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Config config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = TILE_ROWS;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileRegisters() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, first_row, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);
  Config before_;
};

// c [16 MA][W NV] = A B, or c + A B: a[i] are 16 rows of 16 steps cells, B is dense [16 steps][W NV] cells.
template <int MA, int NV, bool ADD>
inline void multiply_tiles(const CellRows* a, const float* b, int steps, float* c) {
  static_assert(W == 16 && MA <= 2 && NV <= 2);
  constexpr ptrdiff_t ROW = NV * W * sizeof(float);
  float* const below = c + TILE_ROWS * NV * W;
  asm volatile("" : : : "memory");  // gcc 12 does not know that tiles are loaded from memory
  if constexpr (ADD) {
    _tile_loadd(0, c, ROW);
    if constexpr (NV > 1) _tile_loadd(1, c + W, ROW);
    if constexpr (MA > 1) _tile_loadd(2, below, ROW);
    if constexpr (MA > 1 && NV > 1) _tile_loadd(3, below + W, ROW);
  } else {
    _tile_zero(0);
    if constexpr (NV > 1) _tile_zero(1);
    if constexpr (MA > 1) _tile_zero(2);
    if constexpr (MA > 1 && NV > 1) _tile_zero(3);
  }
  for (int s = 0; s < steps; ++s, b += TILE_CELLS * NV * W) {
    _tile_loadd(4, a[0].first + s * 64, a[0].row_bytes);
    _tile_loadd(6, b, ROW);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (NV > 1) _tile_loadd(7, b + W, ROW);
    if constexpr (NV > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (MA > 1) _tile_loadd(5, a[1].first + s * 64, a[1].row_bytes);
    if constexpr (MA > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (MA > 1 && NV > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ROW);
  if constexpr (NV > 1) _tile_stored(1, c + W, ROW);
  if constexpr (MA > 1) _tile_stored(2, below, ROW);
  if constexpr (MA > 1 && NV > 1) _tile_stored(3, below + W, ROW);
}

// Pairs of bf16 as `Bf16Pairs` has them, multiplied in tiles.
struct Bf16Tiles {
  static constexpr int per_cell = 2;
  static constexpr int step = 2 * TILE_CELLS;  // what is summed over is filled up with zeros to a multiple of it
  using Scope = TileRegisters;
  static Ahead share(Ahead all, int panel, int n_panels) {
    const int first = all.n * panel / n_panels, last = all.n * (panel + 1) / n_panels;
    return {all.pieces + first, last - first, all.bytes};
  }
};

constexpr int BLOCK = 2 * TILE_ROWS;  // tokens (or channels) of one product

// Scores of the tokens from j on, up to BLOCK of n.
template <int NV>
SPARQ_INLINE void score_block(const Panel& panel, const Tile& tile, int j, int n, int steps, float* scores) {
  const CellRows* const groups = tile.groups + j / GROUP;
  if (j + GROUP < n) multiply_tiles<2, NV, false>(groups, panel.query, steps, scores);
  else multiply_tiles<1, NV, false>(groups, panel.query, steps, scores);
}

// Scores [n][rows] of the first n tokens (a multiple of 16), not yet scaled, and the greatest of each row.
template <int NV, bool MASKED>
void score(const Panel& panel, const Tile& tile, int n, int steps, const int32_t* limits, Ahead ahead, float* scores,
           Vec (&tops)[NV]) {
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) tops[v] = set1(-__builtin_inff());
  const int n_blocks = (n + BLOCK - 1) / BLOCK, share = (ahead.n + n_blocks - 1) / n_blocks;
  for (int j = 0, piece = 0; j < n; j += BLOCK) {
    for (const int stop = std::min(piece + share, ahead.n); piece < stop; ++piece)
      for (int byte = 0; byte < ahead.bytes; byte += 64) prefetch_l2(ahead.pieces[piece] + byte);
    float* const block = scores + j * NV * W;
    score_block<NV>(panel, tile, j, n, steps, block);
    for (int i = 0; i < std::min(BLOCK, n - j); ++i)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        float* const at = block + (i * NV + v) * W;
        Vec s = load(at);
        if (MASKED) store(at, s = where_visible(j + i, limits + v * W, s));
        tops[v] = max(s, tops[v]);
      }
  }
}

// output = output * decay + V^T weights over n tokens, a multiple of BLOCK.
template <int NV>
void accumulate(const Panel& panel, const Tile& tile, int n, int head_size, const float* weights,
                const Vec (&decay)[NV]) {
  unsigned falls = 0;
  for (int v = 0; v < NV; ++v) falls |= greater(set1(1.0f), decay[v]);
  for (int d = 0; falls != 0 && d < head_size; ++d)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      float* const out = panel.output + (d * NV + v) * W;
      store(out, mul(load(out), decay[v]));
    }
  const ptrdiff_t row = tile.value_stride * (ptrdiff_t)sizeof(float);
  for (int d = 0; d < head_size; d += BLOCK) {
    const char* const at = (const char*)tile.values + d * row;
    const CellRows values[2] = {{at, row}, {at + TILE_ROWS * row, row}};
    float* const out = panel.output + d * NV * W;
    if (d + TILE_ROWS < head_size) multiply_tiles<2, NV, true>(values, weights, n / BLOCK, out);
    else multiply_tiles<1, NV, true>(values, weights, n / BLOCK, out);
  }
}

// One step of the online softmax, as that of panel.h; the tiles of this thread are configured.
template <int NV, int DEGREE>
void attend(Bf16Tiles, const Panel& panel, const Tile& tile, int head_size, const ScaleAndCap& logits, Ahead ahead,
            float* scores) {
  constexpr int ROWS = NV * W;
  const int seen = std::min(tile.n, panel.limits[ROWS - 1] - tile.first);
  if (seen <= 0) return;
  const int n = (seen + GROUP - 1) / GROUP * GROUP, n_whole = (n + BLOCK - 1) / BLOCK * BLOCK;
  const int steps = (head_size + Bf16Tiles::step - 1) / Bf16Tiles::step;
  int32_t limits[ROWS];
  for (int r = 0; r < ROWS; ++r) limits[r] = std::min(tile.n, panel.limits[r] - tile.first);

  Vec tops[NV], sums[NV], decay[NV];
  if (limits[0] < n) score<NV, true>(panel, tile, n, steps, limits, ahead, scores, tops);
  else score<NV, false>(panel, tile, n, steps, limits, ahead, scores, tops);
  const auto scaled = [&](Vec s) {
    s = mul(s, set1(logits.scale));
    return logits.cap != 0.0f ? soft_capped(s, logits.cap) : s;
  };
  for (int i = 0; logits.cap != 0.0f && i < n * NV; ++i) store(scores + i * W, scaled(load(scores + i * W)));
  for (int v = 0; v < NV; ++v) {
    const Vec old = load(panel.tops + v * W);
    tops[v] = max(scaled(tops[v]), old);
    decay[v] = exp2_negative<6>(sub(old, tops[v]));
  }
  weigh<Bf16Tiles, NV, DEGREE>(scores, n, logits.cap != 0.0f ? 1.0f : logits.scale, tops, sums);
  for (int v = 0; v < NV; ++v) {
    store(panel.tops + v * W, tops[v]);
    store(panel.sums + v * W, fma(load(panel.sums + v * W), decay[v], sums[v]));
  }
  std::fill(scores + n / 2 * ROWS, scores + n_whole / 2 * ROWS, 0.0f);
  accumulate<NV>(panel, tile, n_whole, head_size, scores, decay);
}

// The second pass, as that of panel.h.
template <int NV, int DEGREE>
void add_shares(Bf16Tiles, const Panel& panel, const Tile& tile, int head_size, const ScaleAndCap& logits,
                const float* lses, float* shares) {
  constexpr int ROWS = NV * W;
  alignas(64) float scores[BLOCK * ROWS];
  const int steps = (head_size + Bf16Tiles::step - 1) / Bf16Tiles::step;
  const int n = (std::min(tile.n, panel.limits[ROWS - 1] - tile.first) + GROUP - 1) / GROUP * GROUP;
  int32_t limits[ROWS];
  for (int r = 0; r < ROWS; ++r) limits[r] = panel.limits[r] - tile.first;
  for (int j = 0; j < n; j += BLOCK) {
    score_block<NV>(panel, tile, j, n, steps, scores);
    const int count = std::min(BLOCK, n - j);
    add_block_shares<NV, DEGREE>(j, count, limits, logits, lses, shares,
                                 [&](int i, int v) { return load(scores + (i * NV + v) * W); });
  }
}

}  // namespace sparq::prefill

#endif
