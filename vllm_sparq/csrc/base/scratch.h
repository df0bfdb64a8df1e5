// Memory that lives as long as its thread and only ever grows: no call allocates once the first has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, n_bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(memory, n_bytes) ((void)0)
#endif

namespace sparq {

inline size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory handed out in cache-line aligned pieces. Nobody gives a piece back. Under `make sanitize` a byte beyond a piece
// may not be touched, not even one that fills its last line.
class Arena {
 public:
  Arena() = default;
  Arena(uint8_t* memory, size_t n_bytes) : next_(memory), left_(n_bytes) {}

  template <class T>
  T* take(size_t n) {
    const size_t n_bytes = round_up(n * sizeof(T), LINE);
    if (n_bytes > left_) abort();  // a size computed wrongly here must not become a wild write
    T* piece = (T*)next_;
    next_ += n_bytes, left_ -= n_bytes;
    ASAN_UNPOISON_MEMORY_REGION(piece, n * sizeof(T));
    return piece;
  }

  // Room for n of T, for those who add up what they will take.
  template <class T>
  static size_t room(size_t n) {
    return round_up(n * sizeof(T), LINE);
  }

 private:
  static constexpr size_t LINE = 64;
  uint8_t* next_ = nullptr;
  size_t left_ = 0;
};

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // All of it, at least n_bytes; what an earlier arena handed out is void.
  Arena arena(size_t n_bytes) {
    if (n_bytes > size_) {
      release();
      size_ = round_up(n_bytes + n_bytes / 4, 4096);
      memory_ = (uint8_t*)aligned_alloc(4096, size_);
      if (memory_ == nullptr) abort();
    }
    ASAN_POISON_MEMORY_REGION(memory_, size_);
    return {memory_, size_};
  }

 private:
  void release() {
    ASAN_UNPOISON_MEMORY_REGION(memory_, size_);
    free(memory_);
  }

  uint8_t* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace sparq
