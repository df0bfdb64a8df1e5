// vllm_sparq/ops/dense_decode: attention of one new token per request over all its pages.
#include "decode.h"

namespace sparq {
namespace {

// States of the parts of cut contexts, and a private one and the query for each thread.
void attend_task(const Decode& call, const Task& task, float* part_state) {
  thread_local Scratch scratch;
  scratch.reserve(call.query_bytes() + call.state_floats() * sizeof(float));
  const Group group = call.group(task.request, task.head, scratch.take<uint8_t>(call.query_bytes()));
  const bool whole = task.n_parts == 1;
  const State state = call.new_state(whole ? scratch.take<float>(call.state_floats()) : part_state);
  attend_range(call, group, state, call.sequence(task.request, task.head), task.first, task.last);
  if (whole) call.finish(task.request, task.head, state, nullptr, nullptr);
}

void merge_parts(const Decode& call, const Task* task, float* part_states) {
  const State state = State::in(part_states, call.group_size(), call.pages.head_size);
  for (int part = 1; part < task->n_parts; ++part) {
    float* memory = part_states + part * call.state_floats();
    merge(state, State::in(memory, call.group_size(), call.pages.head_size), call.group_size(), call.pages.head_size);
  }
  call.finish(task->request, task->head, state, nullptr, nullptr);
}

void dense_decode(const Decode& call) {
  thread_local std::vector<Task> tasks;
  thread_local Scratch scratch;
  plan_tasks(call.requests, call.pages.n_kv_heads, call.pages.block_size, omp_get_max_threads(), tasks);
  scratch.reserve(tasks.size() * call.state_floats() * sizeof(float));
  float* const states = scratch.take<float>(tasks.size() * call.state_floats());
  const Task* const task = tasks.data();
  const int n_tasks = (int)tasks.size();
#pragma omp parallel num_threads(team_size(tasks.size()))
  {
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n_tasks; ++i) attend_task(call, task[i], states + i * call.state_floats());
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n_tasks; ++i)
      if (task[i].part == 0 && task[i].n_parts > 1) merge_parts(call, task + i, states + i * call.state_floats());
  }
  for (int b = 0; b < call.requests.n; ++b)
    if (call.requests.lens[b] == 0) call.zero_out(b);
}

}  // namespace
}  // namespace sparq

SPARQ_API void sparq_dense_decode(const sparq::Pages* pages, const void* query, int64_t query_row, int64_t query_head,
                                  void* out, int64_t out_row, int64_t out_head, int32_t n_requests, int32_t n_heads,
                                  const int32_t* block_table, int64_t table_stride, const int32_t* seq_lens,
                                  float scale) {
  const sparq::Requests requests{block_table, table_stride, seq_lens, n_requests};
  sparq::dense_decode(sparq::decode_call(*pages, requests, query, query_row, query_head, out, out_row, out_head,
                                         n_heads, scale));
}
