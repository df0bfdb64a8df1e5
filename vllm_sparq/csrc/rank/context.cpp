#include "rank/context.h"

#include <cmath>

#include "attend/attention.h"
#include "base/simd.h"

namespace sparq {
namespace {

// Step 2 for the tokens of one block: into `scores`, from what ranks full blocks, else from K itself.
void score_block(const Sparq& op, const Ranking& ranking, const Sequence& sequence, int block, int len, float* scores) {
  constexpr int AHEAD = 2;  // blocks; 1 takes 7% (with the mean value) to 40% (without) longer
  const Pages& pages = op.call.pages;
  const int n = pages.block_size, stride = op.scores_stride();
  const int n_ranked = pages.quantized() ? sequence.newest_block() : len / n;
  if (block < n_ranked) {
    score_page(ranking, sequence.page(block), block + AHEAD < n_ranked ? sequence.page(block + AHEAD) : nullptr, scores,
               stride);
    return;
  }
  few_records_at_a_time(sequence, block, len - block * n, [&](const uint8_t* const* rows, int first, int count) {
    op.call.kernels.dot(ranking.whole_query, ranking.n_rows, pages.head_size, rows, count, scores + first, stride);
  });
}

// Every TOUCH blocks of a part, starts the page walks for the next but one TOUCH of its full blocks.
void touch_blocks(const Sequence& sequence, int block, int first_block, int n_full) {
  constexpr int TOUCH = 16;  // 8 to 32 are alike; none at all takes 1.6 times as long at 64k tokens (4 kB pages)
  if ((block - first_block) % TOUCH != 0) return;
  const int from = block == first_block ? block : block + TOUCH;
  for (int b = from; b < std::min(block + 2 * TOUCH, n_full); ++b) touch_page(*sequence.pages, sequence.page(b));
}

// The newest tokens of a context: where nothing is evicted the last slots, else those at positions above a bar.
struct Local {
  const Sequence& sequence;
  int first_slot, position_bar;

  Local(const Sequence& of, int n_local) : sequence(of), first_slot(of.len - n_local), position_bar(0) {
    if (by_position()) position_bar = *positions(of.len - 1) - n_local;
  }
  bool by_position() const { return sequence.pages->positions >= 0; }
  const int32_t* positions(int slot) const {
    const int n = sequence.pages->block_size;
    return (const int32_t*)(sequence.page(slot / n) + sequence.pages->positions) + slot % n;
  }

  // They need no rank: of `count` tokens from `first` on (a multiple of 16), their scores become infinite.
  void favour(int first, int count, float* scores) const {
    if (!by_position()) {
      std::fill(scores + std::min(std::max(first_slot - first, 0), count), scores + count, INFINITY);
      return;
    }
    for (int i = 0; i < count; i += W)
      store(scores + i, select(above(positions(first + i), position_bar), set1(INFINITY), load(scores + i)));
  }

  // The same in `copy`, if there may be any among them.
  const float* favour(int first, int count, const float* scores, float* copy) const {
    if (!by_position() && first_slot >= first + count) return scores;
    std::copy_n(scores, count, copy);
    favour(first, count, copy);
    return copy;
  }
};

void cap_scores(float* scores, int count, const Logits& logits) {
  for (int i = 0; i < count; i += W) store(scores + i, soft_capped(load(scores + i), logits.soft_cap));
}

}  // namespace

void rank_part(const Sparq& op, const Task& task, int len, Ranked& ranked, const AllScores& all) {
  thread_local Scratch scratch;
  const int n = op.call.pages.block_size, stride = op.scores_stride();
  Arena arena = scratch.arena();
  const Ranking ranking = make_ranking(op.call, task.request, task.head, op.read.r, op.rows(), arena);
  float *scores = arena.take<float>((size_t)ranking.n_rows * stride), *copy = arena.take<float>(stride);
  const float* const sum = scores + (size_t)(ranking.n_rows - 1) * stride;
  const Sequence sequence = op.call.sequence(task.request, task.head);
  const Local local(sequence, op.read.n_local(len));
  for (int first = task.first; first < task.last; first += n) {
    const int count = std::min(n, task.last - first);
    touch_blocks(sequence, first / n, task.first / n, task.last / n);
    score_block(op, ranking, sequence, first / n, len, scores);
    const float* ranked_by = op.read.probs ? nullptr : local.favour(first, count, sum, copy);
    if (op.call.logits.soft_cap != 0.0f) {  // of probabilities alone: ranks go by what it was not put on
      if (ranked_by == sum) ranked_by = copy, std::copy_n(sum, count, copy);
      for (int row = 0; row < op.n_head_rows(); ++row) cap_scores(scores + (size_t)row * stride, count, op.call.logits);
    }
    if (op.per_head()) ranked.sums.add_scores(scores, stride, count);
    if (op.keeps_scores())
      for (int row = 0; row < op.n_head_rows(); ++row)
        std::copy_n(scores + (size_t)row * stride, count, all.data + row * all.stride + first);
    if (!op.read.probs) ranked.candidates.push(ranked_by, scores, stride, first, count);
  }
  ranked.candidates.keep_best();
}

void use_probs(const Sparq& op, const Sequence& sequence, Ranked& ranked, const AllScores& all) {
  constexpr int STRIP = 128;
  alignas(64) float group[STRIP];
  const int len = sequence.len;
  const Local local(sequence, op.read.n_local(len));
  const float share = 1.0f / (float)op.call.group_size();
  for (int first = 0; first < len; first += STRIP) {
    const int count = std::min(STRIP, len - first);
    std::fill_n(group, STRIP, 0.0f);
    for (int row = 0; row < op.n_head_rows(); ++row) {
      const Vec total = set1(ranked.sums.total_of(row));
      const float* const scores = all.data + row * all.stride + first;
      for (int i = 0; i < count; i += W) {
        const Vec share = div(exp_below(load(scores + i), ranked.sums.peak[row]), total);
        store(group + i, add(load(group + i), share));
      }
    }
    if (op.call.pages.adds_attention()) add_attention(sequence, first, count, group, 0, 1, &share);
    if (!op.read.probs) continue;
    local.favour(first, count, group);
    ranked.candidates.push(group, all.data + first, (int)all.stride, first, count);
  }
  if (op.read.probs) ranked.candidates.keep_best();
}

void keep_mass(const Sparq& op, int head, int len, Ranked& ranked) {
  thread_local Scratch scratch;
  Candidates& best = ranked.candidates;
  const size_t room = round_up((size_t)best.n, 16);
  float* const shares = scratch.arena().take<float>(room);
  std::fill_n(shares, room, 0.0f);
  for (int h = 0; h < op.call.group_size(); ++h) {
    const float* scores = best.head_scores + (size_t)h * (best.capacity + 16);
    const Vec factor = set1(1.0f / (ranked.sums.total_of(h) * (float)op.call.group_size()));
    for (int i = 0; i < best.n; i += W)
      store(shares + i, fma(exp_below(load(scores + i), ranked.sums.peak[h]), factor, load(shares + i)));
  }
  float mass = op.read.mass;
  const float* const sinks = op.call.sinks(head);
  for (int h = 0; sinks != nullptr && h < op.call.group_size(); ++h)
    mass -= ranked.sums.share_of(h, sinks[h]) / (float)op.call.group_size();
  best.wanted = std::max(best.n_holding(shares, mass), op.read.n_least(len));
  best.keep_best();
}

}  // namespace sparq
