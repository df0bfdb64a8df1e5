// Steps 1 to 3 of a SparQ read over a whole context, or a part of it: the tokens that are read.
#pragma once

#include <algorithm>

#include "base/reads.h"
#include "decode/call.h"
#include "decode/tasks.h"
#include "rank/ranking.h"
#include "rank/select.h"

namespace sparq {

// What ranking one part of a context leaves behind.
struct Ranked {
  Candidates candidates;  // probs: empty, since probabilities need the sums of all parts
  SoftmaxSums sums;
};

struct Sparq {
  Decode call;
  SparqRead read;

  // Whether probabilities are wanted, which need the scores of all tokens.
  bool keeps_scores() const { return read.probs || call.pages.adds_attention(); }
  bool per_head() const { return keeps_candidate_scores() || keeps_scores(); }
  bool keeps_candidate_scores() const { return read.has_mean() || read.cuts(); }
  ScoreRows rows() const { return {call.group_size(), per_head(), !read.probs}; }
  int n_head_rows() const { return per_head() ? call.group_size() : 0; }
  int n_kept_rows() const { return keeps_candidate_scores() ? call.group_size() : 0; }
  int scores_stride() const { return call.pages.block_size + 32; }
  Ranked new_ranked(int len, Arena& arena) const {
    const Candidates candidates = Candidates::in(arena, read.n_selected(len), capacity(len), n_kept_rows());
    return {candidates, SoftmaxSums::in(arena, n_head_rows())};
  }
  // Once, when the sums are those of the whole context: a sink is one more token, always read, whose value is zero.
  void add_sinks(int head, Ranked& ranked) const {
    if (per_head() && call.logits.sinks != nullptr) ranked.sums.add_sinks(call.sinks(head));
  }

 private:
  int capacity(int len) const { return Candidates::capacity_for(read.n_selected(len), call.pages.block_size); }
};

// Scores of all heads and all tokens of one KV head of one request, where they are kept: [n_rows, stride].
struct AllScores {
  float* data = nullptr;
  size_t stride = 0;

  static AllScores in(const Sparq& op, int len, Arena& arena) {
    if (!op.keeps_scores()) return {};
    return {arena.take<float>(op.n_head_rows() * stride_for(len)), stride_for(len)};
  }

 private:
  static size_t stride_for(int len) { return round_up((size_t)len, 16) + 16; }
};

// Calls f(rows, first, n) for the tokens of a block that is kept in the model's own type, up to 64 at a time: pointers
// to the records of tokens first .. first + n, the last one repeated.
template <class F>
void few_records_at_a_time(const Sequence& sequence, int block, int n_tokens, F&& f) {
  for (int first = 0; first < n_tokens; first += 64) {
    const uint8_t* rows[64];
    for (int i = 0; i < 64; ++i) rows[i] = sequence.record(block, std::min(first + i, n_tokens - 1));
    f(rows, first, std::min(64, n_tokens - first));
  }
}

// Steps 1 to 3 over one part of a context; its scores go to `all`, where they are kept.
void rank_part(const Sparq& op, const Task& task, int len, Ranked& ranked, const AllScores& all);

// Summed probabilities of each token: where pages add up attention they are noted, and with group_reduce = probs they
// are step 3, instead of summed scores.
void use_probs(const Sparq& op, const Sequence& sequence, Ranked& ranked, const AllScores& all);

// Step 3 with `mass`: drops the candidates beyond as many as hold it.
void keep_mass(const Sparq& op, int head, int len, Ranked& ranked);

}  // namespace sparq
