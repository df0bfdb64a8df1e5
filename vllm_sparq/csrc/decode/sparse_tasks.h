// How a decode op that reads few tokens is divided over threads.
#pragma once

#include "decode/dense.h"

namespace sparq {

// Runs all tasks of `op`, which has a `call` and a `read` that says which contexts are read densely. A whole context is
// one `Part::run_whole`; the parts of a cut one are a `run` each and, when all are there, one `Part::merge` of the
// first. `Part::place` gives every part what it works in; `memory` for dense reads.
template <class Part, class Op>
void run_tasks(const Op& op) {
  thread_local std::vector<Task> tasks;
  thread_local std::vector<Part> kept;
  thread_local Scratch scratch;
  const Decode& call = op.call;
  plan_tasks(call.requests, call.pages.n_kv_heads, call.pages.block_size, omp_get_max_threads(), tasks);
  Part::place(op, tasks, scratch, kept);
  const Task* const task = tasks.data();
  Part* const parts = kept.data();
  const int n_tasks = (int)tasks.size();
#pragma omp parallel num_threads(team_size(tasks.size()))
  {
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n_tasks; ++i) {
      const int len = call.requests.lens[task[i].request];
      if (op.read.is_dense(len)) attend_part(call, task[i], parts[i].memory);
      else if (task[i].n_parts == 1) Part::run_whole(op, task[i], len);
      else parts[i].run(op, task[i], len);
    }
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n_tasks; ++i) {
      const int len = call.requests.lens[task[i].request];
      if (task[i].n_parts == 1) continue;
      if (op.read.is_dense(len)) finish_part(call, task[i], parts[i].memory);
      else if (task[i].part == 0) Part::merge(op, task[i], len, parts + i);
    }
  }
  for (int b = 0; b < call.requests.n; ++b)
    if (call.requests.lens[b] == 0) call.zero_out(b);
}

}  // namespace sparq
