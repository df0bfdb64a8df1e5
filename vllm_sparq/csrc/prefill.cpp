// Prefill: causal attention of the new tokens over [cached pages ; new tokens], without an S x S tensor.
//
// A task is a range of query rows of one request and KV head (all query heads of the group, so a tile of tokens that
// was packed once serves them all) against a range of its tokens. Few long tasks are cut along the tokens and merged.
// Where pages add up attention there is a second pass, a tile of tokens at a time: no two threads add to one number.
#include <omp.h>

#include <cmath>
#include <vector>

#include "api.h"
#include "base/scratch.h"
#include "prefill/tokens.h"

namespace sparq::prefill {
namespace {

constexpr int MAX_VECS = 30;  // rows of a task, in vectors

// The same for a head size: query and output, 6 or 8 bytes an element, stay in half of L2.
template <class T>
int max_vecs(int head_size) {
  constexpr int PANELS = MAX_VECS / Model<T>::panel_vecs;
  return std::clamp(PANELS * 128 / head_size, 1, PANELS) * Model<T>::panel_vecs;
}

template <class T>
struct Call {
  Heads<const T> query, key, value;
  Heads<T> out;
  const Pages* pages;
  Requests requests;               // lens: context
  const int32_t* query_start_loc;  // [B + 1]
  const int32_t* key_start_loc;    // [B + 1]
  int n_heads;
  Logits logits;
  float* lses;  // null, or of every row the logarithm (base 2) of the sum over its tokens, where pages add it up

  int head_size() const { return pages->head_size; }
  ScaleAndCap scale_and_cap() const { return {logits.scale * LOG2_E, logits.soft_cap * LOG2_E}; }
  int group() const { return n_heads / pages->n_kv_heads; }
  int n_new(int request) const { return query_start_loc[request + 1] - query_start_loc[request]; }
  // Tokens that a request brings without a query, before those that have one.
  int n_begun(int request) const { return key_start_loc[request + 1] - key_start_loc[request] - n_new(request); }
  // Tokens before the first query.
  int n_before(int request) const { return requests.lens[request] + n_begun(request); }
  float* lses_of(int request, int kv_head) const {
    const int64_t rows_before = (int64_t)(query_start_loc[request] - query_start_loc[0]) * n_heads;
    return lses + rows_before + (int64_t)kv_head * n_new(request) * group();
  }
};

// Sums of `rows` rows over a part of the tokens.
struct Partial {
  float *output, *tops, *sums;

  Partial(float* memory, int rows, int head_size)
      : output(memory), tops(memory + (ptrdiff_t)rows * head_size), sums(tops + rows) {}
  static size_t floats(int rows, int head_size) { return (size_t)rows * (head_size + 2); }
};

struct Task {
  int request, kv_head;
  int first_row, n_rows;
  int first_tile, end_tile;
  int part;  // slot of its Partial; -1: the whole, written to out
  int64_t cost;

