// vllm_sparq/ops/sparq_decode: rank all tokens with a few channels of the ranking copy, attend to the best.
#include <algorithm>
#include <cmath>

#include "api.h"
#include "base/simd.h"
#include "decode/sparse_tasks.h"
#include "rank/context.h"

namespace sparq {
namespace {

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
  const float* const sinks = op.call.sinks(sequence.head);
  for (int h = 0; h < op.call.group_size(); ++h) {
    const float* scores = chosen.head_scores + (size_t)h * (chosen.capacity + 16);
    Vec sum = zero();
    for (int i = 0; i < chosen.n; i += W) {
      const Vec x = exp_below(load(scores + i), ranked.sums.peak[h]);
      sum = add(sum, select((1u << std::min(W, chosen.n - i)) - 1, x, zero()));
    }
    float read = reduce_add(sum);
    if (sinks != nullptr) read += std::exp(sinks[h] - ranked.sums.peak[h]);
    alphas[h] = std::min(std::max(read / ranked.sums.total_of(h), op.read.alpha_floor), 1.0f);
    const Vec factor = set1((1.0f - alphas[h]) / (float)len);
    for (int c = 0; c < d; c += W) store(rests + (size_t)h * d + c, mul(load(mean + c), factor));
  }
}

// What is left of step 5 for one KV head of one request, whose tokens have been attended to.
void finish_request(const Sparq& op, const Task& task, int len, const Ranked& ranked, const State& state) {
  if (!op.read.has_mean()) return op.call.finish(task.request, task.head, state, nullptr, nullptr);
  thread_local Scratch scratch;
  const size_t d = op.call.pages.head_size, n_heads = op.call.group_size();
  Arena arena = scratch.arena();
  float *const alphas = arena.take<float>(n_heads), *const rests = arena.take<float>(n_heads * d);
  const Sequence sequence = op.call.sequence(task.request, task.head);
  mean_value(op, sequence, len, ranked, alphas, rests, arena.take<float>(d));
  op.call.finish(task.request, task.head, state, alphas, rests);
}

// The end of step 3, when the whole context is ranked but for what needs probabilities: the tokens that are read.
Listed choose_tokens(const Sparq& op, const Task& task, int len, Ranked& ranked, const AllScores& scores) {
  op.add_sinks(task.head, ranked);
  if (op.keeps_scores()) use_probs(op, op.call.sequence(task.request, task.head), ranked, scores);
  ranked.candidates.keep_best();
  if (op.read.cuts()) keep_mass(op, task.head, len, ranked);
  return {ranked.candidates.token, ranked.candidates.n};
}

// A part of a cut context, kept until all parts are there.
struct Part {
  float* memory;     // of its state
  AllScores scores;  // of the whole context
  Ranked ranked;
  Ranked all;  // in the first part: what the parts found, as if one had found it; in the order of the tokens
  Listed chosen;

  static void run_whole(const Sparq& op, const Task& task, int len);
  void run(const Sparq& op, const Task& task, int len);
  static Listed choose(const Sparq& op, const Task& first, Part* parts);
  static void finish(const Sparq& op, const Task& first, const Part* parts, const State& state);
  // What every part of a cut context works in; the parts of a context follow each other.
  static void place(const Sparq& op, const std::vector<Task>& tasks, Scratch& scratch, std::vector<Part>& parts);
};

void Part::run_whole(const Sparq& op, const Task& task, int len) {
  thread_local Scratch scratch;
  Arena arena = scratch.arena();
  Ranked ranked = op.new_ranked(len, arena);
  const AllScores scores = AllScores::in(op, len, arena);
  rank_part(op, task, len, ranked, scores);
  const Listed chosen = choose_tokens(op, task, len, ranked, scores);
  const State state = attend_listed(op.call, task, chosen, arena.take<float>(op.call.state_floats()));
  finish_request(op, task, len, ranked, state);
}

void Part::run(const Sparq& op, const Task& task, int len) { rank_part(op, task, len, ranked, scores); }

Listed Part::choose(const Sparq& op, const Task& first, Part* parts) {
  Ranked& all = parts[0].all;
  for (int i = 0; i < first.n_parts; ++i) {
    all.candidates.push(parts[i].ranked.candidates);
    if (i > 0) all.sums.merge(parts[i].ranked.sums);
  }
  return choose_tokens(op, first, op.call.requests.lens[first.request], all, parts[0].scores);
}

void Part::finish(const Sparq& op, const Task& first, const Part* parts, const State& state) {
  finish_request(op, first, op.call.requests.lens[first.request], parts[0].all, state);
}

void Part::place(const Sparq& op, const std::vector<Task>& tasks, Scratch& scratch, std::vector<Part>& parts) {
  parts.assign(tasks.size(), Part{});
  Arena arena = scratch.arena();
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Task& task = tasks[i];
    const int len = op.call.requests.lens[task.request];
    if (task.n_parts == 1) continue;
    parts[i].memory = place_part(op.call, task, task.part > 0 ? parts[i - 1].memory : nullptr, arena);
    if (op.read.is_dense(len)) continue;
    parts[i].ranked = op.new_ranked(len, arena);
    parts[i].scores = task.part > 0 ? parts[i - 1].scores : AllScores::in(op, len, arena);
    if (task.part > 0) continue;
    const int wanted = op.read.n_selected(len), capacity = task.n_parts * wanted + 128;
    parts[i].all = {Candidates::in(arena, wanted, capacity, op.n_kept_rows()), parts[i].ranked.sums};
  }
}

}  // namespace
}  // namespace sparq

SPARQ_API void sparq_sparq_decode(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& out,
                                  const sparq::Requests& requests, const sparq::Logits& logits,
                                  const sparq::SparqRead& read) {
  sparq::run_tasks<sparq::Part>(sparq::Sparq{sparq::decode_call(pages, requests, query, out, logits), read});
}
