// Dense attention over part of a context, or over listed tokens: what every decode op ends in.
#pragma once

#include "decode/call.h"
#include "decode/tasks.h"

namespace sparq {

// What a part of a context leaves behind for the others: its state, and its logits where pages add up attention; those
// of one context need the same room.
size_t part_floats(const Decode& call, const Task& task);

// The memory of a part: after that of the part `before` it, or with room for all of its context.
float* place_part(const Decode& call, const Task& task, float* before, Arena& arena);

// Dense attention over tokens first .. last.
void attend_range(const Decode& call, const Group& group, const State& state, const Sequence& sequence, int first,
                  int last);

// Dense attention over one task. A whole context is finished; what a part leaves goes to `memory`, part_floats().
void attend_part(const Decode& call, const Task& task, float* memory);

// What is left to do for a part when all parts of its context are there: the first one finishes it, and each adds to
// the attention of its tokens. `memory` is that of the part; those of the others lie part_floats() apart.
void finish_part(const Decode& call, const Task& task, float* memory);

// Dense attention of every request over all its tokens.
void attend_all(const Decode& call);

// Tokens of a context that are read, in ascending order. Those of a cut context are attended to in as many pieces as it
// has parts, unless a piece would not be worth a merge.
struct Listed {
  const int32_t* tokens = nullptr;
  int n = 0;

  int n_pieces(const Task& task) const { return std::max(1, std::min(task.n_parts, n / LEAST_PIECE)); }
  Listed piece(int i, int n_pieces) const {
    const int first = (int)((int64_t)n * i / n_pieces), last = (int)((int64_t)n * (i + 1) / n_pieces);
    return {tokens + first, last - first};
  }

 private:
  static constexpr int LEAST_PIECE = 256;
};

// The state of attention over the tokens listed; `memory` holds it.
State attend_listed(const Decode& call, const Task& task, Listed listed, float* memory);

// The same of a part's piece of all tokens that are listed, where there is one.
void attend_piece(const Decode& call, const Task& task, Listed all, float* memory);

// The states that the first n parts of a context have left, as if one had seen the tokens of all; `memory` is that of
// the first.
State merged_state(const Decode& call, const Task& first, int n, float* memory);

}  // namespace sparq
