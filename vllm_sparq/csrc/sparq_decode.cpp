// vllm_sparq/ops/sparq_decode: rank all tokens with a few channels of the ranking copy, attend to the best.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "ranking.h"
#include "select.h"
#include "simd.h"
#include "sparse_tasks.h"

namespace sparq {
namespace {

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
  size_t ranked_bytes(int len) const {
    return Candidates::n_bytes(capacity(len), n_kept_rows()) + SoftmaxSums::n_bytes(n_head_rows());
  }
  Ranked new_ranked(int len, Arena& arena) const {
    const Candidates candidates = Candidates::in(arena, read.n_selected(len), capacity(len), n_kept_rows());
    return {candidates, SoftmaxSums::in(arena, n_head_rows())};
  }

 private:
  int capacity(int len) const { return Candidates::capacity_for(read.n_selected(len), call.pages.block_size); }
};

// Scores of all heads and all tokens of one KV head of one request, where they are kept: [n_rows, stride].
struct AllScores {
  float* data = nullptr;
  size_t stride = 0;

  static size_t n_bytes(const Sparq& op, int len) {
    return op.keeps_scores() ? Arena::room<float>(op.n_head_rows() * stride_for(len)) : 0;
  }
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

// Steps 1 to 3 over one part of a context.
void rank_part(const Sparq& op, const Task& task, int len, Ranked& ranked, const AllScores& all) {
  thread_local Scratch scratch;
  const int n = op.call.pages.block_size, stride = op.scores_stride();
  Arena arena = scratch.arena(Ranking::n_bytes(op.call.pages, op.read.r, op.rows().n()) +
                              Arena::room<float>((size_t)op.rows().n() * stride) + Arena::room<float>(stride));
  const Ranking ranking = make_ranking(op.call, task.request, task.head, op.read.r, op.rows(), arena);
  float *scores = arena.take<float>((size_t)ranking.n_rows * stride), *copy = arena.take<float>(stride);
  const float* const sum = scores + (size_t)(ranking.n_rows - 1) * stride;
  const Sequence sequence = op.call.sequence(task.request, task.head);
  const Local local(sequence, op.read.n_local(len));
  for (int first = task.first; first < task.last; first += n) {
    const int count = std::min(n, task.last - first);
    touch_blocks(sequence, first / n, task.first / n, task.last / n);
    score_block(op, ranking, sequence, first / n, len, scores);
    if (op.per_head()) ranked.sums.add_scores(scores, stride, count);
    if (op.keeps_scores())
      for (int row = 0; row < op.n_head_rows(); ++row)
        std::copy_n(scores + (size_t)row * stride, count, all.data + row * all.stride + first);
    if (!op.read.probs)
      ranked.candidates.push(local.favour(first, count, sum, copy), scores, stride, first, count);
  }
  ranked.candidates.keep_best();
}

// Summed probabilities of each token: where pages add up attention they are noted, and with group_reduce = probs they are
// step 3, instead of summed scores.
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
      for (int i = 0; i < count; i += W)
        store(group + i, add(load(group + i),
                             div(exp_below(load(all.data + row * all.stride + first + i), ranked.sums.peak[row]), total)));
    }
    if (op.call.pages.adds_attention()) add_attention(sequence, first, count, group, 0, 1, &share);
    if (!op.read.probs) continue;
    local.favour(first, count, group);
    ranked.candidates.push(group, all.data + first, (int)all.stride, first, count);
  }
  if (op.read.probs) ranked.candidates.keep_best();
}

// Step 3 with `mass`: drops the candidates beyond as many as hold it.
void keep_mass(const Sparq& op, int len, Ranked& ranked) {
  thread_local Scratch scratch;
  Candidates& best = ranked.candidates;
  const size_t room = round_up((size_t)best.n, 16);
  float* const shares = scratch.arena(Arena::room<float>(room)).take<float>(room);
  std::fill_n(shares, room, 0.0f);
  for (int h = 0; h < op.call.group_size(); ++h) {
    const float* scores = best.head_scores + (size_t)h * (best.capacity + 16);
    const Vec factor = set1(1.0f / (ranked.sums.total_of(h) * (float)op.call.group_size()));
    for (int i = 0; i < best.n; i += W)
      store(shares + i, fma(exp_below(load(scores + i), ranked.sums.peak[h]), factor, load(shares + i)));
  }
  best.wanted = std::max(best.n_holding(shares, op.read.mass), op.read.n_least(len));
  best.keep_best();
}

// sum += V of n records.
template <class T>
void add_values(const uint8_t* const* records, int n, int d, float* sum) {
  for (int c = 0; c < d; c += W) {
    Vec total = load(sum + c);
    for (int i = 0; i < n; ++i) total = add(total, load((const T*)records[i] + d + c));
    store(sum + c, total);
  }
}

