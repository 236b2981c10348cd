// Work sharing and scratch memory of CPU kernels that outgrow a plain parallel_for.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fastseg {

// Runs task(i) for i in [0, tasks) on torch's threads; a thread that is done takes the next one, so
// a core that the machine lends to others does not hold up the rest. Tasks must write disjoint
// data: then the result does not depend on who ran what. Never throw inside.
template <typename Task>
void parallel_tasks(int64_t tasks, const Task& task) {
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) task(i);
  });
}

// Scratch memory for n values that a thread keeps between calls and that only grows: a fresh
// allocation of this size would be page-faulted anew every time. One buffer per thread, Tag and T.
template <typename Tag, typename T = float>
T* scratch(int64_t n) {
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<T, Free> buffer;
  thread_local int64_t size = 0;
  if (n > size) {
    constexpr int64_t kLine = 64 / sizeof(T);
    buffer.reset();
    size = (n + kLine - 1) / kLine * kLine;
    buffer.reset(static_cast<T*>(std::aligned_alloc(64, size * sizeof(T))));
    if (!buffer) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.get();
}

}  // namespace fastseg
