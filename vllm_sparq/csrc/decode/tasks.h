// How the contexts of a decode call are divided over threads.
#pragma once

#include <omp.h>

#include <vector>

#include "base/paged.h"

namespace sparq {

// Tokens first .. last of one KV head of one request: part `part` of `n_parts` neighbours in the plan.
struct Task {
  int request, head, first, last, part, n_parts;
};

// All (request, KV head) pairs, long contexts cut so that the threads have about equal work. Requests without tokens
// have no task. The same lengths and threads give the same tasks, so results do not depend on timing. All requests come
// one after the other before the next KV head: those that share a prompt then find its pages in the cache (SparQ, eight
// requests over one context of 64k: 0.87 of the time).
void plan_tasks(const Requests& requests, int n_kv_heads, int block_size, int n_threads, std::vector<Task>& tasks);

// Threads for this many tasks: one, or all. Of a smaller team libgomp would end the threads that are not in it, and
// start them anew for the next parallel region, torch's as well as ours.
inline int team_size(size_t n_tasks) { return n_tasks > 1 ? omp_get_max_threads() : 1; }

}  // namespace sparq
