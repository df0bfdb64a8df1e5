// Attention over tokens of full quantized blocks, straight from their codes.
#pragma once

#include "attend/attend.h"
#include "codes/code_rows.h"

namespace sparq {

// Two matrix products with codes, for any number of heads:
// logits[h][t] = q[h] . row t, for n rows rounded up to 16. (Of the rows, n are read.)
using DotCodes = void (*)(const CodeShape&, const CodesQuery&, int n_heads, const CodeRows&, float* logits, int stride,
                          Ahead&);
// out[h] += sum over rows i of x[h][i] row i. x is readable, of any content, up to 16 beyond its end.
using MixCodes = void (*)(const CodeShape&, const CodeRows&, const float* x, int x_stride, int n_heads, float* out,
                          int out_stride, Ahead&);

// The kernels for the pages of a layer.
struct CodeKernels {
  CodeShape key, value;
  DotCodes dot;       // K, where its rows are tokens
  MixCodes mix_keys;  // K, where its rows are channels
  MixCodes mix_values;
  void (*decode_column)(const Pages&, const uint8_t* page, int slot, float* to);  // one token of channel-major K
  // From rows of fp32 in query.whole, what else `dot` wants of the query; null where that is all.
  void (*pair_query)(const CodeShape& key, const CodesQuery& query, int n_heads);

  static CodeKernels of(const Pages& pages);
  // From rows of fp32 already in query.whole.
  CodesQuery new_query(int n_heads, Arena& arena) const;
  void prepare(const CodesQuery& query, int n_heads) const;
};

// Adds the tokens of full blocks first_block .. last_block to the state.
void attend_blocks(const CodeKernels& kernels, const Group& group, const State& state, const Sequence& sequence,
                   int first_block, int last_block);

// Adds tokens of full blocks, ascending.
void attend_coded_tokens(const CodeKernels& kernels, const Group& group, const State& state, const Sequence& sequence,
                         const int32_t* tokens, int n);

}  // namespace sparq
