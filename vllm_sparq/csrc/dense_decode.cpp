// vllm_sparq/ops/dense_decode: attention of one new token per request over all its pages.
#include "api.h"
#include "decode/dense.h"

namespace sparq {
namespace {

void dense_decode(const Decode& call) {
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

}  // namespace
}  // namespace sparq

SPARQ_API void sparq_dense_decode(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& out,
                                  const sparq::Requests& requests, const sparq::Logits& logits) {
  sparq::dense_decode(sparq::decode_call(pages, requests, query, out, logits));
}
