// Steps 1 and 2 of a SparQ read: which channels rank the tokens, and the approximate scores of all tokens.
#pragma once

#include "base/paged.h"
#include "base/scratch.h"
#include "codes/int16_weights.h"
#include "decode/dense.h"

namespace sparq {

// Which rows: those of single heads, the sum, or both. A single head is its own sum.
struct ScoreRows {
  int n_heads;  // H/G
  bool heads, sum;

  int n() const { return (heads ? n_heads : 0) + (has_sum() ? 1 : 0); }
  bool has_sum() const { return sum && !(heads && n_heads == 1); }
};

// The scaled query of a group on its channels: one row per query head where their scores are needed, and a last row for
// the sum of the heads, which ranks the tokens: the sum of scores is the score of the summed query. (Ranking by a row
// of its own costs little, and which tokens are read does not depend on what else is wanted, but for rounding where a
// group is one head, whose row then is both.)
struct Ranking {
  const Pages* pages;
  const CodeKernels* codes;  // of pages whose K ranks tokens as it is
  int r;
  int n_rows;
  int32_t* row_offsets;  // [r] bytes from the ranking copy, or the codes of K, to the row of a channel, ascending
  int32_t* channels;     // [r] ascending
  float* query;          // [n_rows, stride] on the channels, with temperature
  float* whole_query;    // [n_rows, D], the same with zeros elsewhere
  float* weights;        // [n_rows, stride] of the page being scored: query times step
  bf16* short_weights;   // [n_rows, stride] the same in bf16
  float* bias;           // [n_rows] of that page: query times zero
  HeadNumbers* numbers;  // [n_rows] the query where weights are whole numbers, else null
  int16_t* words;        // [n_rows, 2 SCAN_PAIRS] their weights of that page
  GroupWeights* by_row;  // [n_rows] and what the sums are worth
  int8_t* bytes;         // [r] and zeros: weights of the sum where it is scored with such, else null
  uint8_t* rows;         // its chosen rows, side by side
  int stride;

  static Ranking in(Arena& arena, const Decode& call, int r, ScoreRows rows);
  // The rows that are not scored with weights of 8 bits.
  Ranking but_bytes() const {
    Ranking rest = *this;
    rest.n_rows -= bytes != nullptr;
    return rest;
  }
};

// Chooses the channels of a query group and scales its heads; takes its memory from `arena`.
Ranking make_ranking(const Decode& call, int request, int head, int r, ScoreRows rows, Arena& arena);

// Starts the page walks for what ranks the tokens of a page. Do it for many pages at once, early: a walk is slow on
// virtual machines, and walks overlap only if they start together.
void touch_page(const Pages& pages, const uint8_t* page);

// scores[row][slot] of all tokens of a full page, from its ranking copy or channel-major K; rows are `stride` floats
// apart and may be overwritten up to N + 16. The page `ahead` is prefetched, unless null.
void score_page(const Ranking& ranking, const uint8_t* page, const uint8_t* ahead, float* scores, int stride);

}  // namespace sparq
