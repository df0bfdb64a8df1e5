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

// Attention over the tokens listed, in ascending order.
void attend_tokens(const Decode& call, const Group& group, const State& state, const Sequence& sequence,
                   const int32_t* tokens, int n);

}  // namespace sparq
