#include "decode/dense.h"

#include <algorithm>
#include <cmath>

#include "attend/attention.h"
#include "base/softmax_tile.h"
#include "base/tile.h"

namespace sparq {
namespace {

// Pointers to a tile of records, the last one repeated up to the end, so that a kernel may read whole vectors of
// tokens.
struct Rows {
  const uint8_t* at[TILE];
  int n;

  void pad() { std::fill(at + n, at + TILE, at[n - 1]); }

  // One line of each 4 kB page that the tile spans. Page walks are slow on virtual machines, and they overlap only if
  // they start together: this took 15% off dense reads, and more off gathers.
  void touch(int record_bytes) const {
    int64_t page = -1;
    for (int i = 0; i < n; ++i)
      if (const auto next = (int64_t)(at[i] + record_bytes - 1) >> 12; next != page) prefetch_l2(at[i]), page = next;
  }

  void range(const Sequence& sequence, int first, int last, int record_bytes) {
    n = std::min(TILE, last - first);
    const int block_size = sequence.pages->block_size;
    for (int i = 0; i < n;) {
      const int block = (first + i) / block_size, slot = (first + i) % block_size;
      const int run = sequence.pages->quantized() ? 1 : block_size - slot;  // tokens whose records are neighbours
      const uint8_t* record = sequence.record(block, slot);
      for (const int stop = std::min(n, i + run); i < stop; ++i, record += record_bytes) at[i] = record;
    }
    pad();
  }

