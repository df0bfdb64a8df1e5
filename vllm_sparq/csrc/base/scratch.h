// Memory that lives as long as its thread and only ever grows: no call allocates once the first have.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, n_bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(memory, n_bytes) ((void)0)
#endif

namespace sparq {

inline size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

class Arena;

// Chunks of memory, which never move while an arena hands out pieces of them.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // What an earlier arena handed out is void. If that took several chunks they are one from now on.
  Arena arena();

 private:
  friend class Arena;
  static constexpr std::align_val_t PAGE{4096};

  struct Chunk {
    uint8_t* memory;
    size_t n_bytes;
  };

  const Chunk& add(size_t n_bytes) {
    n_bytes = round_up(n_bytes, (size_t)PAGE);
    chunks_.push_back({(uint8_t*)operator new(n_bytes, PAGE), n_bytes});
    ASAN_POISON_MEMORY_REGION(chunks_.back().memory, n_bytes);
    return chunks_.back();
  }
  void release() {
    for (const Chunk& chunk : chunks_) {
      ASAN_UNPOISON_MEMORY_REGION(chunk.memory, chunk.n_bytes);
      operator delete(chunk.memory, PAGE);
    }
    chunks_.clear();
  }

  std::vector<Chunk> chunks_;
};

// Memory handed out in cache-line aligned pieces. Nobody gives a piece back. Under `make sanitize` a byte beyond a
// piece may not be touched, not even one that fills its last line.
class Arena {
 public:
  template <class T>
  T* take(size_t n) {
    const size_t n_bytes = round_up(n * sizeof(T), LINE);
    if (n_bytes > left_) grow(n_bytes);
    T* piece = (T*)next_;
    next_ += n_bytes, left_ -= n_bytes;
    ASAN_UNPOISON_MEMORY_REGION(piece, n * sizeof(T));
    return piece;
  }

 private:
  friend class Scratch;
  static constexpr size_t LINE = 64;

  explicit Arena(Scratch& scratch) : scratch_(&scratch) {
    if (!scratch.chunks_.empty()) go_on_in(scratch.chunks_.back());
  }
  void go_on_in(const Scratch::Chunk& chunk) { next_ = chunk.memory, left_ = chunk.n_bytes; }
  __attribute__((noinline)) void grow(size_t n_bytes) {
    const size_t before = scratch_->chunks_.empty() ? 0 : scratch_->chunks_.back().n_bytes;
    go_on_in(scratch_->add(std::max(n_bytes, before)));
  }

  Scratch* scratch_;
  uint8_t* next_ = nullptr;
  size_t left_ = 0;
};

inline Arena Scratch::arena() {
  if (chunks_.size() > 1) {
    size_t total = 0;
    for (const Chunk& chunk : chunks_) total += chunk.n_bytes;
    release();
    add(total);
  } else if (!chunks_.empty()) {
    ASAN_POISON_MEMORY_REGION(chunks_.back().memory, chunks_.back().n_bytes);
  }
  return Arena(*this);
}

}  // namespace sparq
