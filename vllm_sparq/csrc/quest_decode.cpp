// vllm_sparq/ops/quest_decode: rank spans of neighbouring tokens by what pages hold of their keys, attend to the best.
#include <algorithm>

#include "api.h"
#include "base/simd.h"
#include "base/tile.h"
#include "decode/sparse_tasks.h"
#include "rank/ranking_copy.h"
#include "rank/select.h"

namespace sparq {
namespace {

constexpr int AT_ONCE = 16;  // spans that one call of the dot product takes

// Step 2 for one element type and head size. The query is [2, D] for the least and the largest K; where K is multiplied
// in bf16 it is the sum of two bf16, as good as 16 bits of mantissa, so that a score is one dot product of each.
template <class T, int D>
struct SpanDot {
  using Query = typename Mac<T>::Query;
  static constexpr int PARTS = sizeof(Query) == sizeof(float) ? 1 : 2;

  static void split(const float* query, int n, void* to) {
    for (int part = 0; part < PARTS; ++part)
      for (int c = 0; c < n; c += W) {
        Vec x = load(query + c);
        for (int before = 0; before < part; ++before) x = sub(x, load((const Query*)to + before * n + c));
        store((Query*)to + part * n + c, x);
      }
  }
  static void upper(const void* query, int n, const uint8_t* const* rows, const uint8_t* const* ahead, float* scores) {
    alignas(64) float sums[PARTS * AT_ONCE];
    dot_tile<Mac<T>, T, PARTS, 2 * D>((const Query*)query, n, rows, AT_ONCE, ahead, sums, AT_ONCE);
    for (int i = 0; i < AT_ONCE; i += W) {
      Vec sum = load(sums + i);
      for (int part = 1; part < PARTS; ++part) sum = add(sum, load(sums + part * AT_ONCE + i));
      store(scores + i, sum);
    }
  }
};

struct SpanKernels {
  void (*split)(const float* query, int n, void* to);  // [2 D] to at most as many bytes
  void (*upper)(const void* query, int n, const uint8_t* const* rows, const uint8_t* const* ahead, float* scores);

  static SpanKernels of(const Pages& pages) {
    SpanKernels kernels{};
    with_dtype(pages.dtype, [&](auto type) {
      with_head_size(pages.head_size, [&](auto size) {
        using Dot = SpanDot<decltype(type), decltype(size)::value>;
        kernels = {Dot::split, Dot::upper};
      });
    });
    return kernels;
  }
};

struct QuestDecode {
  Decode call;
  SpansRead read;
  SpanKernels kernels;

  // The first spans and the newest ones are read whatever their rank.
  int first_ranked() const { return (int)read.n_first; }
  int stop_ranked(int len) const { return spans_of(len) - read.n_newest(len); }
  int n_wanted(int len) const { return read.n_spans(len) - first_ranked() - read.n_newest(len); }
  Candidates new_candidates(int len, Arena& arena) const {
    return Candidates::in(arena, n_wanted(len), capacity(len), 0);
  }
  size_t room_for_tokens(int len) const { return (size_t)read.n_spans(len) * SPAN_TOKENS; }

 private:
  int capacity(int len) const { return Candidates::capacity_for(n_wanted(len), AT_ONCE); }
};

// The bounds of the spans of one KV head of one request: those of full pages in place, the others made from K.
// Representatives are in place for all spans that are ranked, and where both bounds are one key they bound its logit.
struct Bounds {
  const Sequence& sequence;
  int per_block;       // spans
  int n_full;          // blocks whose pages hold their bounds
  size_t bytes;        // of a span
  const uint8_t* own;  // bounds of the spans after the full blocks

  static int n_full_blocks(const Sequence& of) {
    if (of.pages->ranking_type == RankingType::representatives) return of.pages->n_blocks(of.len);
    return of.pages->quantized() ? of.newest_block() : of.len / of.pages->block_size;
  }