  void list(const Sequence& sequence, const int32_t* tokens, int count) {
    n = std::min(TILE, count);
    const unsigned block_size = (unsigned)sequence.pages->block_size;
    for (int i = 0; i < n; ++i) {
      const unsigned token = (unsigned)tokens[i];
      at[i] = sequence.record((int)(token / block_size), (int)(token % block_size));
    }
    pad();
  }
};

}  // namespace

void attend_range(const Decode& call, const Group& group, const State& state, const Sequence& sequence, int first,
                  int last) {
  const int begin = first;
  if (call.pages.quantized()) {
    const int n = call.pages.block_size, stop = std::min((last + n - 1) / n, sequence.newest_block());
    attend_blocks(call.codes, group, state, sequence, first / n, stop);
    first = std::max(first, stop * n);
    if (first >= last) return;
  }
  const int bytes = (int)call.pages.record_bytes();
  Rows rows[3];
  rows[0].range(sequence, first, last, bytes);
  if (first + TILE < last) rows[1].range(sequence, first + TILE, last, bytes);
  for (int i = 0; first < last; first += TILE, ++i) {
    const Rows &now = rows[i % 3], &next = rows[(i + 1) % 3];
    if (first + 2 * TILE < last) {
      rows[(i + 2) % 3].range(sequence, first + 2 * TILE, last, bytes);
      rows[(i + 2) % 3].touch(bytes);
    }
    if (state.logits != nullptr) fetch_attention(sequence, first, now.n);
    call.kernels.absorb(group, state.after(first - begin), now.at, now.n, first + TILE < last ? next.at : nullptr);
  }
}

namespace {

// Tokens of the longest part of a task's context, at most.
int most_tokens(const Decode& call, const Task& task) {
  const int n_blocks = call.pages.n_blocks(call.requests.lens[task.request]);
  return (n_blocks + task.n_parts - 1) / task.n_parts * call.pages.block_size;
}

size_t noted_floats(const Decode& call, const Task& task) {
  return call.pages.adds_attention() ? Noted::n_floats(call.group_size(), most_tokens(call, task)) : 0;
}

// In the memory of a part, after its state.
Noted noted_in(const Decode& call, const Task& task, float* memory) {
  return Noted::in(memory + call.state_floats(), call.group_size(), most_tokens(call, task));
}

// Adds to the attention of a task's tokens, from what all parts of its context have noted; `first` is that of the first
// one.
void add_attention(const Decode& call, const Task& task, float* first) {
  const int n_heads = call.group_size();
  const size_t apart = part_floats(call, task);
  const auto noted = [&](int part) { return noted_in(call, task, first + part * apart); };
  const Noted own = noted(task.part);
  thread_local Scratch scratch;
  float* const factors = scratch.arena().take<float>(n_heads);
  for (int h = 0; h < n_heads; ++h) {
    float peak = own.peaks[h], total = 0;
    for (int part = 0; part < task.n_parts; ++part) peak = std::max(peak, noted(part).peaks[h]);
    for (int part = 0; part < task.n_parts; ++part)
      total += noted(part).totals[h] * std::exp2(noted(part).peaks[h] - peak);
    total += call.logits.sink_weight(task.head * n_heads + h, peak);
    factors[h] = std::exp2(own.peaks[h] - peak) / (total * (float)n_heads);
  }
  add_attention(call.sequence(task.request, task.head), task.first, task.last - task.first, own.logits, own.stride,
                n_heads, factors);
}

// Attention over slots first .. last, few, each by a query of its own; adds to the state.
void attend_turned(const Decode& call, const Group& group, const State& state, const Sequence& sequence, int request,
                   int first, int last, Arena arena) {
  constexpr int LANES = 16;  // of a dot product, though only the first is wanted
  const int n = last - first, d = group.head_size, n_padded = (int)round_up((size_t)n, LANES);
  const auto record = [&](int slot) {
    return sequence.record(slot / sequence.pages->block_size, slot % sequence.pages->block_size);
  };
  float* const weights = arena.take<float>((size_t)group.n_heads * n_padded);
  float* const logits = arena.take<float>((size_t)group.n_heads * LANES);
  float* const value = arena.take<float>(round_up((size_t)d, LANES));
  const uint8_t* rows[LANES];
  for (int i = 0; i < n; ++i) {
    std::fill_n(rows, LANES, record(first + i));
    const float* query = call.turned.at(request, first + i, sequence.head * group.n_heads);
    call.kernels.dot(query, group.n_heads, d, rows, 1, logits, LANES);
    for (int h = 0; h < group.n_heads; ++h) weights[h * n_padded + i] = logits[h * LANES];
  }
  for (int h = 0; h < group.n_heads; ++h) {
    float rescale, *row = weights + (size_t)h * n_padded;
    const float scale = cap_logits(group, row, n) * LOG2_E;
    const float sum = softmax_tile(row, n, n_padded, scale, &state.peak[h], &rescale, row);
    state.total[h] = state.total[h] * rescale + sum;
    scale_row(state.acc + (size_t)h * d, d, rescale);
  }
  for (int i = 0; i < n; ++i) {
    call.kernels.widen(record(first + i) + d * sequence.pages->element_bytes(), d, value);
    for (int h = 0; h < group.n_heads; ++h) {
      float* const acc = state.acc + (size_t)h * d;
      const Vec weight = set1(weights[h * n_padded + i]);
      for (int c = 0; c < d; c += W) store(acc + c, fma(load(value + c), weight, load(acc + c)));
    }
  }
}

void attend_tokens(const Decode& call, const Group& group, const State& state, const Sequence& sequence,
                   Listed listed) {
  auto [tokens, n] = listed;
  if (call.pages.quantized()) {
    const int first_staged = sequence.newest_block() * call.pages.block_size;
    const int n_coded = (int)(std::lower_bound(tokens, tokens + n, first_staged) - tokens);
    attend_coded_tokens(call.codes, group, state, sequence, tokens, n_coded);
    tokens += n_coded, n -= n_coded;
    if (n == 0) return;
  }
  const int bytes = (int)call.pages.record_bytes();
  Rows rows[2];
  rows[0].list(sequence, tokens, n);
  rows[0].touch(bytes);
  for (int i = 0; i < rows[0].n; ++i)
    for (int byte = 0; byte < bytes; byte += 64) prefetch_l2(rows[0].at[i] + byte);
  for (int first = 0, i = 0; first < n; first += TILE, ++i) {
    const Rows& now = rows[i % 2];
    Rows& next = rows[(i + 1) % 2];
    const bool more = first + TILE < n;
    if (more) {
      next.list(sequence, tokens + first + TILE, n - first - TILE);
      next.touch(bytes);
    }
    call.kernels.absorb(group, state, now.at, now.n, more ? next.at : nullptr);
  }
}

}  // namespace

State merged_state(const Decode& call, const Task& first, int n, float* memory) {
  const int n_heads = call.group_size(), d = call.pages.head_size;
  const size_t apart = part_floats(call, first);
  const State state = State::in(memory, n_heads, d);
  for (int part = 1; part < n; ++part) merge(state, State::in(memory + part * apart, n_heads, d), n_heads, d);
  return state;
}

size_t part_floats(const Decode& call, const Task& task) { return call.state_floats() + noted_floats(call, task); }

float* place_part(const Decode& call, const Task& task, float* before, Arena& arena) {
  const size_t n = part_floats(call, task);
  return task.part == 0 ? arena.take<float>(task.n_parts * n) : before + n;
}

void attend_part(const Decode& call, const Task& task, float* memory) {
  thread_local Scratch scratch;
  const bool whole = task.n_parts == 1;
  const size_t n_floats = whole ? part_floats(call, task) : 0;
  Arena arena = scratch.arena();
  const Group group = call.group(task.request, task.head, arena);
  if (whole) memory = arena.take<float>(n_floats);
  State state = call.new_state(memory);
  const Sequence sequence = call.sequence(task.request, task.head);
  if (!call.pages.adds_attention()) {
    const int stop = std::min(task.last, std::max(task.first, call.turned.n));
    if (task.first < stop) attend_turned(call, group, state, sequence, task.request, task.first, stop, arena);
    if (stop < task.last) attend_range(call, group, state, sequence, stop, task.last);
  } else {
    const Noted noted = noted_in(call, task, memory);
    state.logits = noted.logits, state.stride = noted.stride;
    attend_range(call, group, state, sequence, task.first, task.last);
    noted.weigh(state.peak, task.last - task.first);
    if (whole) add_attention(call, task, memory);
  }
  if (whole) call.finish(task.request, task.head, state, nullptr, nullptr);
}

void finish_part(const Decode& call, const Task& task, float* memory) {
  if (call.pages.adds_attention()) add_attention(call, task, memory - task.part * part_floats(call, task));
  if (task.part > 0) return;
  call.finish(task.request, task.head, merged_state(call, task, task.n_parts, memory), nullptr, nullptr);
}

void attend_all(const Decode& call) {
  thread_local std::vector<Task> tasks;
  thread_local std::vector<size_t> ends;  // of the memory of each task, in floats
  thread_local Scratch scratch;
  plan_tasks(call.requests, call.pages.n_kv_heads, call.pages.block_size, omp_get_max_threads(), tasks);
  ends.assign(1, 0);
  for (const Task& task : tasks) ends.push_back(ends.back() + (task.n_parts > 1 ? part_floats(call, task) : 0));
  float* const memory = scratch.arena().take<float>(ends.back());
  const size_t* const at = ends.data();
  const Task* const task = tasks.data();
  const int n_tasks = (int)tasks.size();
#pragma omp parallel num_threads(team_size(tasks.size()))
  {
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n_tasks; ++i) attend_part(call, task[i], memory + at[i]);
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n_tasks; ++i)
      if (task[i].n_parts > 1) finish_part(call, task[i], memory + at[i]);
  }
  for (int b = 0; b < call.requests.n; ++b)
    if (call.requests.lens[b] == 0) call.zero_out(b);
}

State attend_listed(const Decode& call, const Task& task, Listed listed, float* memory) {
  thread_local Scratch scratch;
  Arena arena = scratch.arena();
  const Group group = call.group(task.request, task.head, arena);
  const State state = call.new_state(memory);
  attend_tokens(call, group, state, call.sequence(task.request, task.head), listed);
  return state;
}

void attend_piece(const Decode& call, const Task& task, Listed all, float* memory) {
  const int n = all.n_pieces(task);
  if (task.part < n) attend_listed(call, task, all.piece(task.part, n), memory);
}

}  // namespace sparq
