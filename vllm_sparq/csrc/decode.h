// What the decode ops share: the arguments of a call, its division into tasks, and dense attention over a range of tokens.
#pragma once

#include <omp.h>

#include <vector>

#include "attend.h"
#include "attend_codes.h"
#include "paged.h"
#include "attention.h"
#include "scratch.h"

namespace sparq {

// The tensors of a decode call; byte addresses, so that only the kernels know the element type.
struct Decode {
  const Pages& pages;
  Requests requests;
  Heads<const uint8_t> query;  // strides in bytes
  Heads<uint8_t> out;
  int n_heads;  // H
  float scale;
  AttendKernels kernels;
  CodeKernels codes;  // quantized formats only

  int group_size() const { return n_heads / pages.n_kv_heads; }
  size_t group_bytes() const {
    return Arena::room<uint8_t>((size_t)group_size() * pages.head_size * kernels.query_bytes) +
           (pages.quantized() ? codes.query_bytes(group_size()) : 0);
  }
  size_t state_floats() const { return State::n_floats(group_size(), pages.head_size); }
  size_t state_bytes() const { return state_floats() * sizeof(float); }
  State new_state(float* memory) const;
  Sequence sequence(int request, int head) const {
    return {&pages, requests.blocks(request), head, requests.lens[request]};
  }

  // The query group of a KV head, in group_bytes() of the arena.
  Group group(int request, int head, Arena& arena) const;
  // Rounds the outputs of a query group; weights [H/G] and rest [D] as in AttendKernels::finish, null for 1 and 0.
  void finish(int request, int head, const State& state, const float* weights, const float* rests) const;
  void zero_out(int request) const;
};

Decode decode_call(const Pages& pages, const Requests& requests, const Tensor& query, const Tensor& out, float scale);

// Tokens first .. last of one KV head of one request: part `part` of `n_parts` neighbours in the plan.
struct Task {
  int request, head, first, last, part, n_parts;
};

// What a part of a context leaves behind for the others: its state, and its logits where pages add up attention; those of one
// context need the same room.
size_t part_floats(const Decode& call, const Task& task);

// All (request, KV head) pairs, long contexts cut so that the threads have about equal work. Requests without tokens have
// no task. The same lengths and threads give the same tasks, so results do not depend on timing.
void plan_tasks(const Requests& requests, int n_kv_heads, int block_size, int n_threads, std::vector<Task>& tasks);

// Threads worth waking for this many tasks.
inline int team_size(size_t n_tasks) {
  const int n = omp_get_max_threads();
  return n_tasks < (size_t)n ? (int)(n_tasks > 0 ? n_tasks : 1) : n;
}

// Dense attention over tokens first .. last.
void attend_range(const Decode& call, const Group& group, const State& state, const Sequence& sequence, int first,
                  int last);

// Dense attention over one task. A whole context is finished; what a part leaves goes to `memory`, part_floats().
void attend_part(const Decode& call, const Task& task, float* memory);

// What is left to do for a part when all parts of its context are there: the first one finishes it, and each adds to the
// attention of its tokens. `memory` is that of the part; those of the others lie part_floats() apart.
void finish_part(const Decode& call, const Task& task, float* memory);

// Attention over the tokens listed, in ascending order.
void attend_tokens(const Decode& call, const Group& group, const State& state, const Sequence& sequence,
                   const int32_t* tokens, int n);

}  // namespace sparq
