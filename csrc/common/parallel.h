// Work sharing and scratch memory of CPU kernels that outgrow a plain parallel_for.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

namespace fastseg {

// Runs task(i) for i in [0, tasks) on torch's threads. Each begins with its own share of the tasks,
// one after the other: images are cut in the same order by every layer, so that it finds what it
// wrote before in its own caches. A thread that is done goes on with the shares of the others: a
// core that the machine lends to others does not hold up the rest. Tasks must write disjoint data:
// then the result does not depend on who ran what. Never throw inside.
template <typename Task>
void parallel_tasks(int64_t tasks, const Task& task) {
  constexpr int64_t kMostShares = 64;
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  const int64_t count = std::min(threads, kMostShares);
  Share shares[kMostShares];
  for (int64_t i = 0; i < count; ++i) {
    shares[i].next = tasks * i / count;
    shares[i].end = tasks * (i + 1) / count;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t s = 0; s < count; ++s) {
      Share& share = shares[(thread + s) % count];
      for (int64_t i = share.next++; i < share.end; i = share.next++) task(i);
    }
  });
}

// parallel_tasks for one phase after another: task(phase, i) for i in [0, tasks(phase)). Threads do
// not go back to the caller in between but wait for each other's last tasks, which takes a fraction
// of a microsecond. They need not all be there: any number of them gets through all phases.
template <typename Tasks, typename Task>
void parallel_phases(int phases, const Tasks& tasks, const Task& task) {
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};
  };
  const std::unique_ptr<Phase[]> all(new Phase[static_cast<size_t>(phases)]);
  int64_t most = 0;
  for (int p = 0; p < phases; ++p) most = std::max<int64_t>(most, tasks(p));
  const int64_t threads = std::min<int64_t>(most, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int p = 0; p < phases; ++p) {
      const int64_t count = tasks(p);
      Phase& phase = all[static_cast<size_t>(p)];
      for (int64_t i = phase.next++; i < count; i = phase.next++) {
        struct Done {  // also where a task throws: the others must not wait for it
          std::atomic<int64_t>& done;
          ~Done() { ++done; }
        } guard{phase.done};
        task(p, i);
      }
      for (int spins = 0; phase.done < count; ++spins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spins > 1024) std::this_thread::yield();  // someone lost its core
      }
    }
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