// Step 5: alpha of each head, and (1 - alpha) times the mean of V.
void mean_value(const Sparq& op, const Sequence& sequence, int len, const Ranked& ranked, float* alphas, float* rests,
                float* mean) {
  const Pages& pages = op.call.pages;
  const int d = pages.head_size, last = (len - 1) / pages.block_size;
  memcpy(mean, sequence.page(last) + pages.value_sum, d * sizeof(float));
  few_records_at_a_time(sequence, last, len - last * pages.block_size, [&](const uint8_t* const* rows, int, int n) {
    with_dtype(pages.dtype, [&](auto type) { add_values<decltype(type)>(rows, n, d, mean); });
  });
  const Candidates& chosen = ranked.candidates;
  for (int h = 0; h < op.call.group_size(); ++h) {
    const float* scores = chosen.head_scores + (size_t)h * (chosen.capacity + 16);
    Vec sum = zero();
    for (int i = 0; i < chosen.n; i += W) {
      const Vec x = exp_below(load(scores + i), ranked.sums.peak[h]);
      sum = add(sum, select((1u << std::min(W, chosen.n - i)) - 1, x, zero()));
    }
    alphas[h] = std::min(std::max(reduce_add(sum) / ranked.sums.total_of(h), op.read.alpha_floor), 1.0f);
    const Vec factor = set1((1.0f - alphas[h]) / (float)len);
    for (int c = 0; c < d; c += W) store(rests + (size_t)h * d + c, mul(load(mean + c), factor));
  }
}

// Steps 4 and 5 for one KV head of one request.
void finish_request(const Sparq& op, const Task& task, int len, Ranked& ranked) {
  if (op.read.cuts()) keep_mass(op, len, ranked);
  thread_local Scratch scratch;
  const Decode& call = op.call;
  const size_t d = call.pages.head_size, n_heads = call.group_size();
  Arena arena = scratch.arena(call.group_bytes() + call.state_bytes() + Arena::room<float>(n_heads) +
                              Arena::room<float>(n_heads * d) + Arena::room<float>(d));
  const Group group = call.group(task.request, task.head, arena);
  const State state = call.new_state(arena.take<float>(call.state_floats()));
  const Sequence sequence = call.sequence(task.request, task.head);
  attend_tokens(call, group, state, sequence, ranked.candidates.token, ranked.candidates.n);
  float *alphas = nullptr, *rests = nullptr;
  if (op.read.has_mean()) {
    alphas = arena.take<float>(n_heads), rests = arena.take<float>(n_heads * d);
    mean_value(op, sequence, len, ranked, alphas, rests, arena.take<float>(d));
  }
  call.finish(task.request, task.head, state, alphas, rests);
}

// A part of a cut context, kept until all parts are there.
struct Part {
  uint8_t* memory;
  size_t n_bytes;
  AllScores scores;
  Ranked ranked;
};

void run_whole(const Sparq& op, const Task& task, int len) {
  thread_local Scratch scratch;
  Arena arena = scratch.arena(op.ranked_bytes(len) + AllScores::n_bytes(op, len));
  Ranked ranked = op.new_ranked(len, arena);
  const AllScores scores = AllScores::in(op, len, arena);
  rank_part(op, task, len, ranked, scores);
  if (op.keeps_scores()) use_probs(op, op.call.sequence(task.request, task.head), ranked, scores);
  finish_request(op, task, len, ranked);
}

void run_part(const Sparq& op, const Task& task, int len, Part& part) {
  Arena arena(part.memory, part.n_bytes);
  part.ranked = op.new_ranked(len, arena);
  rank_part(op, task, len, part.ranked, part.scores);
}

// What the parts of a context found, as if one had found it; candidates stay in the order of the tokens.
void merge_parts(const Sparq& op, const Task& first, int len, const Part* parts) {
  thread_local Scratch scratch;
  const int wanted = op.read.n_selected(len), capacity = std::max(first.n_parts, 2) * wanted + 128;
  Arena arena = scratch.arena(Candidates::n_bytes(capacity, op.n_kept_rows()));
  Ranked ranked{Candidates::in(arena, wanted, capacity, op.n_kept_rows()), parts[0].ranked.sums};
  for (int i = 0; i < first.n_parts; ++i) {
    ranked.candidates.push(parts[i].ranked.candidates);
    if (i > 0) ranked.sums.merge(parts[i].ranked.sums);
  }
  if (op.keeps_scores()) use_probs(op, op.call.sequence(first.request, first.head), ranked, parts[0].scores);
  ranked.candidates.keep_best();
  finish_request(op, first, len, ranked);
}

// Memory for the parts of cut contexts; those of one context lie equally far apart.
void place_parts(const Sparq& op, const std::vector<Task>& tasks, Scratch& scratch, std::vector<Part>& parts) {
  parts.assign(tasks.size(), Part{});
  size_t total = 0;
  auto place = [&](auto&& each) {
    for (size_t i = 0; i < tasks.size(); ++i) {
      const int len = op.call.requests.lens[tasks[i].request];
      if (tasks[i].n_parts > 1) each(tasks[i], len, parts[i], op.read.is_dense(len));
    }
  };
  place([&](const Task& task, int len, Part& part, bool dense) {
    part.n_bytes = dense ? part_floats(op.call, task) * sizeof(float) : op.ranked_bytes(len);
    total += part.n_bytes + (task.part == 0 && !dense ? AllScores::n_bytes(op, len) : 0);
  });
  Arena arena = scratch.arena(total);
  place([&](const Task&, int, Part& part, bool) { part.memory = arena.take<uint8_t>(part.n_bytes); });
  AllScores scores;
  place([&](const Task& task, int len, Part& part, bool dense) {
    if (task.part == 0 && !dense) scores = AllScores::in(op, len, arena);
    part.scores = scores;
  });
}

}  // namespace
}  // namespace sparq

SPARQ_API void sparq_sparq_decode(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& out,
                                  const sparq::Requests& requests, float scale, const sparq::SparqRead& read) {
  sparq::run_tasks<sparq::Part>(sparq::Sparq{sparq::decode_call(pages, requests, query, out, scale), read});
}
