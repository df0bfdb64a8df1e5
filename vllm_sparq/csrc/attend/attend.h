// Softmax attention of one query group over any set of tokens, a tile at a time, with running maxima (flash attention).
#pragma once

#include "base/paged.h"
#include "base/scratch.h"

namespace sparq {

// The heads of one query group as the kernels for codes want them. What comes after `whole` is null where K is not
// multiplied by pairs.
struct CodesQuery {
  float* whole;    // [n_heads, stride]
  int32_t* pairs;  // [n_heads, n_pairs] of bf16, or of multiples of the unit of a group, in the order of the codes of K
  float* sums;     // [n_heads, D/g] over the channels of a group
  float* rests;    // [n_heads, D/g] middle code times what those multiples lack of the sums
  float* units;    // [n_heads, D/g]
  int stride, n_pairs, n_groups;
};

// The heads of one query group, in the type that the kernel multiplies.
struct Group {
  const void* query;  // [n_heads, D]
  int n_heads;
  int head_size;
  float scale, soft_cap;
  CodesQuery codes;  // quantized formats only
};

// Caps n logits, readable to n rounded up to 16, where the model does; returns what they are still to be multiplied
// with.
float cap_logits(const Group& group, float* logits, int n);

// What attention has seen so far: out[h] = acc[h] / total[h], base 2 logits relative to peak[h].
struct State {
  float* acc;               // [n_heads, D]
  float* peak;              // [n_heads]
  float* total;             // [n_heads]
  float* logits = nullptr;  // [n_heads, stride], where those of the next tokens are to be kept, base 2; or null
  size_t stride = 0;

  State after(int n_tokens) const {
    State next = *this;
    if (logits != nullptr) next.logits += n_tokens;
    return next;
  }
  static size_t n_floats(int n_heads, int head_size) { return round_up((size_t)n_heads * (head_size + 2), 16); }
  static State in(float* memory, int n_heads, int head_size) {
    float* peak = memory + (size_t)n_heads * head_size;
    return {memory, peak, peak + n_heads, nullptr, 0};
  }
};

void reset(const State& state, int n_heads, int head_size);

// into += from, as if `into` had seen the tokens of both.
void merge(const State& into, const State& from, int n_heads, int head_size);

// Kernels for one element type and head size.
struct AttendKernels {
  // Adds n <= TILE tokens to the state. `rows` points at their records and is readable, with valid records, up to
  // n rounded up to 16, as are the logits that are kept. `ahead` (as many pointers) is prefetched, or null.
  void (*absorb)(const Group&, const State&, const uint8_t* const* rows, int n, const uint8_t* const* ahead);
  // The query row of a head, converted for `Group::query`; `query_bytes` per element.
  void (*load_query)(const void* from, int head_size, void* to);
  int query_bytes;
  // out[d] = weight * acc[d] / total + rest[d], rounded once. `rest` may be null.
  void (*finish)(const float* acc, float total, float weight, const float* rest, int head_size, void* out);
  // to[d] = from[d], a row of the query in fp32.
  void (*widen)(const void* from, int head_size, float* to);
  // logits[h][t] = query[h] . K[t] in fp32, for n tokens rounded up to 16 (as in absorb); rows of logits `stride`
  // apart.
  void (*dot)(const float* query, int n_heads, int head_size, const uint8_t* const* rows, int n, float* logits,
              int stride);
};

AttendKernels attend_kernels(DType dtype, int head_size);

}  // namespace sparq
