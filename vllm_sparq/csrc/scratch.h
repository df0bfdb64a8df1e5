// Memory that lives as long as its thread and only ever grows: no call allocates once the first has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace sparq {

inline size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A buffer for `reserve`d bytes, cut into cache-line aligned pieces by `take`.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(memory_); }

  // Forgets what was taken; room for n_bytes in at most 64 pieces.
  void reserve(size_t n_bytes) {
    used_ = 0;
    n_bytes += 64 * 64;
    if (n_bytes <= size_) return;
    free(memory_);
    size_ = round_up(n_bytes + n_bytes / 4, 4096);
    memory_ = (uint8_t*)aligned_alloc(4096, size_);
    if (memory_ == nullptr) abort();
  }

  template <class T>
  T* take(size_t n) {
    T* piece = (T*)(memory_ + used_);
    used_ += round_up(n * sizeof(T), 64);
    if (used_ > size_) abort();
    return piece;
  }

 private:
  uint8_t* memory_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace sparq
