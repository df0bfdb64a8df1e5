// Step 3 of a SparQ read: the best tokens of a stream of scores, and the softmax of the scores as they pass.
#pragma once

#include <cstdint>

#include "base/scratch.h"

namespace sparq {

// What parts the k largest of n values from the rest: those above it are among them, and so are `n_ties` of those equal
// to it; none below. (-infinity if there are fewer; NaN counts as absent.) Up to `slack` more may be above it, where
// that is found sooner.
float bar_of_largest(const float* values, int n, int k, int* n_ties, int slack = 0);

// The `wanted` best tokens seen so far, in the order they came (oldest first), and more that may be.
//
// Instead of scores of all tokens it keeps those above a threshold that rises whenever the buffer is full, so a pass
// over S tokens costs little more than S comparisons: in random order about wanted * (1 + ln(S / wanted)) tokens ever
// enter.
struct Candidates {
  float* score;
  int32_t* token;
  float* head_scores;  // [n_rows, capacity], or null
  int n_rows;
  int capacity;
  int wanted;
  int n = 0;
  float threshold;

  static int capacity_for(int wanted, int block_size);
  // n_rows = 0 for no scores of single heads.
  static Candidates in(Arena& arena, int wanted, int capacity, int n_rows);

  // Tokens first .. first + count, in ascending order over all calls. The arrays are readable up to count rounded up to
  // 16.
  void push(const float* scores, const float* head_scores, int stride, int first, int count);
  void push(const Candidates& other);
  // Drops all but the best, and perhaps up to `slack` of the next; ties go to the oldest.
  void keep_best(int slack = 0);
  // How many of the best hold `mass`, none if that is not positive; all if all hold less. shares [n, readable to n
  // rounded up to 16].
  int n_holding(const float* shares, float mass) const;
};

// Running softmax statistics of one row of scores per query head.
struct SoftmaxSums {
  float* peak;   // [n_rows]
  float* total;  // [n_rows, 16], lanes to be added up: sum of e^(score - peak)
  int n_rows;

  static SoftmaxSums in(Arena& arena, int n_rows);

  // Adds count tokens; the scores are overwritten from there to the next multiple of 16.
  void add_scores(float* scores, int stride, int count);
  void merge(const SoftmaxSums& other);
  // Adds one more score to each row.
  void add_sinks(const float* sinks);
  // e^(score - peak) over the total: the share of a score that has been added.
  float share_of(int row, float score) const;
  float total_of(int row) const;
};

}  // namespace sparq
