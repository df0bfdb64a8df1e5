#include "decode/call.h"

#include <algorithm>

namespace sparq {

Decode decode_call(const Pages& pages, const Requests& requests, const Tensor& query, const Tensor& out,
                   const Logits& logits) {
  const auto bytes = (int64_t)pages.element_bytes();
  return {pages,
          requests,
          Heads<const uint8_t>(query, bytes),
          Heads<uint8_t>(out, bytes),
          query.n_heads,
          logits,
          attend_kernels(pages.dtype, pages.head_size),
          pages.quantized() ? CodeKernels::of(pages) : CodeKernels{}};
}

State Decode::new_state(float* memory) const {
  const State state = State::in(memory, group_size(), pages.head_size);
  reset(state, group_size(), pages.head_size);
  return state;
}

Group Decode::group(int request, int head, Arena& arena) const {
  const size_t row_bytes = (size_t)pages.head_size * kernels.query_bytes;
  auto* memory = arena.take<uint8_t>(group_size() * row_bytes);
  for (int h = 0; h < group_size(); ++h)
    kernels.load_query(query.at(request, head * group_size() + h), pages.head_size, memory + h * row_bytes);
  Group group{memory, group_size(), pages.head_size, logits.scale, logits.soft_cap, {}};
  if (pages.quantized()) {
    group.codes = codes.new_query(group_size(), arena);
    for (int h = 0; h < group_size(); ++h)
      kernels.widen(query.at(request, head * group_size() + h), pages.head_size,
                    group.codes.whole + (size_t)h * group.codes.stride);
    codes.prepare(group.codes, group_size());
  }
  return group;
}

void Decode::finish(int request, int head, const State& state, const float* weights, const float* rests) const {
  const int d = pages.head_size;
  for (int h = 0; h < group_size(); ++h) {
    const int query_head = head * group_size() + h;
    const float total = state.total[h] + logits.sink_weight(query_head, state.peak[h]);
    kernels.finish(state.acc + (size_t)h * d, total, weights ? weights[h] : 1.0f,
                   rests ? rests + (size_t)h * d : nullptr, d, out.at(request, query_head));
  }
}

void Decode::zero_out(int request) const {
  const size_t row_bytes = pages.head_size * pages.element_bytes();
  for (int h = 0; h < n_heads; ++h) std::fill_n(out.at(request, h), row_bytes, uint8_t{0});
}

}  // namespace sparq