  const uint8_t* in_page(int block) const { return sequence.page(block) + sequence.pages->ranking; }
  // Pointers to spans first .. first + AT_ONCE, the last one before `last` repeated.
  void list(int first, int last, const uint8_t** rows) const {
    const int n = std::min(AT_ONCE, last - first);
    for (int i = 0; i < n;) {
      const int block = (first + i) / per_block, place = (first + i) % per_block;
      const bool full = block < n_full;
      const uint8_t* row = full ? in_page(block) + place * bytes : own + (first + i - n_full * per_block) * bytes;
      for (const int stop = full ? std::min(n, i + per_block - place) : n; i < stop; ++i, row += bytes) rows[i] = row;
    }
    std::fill(rows + n, rows + AT_ONCE, rows[n - 1]);
  }
};

// Step 1 for the spans after the full blocks that are ranked.
void bound_newest(const Sequence& sequence, int first, int last, uint8_t* to) {
  const Pages& pages = *sequence.pages;
  for (int span = first; span < last; ++span, to += pages.record_bytes()) {
    const uint8_t* rows[SPAN_TOKENS];
    for (int i = 0; i < SPAN_TOKENS; ++i) {
      const int token = span * SPAN_TOKENS + i;
      rows[i] = sequence.record(token / pages.block_size, token % pages.block_size);
    }
    bound_span(pages, rows, SPAN_TOKENS, to);
  }
}

// What step 2 multiplies the bounds of a span with, as the kernels want it: the negative and the positive elements of
// the query group, summed over its heads.
const void* bound_query(const QuestDecode& op, int request, int head, Arena& arena) {
  const Decode& call = op.call;
  const int d = call.pages.head_size;
  float *const query = arena.take<float>(2 * d), *const row = arena.take<float>(d);
  void* const split = arena.take<float>(2 * d);
  std::fill_n(query, 2 * d, 0.0f);
  for (int h = 0; h < call.group_size(); ++h) {
    call.kernels.widen(call.query.at(request, head * call.group_size() + h), d, row);
    for (int c = 0; c < d; c += W) {
      const Vec q = load(row + c);
      store(query + c, add(load(query + c), min(q, zero())));
      store(query + d + c, add(load(query + d + c), max(q, zero())));
    }
  }
  op.kernels.split(query, 2 * d, split);
  return split;
}

// Every TOUCH blocks, starts the page walks for the bounds of the next but one TOUCH of full blocks.
void touch_blocks(const Bounds& bounds, int block, int first_block, int stop) {
  constexpr int TOUCH = 16;
  if ((block - first_block) % TOUCH != 0) return;
  const int from = block == first_block ? block : block + TOUCH;
  for (int b = from; b < std::min(block + 2 * TOUCH, stop); ++b) prefetch_l2(bounds.in_page(b));
}

// Steps 1 to 3 over one part of a context.
void rank_part(const QuestDecode& op, const Task& task, int len, Candidates& candidates) {
  thread_local Scratch scratch;
  const Pages& pages = op.call.pages;
  const size_t d = pages.head_size, bytes = pages.record_bytes();
  const int per_block = pages.block_size / SPAN_TOKENS;
  Arena arena = scratch.arena();
  const void* const query = bound_query(op, task.request, task.head, arena);
  uint8_t* const own = arena.take<uint8_t>(per_block * bytes);
  const Sequence sequence = op.call.sequence(task.request, task.head);
  const int first = std::max(task.first / SPAN_TOKENS, op.first_ranked());
  const int last = std::min(spans_of(task.last), op.stop_ranked(len));
  const Bounds bounds{sequence, per_block, Bounds::n_full_blocks(sequence), bytes, own};
  bound_newest(sequence, std::max(first, bounds.n_full * per_block), last, own);

  // Two calls ahead is best (one or four take a tenth longer). What is left of the time is mostly prefetches that wait
  // for each other: runs of a block's bounds are short, so the processor's own prefetcher hardly starts.
  const uint8_t* rows[3][AT_ONCE];
  alignas(64) float upper[AT_ONCE];
  for (int i = 0; i < 2; ++i)
    if (first + i * AT_ONCE < last) bounds.list(first + i * AT_ONCE, last, rows[i]);
  const int first_block = task.first / pages.block_size;
  int touched = first_block;
  for (int span = first, i = 0; span < last; span += AT_ONCE, ++i) {
    const uint8_t** const ahead = span + 2 * AT_ONCE < last ? rows[(i + 2) % 3] : nullptr;
    if (ahead != nullptr) bounds.list(span + 2 * AT_ONCE, last, ahead);
    for (const int block = span / per_block; touched <= block; ++touched)
      touch_blocks(bounds, touched, first_block, std::min(bounds.n_full, task.last / pages.block_size));
    op.kernels.upper(query, (int)(2 * d), rows[i % 3], ahead, upper);
    candidates.push(upper, nullptr, 0, span, std::min(AT_ONCE, last - span));
  }
  candidates.keep_best();
}

// The tokens of the first spans, of those chosen and of the newest ones.
Listed list_tokens(const QuestDecode& op, int len, const Candidates& chosen, int32_t* tokens) {
  int n = 0;
  for (int token = 0; token < op.first_ranked() * SPAN_TOKENS; ++token) tokens[n++] = token;
  for (int i = 0; i < chosen.n; ++i)
    for (int place = 0; place < SPAN_TOKENS; ++place) tokens[n++] = chosen.token[i] * SPAN_TOKENS + place;
  for (int token = op.stop_ranked(len) * SPAN_TOKENS; token < len; ++token) tokens[n++] = token;
  return {tokens, n};
}

// A part of a cut context, kept until all parts are there.
struct Part {
  float* memory;  // of its state
  Candidates candidates;
  Candidates all;   // in the first part: what the parts found, as if one had found it; in the order of the tokens
  int32_t* tokens;  // the same: room for those that are read
  Listed chosen;

