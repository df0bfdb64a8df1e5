#include "decode/tasks.h"

#include <algorithm>

namespace sparq {
namespace {

constexpr int MIN_PART = 512;        // tokens; less is not worth a merge
constexpr int PARTS_PER_THREAD = 4;  // so that no thread waits long for the last part

}  // namespace

void plan_tasks(const Requests& requests, int n_kv_heads, int block_size, int n_threads, std::vector<Task>& tasks) {
  int64_t n_tokens = 0;
  for (int b = 0; b < requests.n; ++b) n_tokens += requests.lens[b];
  const int64_t share = n_tokens * n_kv_heads / (PARTS_PER_THREAD * n_threads) + 1;
  const int part_blocks = (int)((std::max<int64_t>(share, MIN_PART) + block_size - 1) / block_size);
  tasks.clear();
  for (int head = 0; head < n_kv_heads; ++head)
    for (int b = 0; b < requests.n; ++b) {
      const int len = requests.lens[b], n_blocks = (len + block_size - 1) / block_size;
      const int n_parts = (n_blocks + part_blocks - 1) / part_blocks;
      for (int part = 0; part < n_parts; ++part) {
        const int first = (int)((int64_t)n_blocks * part / n_parts) * block_size;
        const int last = (int)((int64_t)n_blocks * (part + 1) / n_parts) * block_size;
        tasks.push_back({b, head, first, std::min(last, len), part, n_parts});
      }
    }
}

}  // namespace sparq
