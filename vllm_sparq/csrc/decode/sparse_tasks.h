// How a decode op that reads few tokens is divided over threads.
#pragma once

#include <algorithm>

#include "decode/dense.h"

namespace sparq {

// Runs all tasks of `op`, which has a `call` and a `read` that says which contexts are read densely. A whole context is
// one `Part::run_whole`. The parts of a cut one are a `run` each; when all are there, a `Part::choose` of the first
// says which tokens are read; each part attends to a piece of them, and a `Part::finish` of the first ends it.
// `Part::place` gives every part what it works in, its `memory` for the state among it.
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
  const bool cut = std::any_of(tasks.begin(), tasks.end(), [](const Task& one) { return one.n_parts > 1; });
  const auto is_sparse_part = [&](const Task& one) {
    return one.n_parts > 1 && !op.read.is_dense(call.requests.lens[one.request]);
  };
#pragma omp parallel num_threads(team_size(tasks.size()))
  {
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n_tasks; ++i) {
      const int len = call.requests.lens[task[i].request];
      if (op.read.is_dense(len)) attend_part(call, task[i], parts[i].memory);
      else if (task[i].n_parts == 1) Part::run_whole(op, task[i], len);
      else parts[i].run(op, task[i], len);
    }
    if (cut) {
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < n_tasks; ++i) {
        if (task[i].n_parts == 1) continue;
        if (!is_sparse_part(task[i])) finish_part(call, task[i], parts[i].memory);
        else if (task[i].part == 0) parts[i].chosen = Part::choose(op, task[i], parts + i);
      }
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < n_tasks; ++i)
        if (is_sparse_part(task[i])) attend_piece(call, task[i], parts[i - task[i].part].chosen, parts[i].memory);
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < n_tasks; ++i) {
        if (!is_sparse_part(task[i]) || task[i].part > 0) continue;
        const int n = parts[i].chosen.n_pieces(task[i]);
        Part::finish(op, task[i], parts + i, merged_state(call, task[i], n, parts[i].memory));
      }
    }
  }
  for (int b = 0; b < call.requests.n; ++b)
    if (call.requests.lens[b] == 0) call.zero_out(b);
}

}  // namespace sparq