  static void run_whole(const QuestDecode& op, const Task& task, int len);
  void run(const QuestDecode& op, const Task& task, int len);
  static Listed choose(const QuestDecode& op, const Task& first, Part* parts);
  static void finish(const QuestDecode& op, const Task& first, const Part* parts, const State& state);
  // What every part of a cut context works in; the parts of a context follow each other.
  static void place(const QuestDecode& op, const std::vector<Task>& tasks, Scratch& scratch, std::vector<Part>& parts);
};

void Part::run_whole(const QuestDecode& op, const Task& task, int len) {
  thread_local Scratch scratch;
  Arena arena = scratch.arena();
  Candidates candidates = op.new_candidates(len, arena);
  rank_part(op, task, len, candidates);
  const Listed chosen = list_tokens(op, len, candidates, arena.take<int32_t>(op.room_for_tokens(len)));
  const State state = attend_listed(op.call, task, chosen, arena.take<float>(op.call.state_floats()));
  op.call.finish(task.request, task.head, state, nullptr, nullptr);
}

void Part::run(const QuestDecode& op, const Task& task, int len) { rank_part(op, task, len, candidates); }

Listed Part::choose(const QuestDecode& op, const Task& first, Part* parts) {
  Candidates& all = parts[0].all;
  for (int i = 0; i < first.n_parts; ++i) all.push(parts[i].candidates);
  all.keep_best();
  return list_tokens(op, op.call.requests.lens[first.request], all, parts[0].tokens);
}

void Part::finish(const QuestDecode& op, const Task& first, const Part*, const State& state) {
  op.call.finish(first.request, first.head, state, nullptr, nullptr);
}

void Part::place(const QuestDecode& op, const std::vector<Task>& tasks, Scratch& scratch, std::vector<Part>& parts) {
  parts.assign(tasks.size(), Part{});
  Arena arena = scratch.arena();
  for (size_t i = 0; i < tasks.size(); ++i) {
    const Task& task = tasks[i];
    const int len = op.call.requests.lens[task.request];
    if (task.n_parts == 1) continue;
    parts[i].memory = place_part(op.call, task, task.part > 0 ? parts[i - 1].memory : nullptr, arena);
    if (op.read.is_dense(len)) continue;
    parts[i].candidates = op.new_candidates(len, arena);
    if (task.part > 0) continue;
    parts[i].all = Candidates::in(arena, op.n_wanted(len), task.n_parts * op.n_wanted(len), 0);
    parts[i].tokens = arena.take<int32_t>(op.room_for_tokens(len));
  }
}

}  // namespace
}  // namespace sparq

SPARQ_API void sparq_quest_decode(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& out,
                                  const sparq::Requests& requests, const sparq::Logits& logits,
                                  const sparq::SpansRead& read) {
  const sparq::Decode call = sparq::decode_call(pages, requests, query, out, logits);
  sparq::run_tasks<sparq::Part>(sparq::QuestDecode{call, read, sparq::SpanKernels::of(pages)});
}