  int n_vecs() const { return (n_rows + W - 1) / W; }
};

struct Merge {
  Task rows;
  int first_part, n_parts;
};

// A tile of tokens that get attention.
struct AttentionTask {
  int request, kv_head, tile;
};

struct Plan {
  std::vector<Task> tasks;
  std::vector<Merge> merges;
  std::vector<AttentionTask> attention;
  int n_parts;
};

template <class T>
RowRange row_range(const Call<T>& call, const Task& task) {
  const int group = call.group();
  return {call.query_start_loc[task.request], task.kv_head * group, group, task.first_row, task.n_rows};
}

// Tiles of a request, up to its n-th query: of the pages first, then of what it brings; none holds both.
template <class T>
int n_tiles(const Call<T>& call, int request, int n) {
  constexpr int TILE = Model<T>::tile;
  return (call.requests.lens[request] + TILE - 1) / TILE + (call.n_begun(request) + n + TILE - 1) / TILE;
}

// f(panel index, first vector, vectors): as few panels as possible, of even widths.
template <class T, class F>
void each_panel(int n_vecs, F&& f) {
  constexpr int MOST = Model<T>::panel_vecs;
  const int n_panels = (n_vecs + MOST - 1) / MOST;
  for (int i = 0, first = 0; i < n_panels; ++i) {
    const int nv = n_vecs / n_panels + (i < n_vecs % n_panels);
    f(i, first, nv);
    first += nv;
  }
}

// Every (request, KV head, range of rows), whole.
template <class T>
void whole_tasks(const Call<T>& call, int threads, std::vector<Task>& tasks) {
  int64_t total_rows = 0;
  const int group = call.group(), n_kv_heads = call.pages->n_kv_heads;
  for (int b = 0; b < call.requests.n; ++b) total_rows += (int64_t)call.n_new(b) * call.n_heads;
  constexpr int PANEL = Model<T>::panel_vecs;
  const int64_t wanted = total_rows / (4 * threads) / (W * PANEL) * PANEL;
  const int rows = W * (int)std::clamp<int64_t>(wanted, PANEL, max_vecs<T>(call.head_size()));
  tasks.clear();
  for (int b = 0; b < call.requests.n; ++b) {
    const int n_rows = call.n_new(b) * group;
    for (int head = 0; head < n_kv_heads; ++head) {
      for (int first = 0; first < n_rows; first += rows) {
        Task task{b, head, first, std::min(rows, n_rows - first), 0, 0, -1, 0};
        const int n_new = (first + task.n_rows - 1) / group + 1;
        task.end_tile = n_tiles(call, b, n_new);
        task.cost = (int64_t)(call.n_before(b) + n_new) * (task.n_vecs() + 1);  // + 1: reading and packing
        tasks.push_back(task);
      }
    }
  }
}

// Cuts tasks along the tokens where one would be more than half of a thread's share, and puts long ones first.
void balance(Plan& plan, int threads) {
  int64_t total = 0;
  for (const Task& task : plan.tasks) total += task.cost;
  const int64_t share = std::max<int64_t>(total / (2 * threads), 1);
  plan.merges.clear();
  plan.n_parts = 0;
  const size_t n_whole = threads == 1 ? 0 : plan.tasks.size();
  for (size_t i = 0; i < n_whole; ++i) {
    const Task whole = plan.tasks[i];
    const int parts = (int)std::min<int64_t>((whole.cost + share - 1) / share, whole.end_tile);
    if (parts < 2) continue;
    plan.merges.push_back({whole, plan.n_parts, parts});
    for (int p = 0; p < parts; ++p) {
      Task part = whole;
      part.first_tile = (int)((int64_t)whole.end_tile * p / parts);
      part.end_tile = (int)((int64_t)whole.end_tile * (p + 1) / parts);
      part.cost = whole.cost / parts;
      part.part = plan.n_parts++;
      p == 0 ? void(plan.tasks[i] = part) : plan.tasks.push_back(part);
    }
  }
  std::stable_sort(plan.tasks.begin(), plan.tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
}

// The buffers of a thread, all in one allocation.
template <class T>
class Buffers {
 public:
  explicit Buffers(const Pages& pages) : Buffers(pages, scratch().arena()) {}

  float *query, *staging, *scores, *partial;
  TileLoader<T> loader;

 private:
  static constexpr int PANEL = Model<T>::panel_vecs;
  static size_t n_query(int d) { return (size_t)MAX_VECS * W * Model<T>::key_size(d); }
  static size_t n_staging(int d) { return (size_t)PANEL * W * Model<T>::key_size(d); }
  static constexpr size_t N_SCORES = (size_t)Model<T>::tile * PANEL * W;
  static size_t n_partial(int d) { return Partial::floats(MAX_VECS * W, d); }

  static Scratch& scratch() {
    static thread_local Scratch of_thread;
    return of_thread;
  }

  Buffers(const Pages& pages, Arena arena)
      : query(arena.take<float>(n_query(pages.head_size))),
        staging(arena.take<float>(n_staging(pages.head_size))),
        scores(arena.take<float>(N_SCORES)),
        partial(arena.take<float>(n_partial(pages.head_size))),
        loader(pages, arena) {}
};

// The panels of a task over one Partial, queries packed and nothing seen yet.
template <class T>
int open_panels(const Call<T>& call, const Task& task, const Buffers<T>& buffers, Partial partial, int32_t* limits,
                Panel* panels) {
  const int d = call.head_size(), rows = task.n_vecs() * W, group = call.group();
  const RowRange range = row_range(call, task);
  for (int r = 0; r < rows; ++r) {
    limits[r] = call.n_before(task.request) + (task.first_row + std::min(r, task.n_rows - 1)) / group + 1;
  }
  std::fill_n(partial.output, (ptrdiff_t)rows * d, 0.0f);
  std::fill_n(partial.tops, rows, NOTHING_SEEN);
  std::fill_n(partial.sums, rows, 0.0f);
  int n = 0;
  each_panel<T>(task.n_vecs(), [&](int i, int first_vec, int nv) {
    const int first = first_vec * W;
    float* const query = buffers.query + (ptrdiff_t)first * Model<T>::key_size(d);
    pack_query<T>(range, call.query, d, first, nv * W, buffers.staging, query);
    panels[i] = {
        nv, query, limits + first, partial.output + (ptrdiff_t)first * d, partial.tops + first, partial.sums + first};
    n = i + 1;
  });
  return n;
}

template <class T>
void close_panels(const Call<T>& call, const Task& task, const Buffers<T>& buffers, Partial partial) {
  const RowRange range = row_range(call, task);
  const int d = call.head_size(), group = call.group();
  for (int r = 0; call.logits.sinks != nullptr && r < task.n_rows; ++r)
    partial.sums[r] += call.logits.sink_weight(task.kv_head * group + (task.first_row + r) % group, partial.tops[r]);
  each_panel<T>(task.n_vecs(), [&](int, int first_vec, int nv) {
    const int first = first_vec * W;
    const Panel panel{
        nv, nullptr, nullptr, partial.output + (ptrdiff_t)first * d, partial.tops + first, partial.sums + first};
    emit<T>(range, call.out, d, first, panel, buffers.staging);
  });
  if (call.lses == nullptr) return;
  float* const lses = call.lses_of(task.request, task.kv_head) + task.first_row;
  for (int r = 0; r < task.n_rows; ++r) lses[r] = partial.tops[r] + std::log2(partial.sums[r]);
}

// Tile t of a request and KV head, of which `seen` new tokens are wanted.
template <class T>
Tile load_tile(const Call<T>& call, TileLoader<T>& loader, const Sequence& sequence, int request, int t, int seen) {
  constexpr int TILE = Model<T>::tile;
  const int context = call.requests.lens[request], context_tiles = (context + TILE - 1) / TILE;
  if (t < context_tiles) return loader.load(sequence, t * TILE, std::min(TILE, context - t * TILE));
  const int first = (t - context_tiles) * TILE;
  return loader.load(call.key, call.value, sequence.head, call.key_start_loc[request] + first, context + first,
                     std::min(TILE, seen - first));
}

template <class T>
void run_task(const Call<T>& call, const Task& task, float* parts) {
  using M = typename Model<T>::M;
  constexpr int TILE = Model<T>::tile;
  const int d = call.head_size(), rows = task.n_vecs() * W;
  Buffers<T> buffers(*call.pages);
  float* const memory =
      task.part < 0 ? buffers.partial : parts + task.part * (ptrdiff_t)Partial::floats(MAX_VECS * W, d);
  const Partial partial(memory, rows, d);
  alignas(64) int32_t limits[MAX_VECS * W];
  Panel panels[MAX_VECS];
  const int n_panels = open_panels(call, task, buffers, partial, limits, panels);

  const Sequence sequence{call.pages, call.requests.blocks(task.request), task.kv_head};
  const int context = call.requests.lens[task.request], context_tiles = (context + TILE - 1) / TILE;
  const int seen = limits[rows - 1] - context;  // of the tokens that are not in pages
  const ScaleAndCap logits = call.scale_and_cap();
  TileLoader<T>& loader = buffers.loader;
  for (int t = task.first_tile; t < task.end_tile; ++t) {
    const Tile tile = load_tile(call, loader, sequence, task.request, t, seen);
    const int next = (t + 1) * TILE;
    const Ahead ahead = t + 1 < std::min(task.end_tile, context_tiles)
                            ? loader.ahead(sequence, next, std::min(TILE, context - next))
                            : Ahead{};
    for (int p = 0; p < n_panels; ++p)
      with_width<Model<T>::panel_vecs>(panels[p].nv, [&](auto nv) {
        attend<nv, Model<T>::degree>(M{}, panels[p], tile, d, logits, M::share(ahead, p, n_panels), buffers.scores);
      });
  }
  if (task.part < 0) close_panels(call, task, buffers, partial);
}

// Adds the parts of some rows up in the first of them, each weighted by how far its maximum is below the common one.
template <class T>
void run_merge(const Call<T>& call, const Merge& merge, float* parts) {
  const int d = call.head_size(), rows = merge.rows.n_vecs() * W;
  const size_t slot = Partial::floats(MAX_VECS * W, d);
  parts += merge.first_part * slot;
  const Partial sum(parts, rows, d);
  for (int i = 1; i < merge.n_parts; ++i) {
    const Partial part(parts + i * slot, rows, d);
    each_panel<T>(merge.rows.n_vecs(), [&](int, int first_vec, int nv) {
      for (int v = 0; v < nv; ++v) {
        const int r = (first_vec + v) * W;
        const Vec a = load(sum.tops + r), b = load(part.tops + r), top = max(a, b);
        const Vec of_a = exp2_negative<6>(sub(a, top)), of_b = exp2_negative<6>(sub(b, top));
        store(sum.tops + r, top);
        store(sum.sums + r, fma(load(part.sums + r), of_b, mul(load(sum.sums + r), of_a)));
        for (int k = 0; k < d; ++k) {
          const ptrdiff_t at = (ptrdiff_t)first_vec * W * d + (k * nv + v) * W;
          store(sum.output + at, fma(load(part.output + at), of_b, mul(load(sum.output + at), of_a)));
        }
      }
    });
  }
  close_panels(call, merge.rows, Buffers<T>(*call.pages), sum);
}

template <class T>
void plan_attention(const Call<T>& call, std::vector<AttentionTask>& tasks) {
  tasks.clear();
  if (call.lses == nullptr) return;
  for (int b = 0; b < call.requests.n; ++b)
    for (int head = 0; call.n_new(b) > 0 && head < call.pages->n_kv_heads; ++head)
      for (int t = 0; t < n_tiles(call, b, call.n_new(b)); ++t) tasks.push_back({b, head, t});
}

// The second pass: adds what all rows give to the tokens of a tile to their attention, as the mean over the group.
template <class T>
void note_attention(const Call<T>& call, const AttentionTask& task) {
  constexpr int TILE = Model<T>::tile, ROWS = Model<T>::panel_vecs * W;
  static thread_local Scratch scratch;
  const Pages& pages = *call.pages;
  const int d = call.head_size(), group = call.group(), n_new = call.n_new(task.request);
  Arena arena = scratch.arena();
  const size_t n_query = (size_t)ROWS * Model<T>::key_size(d);
  float *const query = arena.take<float>(n_query), *const staging = arena.take<float>(n_query);
  float* const shares = arena.take<float>(TILE * W);
  TileLoader<T> loader(pages, arena, true);
  const Sequence sequence{call.pages, call.requests.blocks(task.request), task.kv_head};
  const Tile tile = load_tile(call, loader, sequence, task.request, task.tile, call.n_begun(task.request) + n_new);
  std::fill_n(shares, TILE * W, 0.0f);
  const int n_before = call.n_before(task.request), n_rows = n_new * group;
  const float* const all_lses = call.lses_of(task.request, task.kv_head);
  const ScaleAndCap logits = call.scale_and_cap();
  for (int first = std::max(0, tile.first - n_before) * group; first < n_rows; first += ROWS) {
    const int n = std::min(ROWS, n_rows - first), nv = (n + W - 1) / W;
    int32_t limits[ROWS];
    float lses[ROWS];
    for (int r = 0; r < nv * W; ++r) {
      limits[r] = n_before + (first + std::min(r, n - 1)) / group + 1;
      lses[r] = r < n ? all_lses[first + r] : INFINITY;
    }
    const RowRange range{call.query_start_loc[task.request], task.kv_head * group, group, first, n};
    pack_query<T>(range, call.query, d, 0, nv * W, staging, query);
    const Panel panel{nv, query, limits, nullptr, nullptr, nullptr};
    with_width<Model<T>::panel_vecs>(nv, [&](auto width) {
      add_shares<width, Model<T>::degree>(typename Model<T>::M{}, panel, tile, d, logits, lses, shares);
    });
  }
  for (int i = 0; i < tile.n; ++i) {
    const int block = (tile.first + i) / pages.block_size, slot = (tile.first + i) % pages.block_size;
    auto* const attention = (float*)(sequence.page(block) + pages.attention);
    attention[slot] += reduce_add(load(shares + i * W)) / (float)group;
  }
}

template <class T>
void run(Call<T> call) {
  static thread_local Plan plan_of_thread;
  static thread_local Scratch scratch;
  Plan& plan = plan_of_thread;
  const int threads = omp_get_max_threads();
  whole_tasks(call, threads, plan.tasks);
  balance(plan, threads);
  const size_t n_floats = plan.n_parts * Partial::floats(MAX_VECS * W, call.head_size());
  const size_t n_rows = (size_t)(call.query_start_loc[call.requests.n] - call.query_start_loc[0]) * call.n_heads;
  const size_t n_lses = call.pages->adds_attention() ? n_rows : 0;
  Arena arena = scratch.arena();
  float* const parts = arena.take<float>(n_floats);
  call.lses = n_lses > 0 ? arena.take<float>(n_lses) : nullptr;
  plan_attention(call, plan.attention);
  const int n_tasks = (int)plan.tasks.size(), n_merges = (int)plan.merges.size();
  const int n_attention = (int)plan.attention.size();
#pragma omp parallel if (n_tasks > 1)
  {
    [[maybe_unused]] typename Model<T>::M::Scope scope;
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n_tasks; ++i) run_task(call, plan.tasks[i], parts);
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n_merges; ++i) run_merge(call, plan.merges[i], parts);
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n_attention; ++i) note_attention(call, plan.attention[i]);
  }
}

}  // namespace
}  // namespace sparq::prefill

SPARQ_API void sparq_prefill(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& key,
                             const sparq::Tensor& value, const sparq::Tensor& out, const sparq::Requests& requests,
                             const int32_t* query_start_loc, const int32_t* key_start_loc,
                             const sparq::Logits& logits) {
  using namespace sparq;
  with_dtype(pages.dtype, [&](auto element) {
    using T = decltype(element);
    prefill::run<T>({Heads<const T>(query), Heads<const T>(key), Heads<const T>(value), Heads<T>(out), &pages, requests,
                     query_start_loc, key_start_loc, query.n_heads, logits, nullptr});
  });
}
