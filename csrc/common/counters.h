// Counts how often each kernel variant ran, for tests and `fastseg info`:
// FASTSEG_COUNT("conv.winograd").
#pragma once

#include <atomic>
#include <cstdint>

namespace fastseg {

// One counter per place in the code, linked into a list when it first counts.
struct Counter {
  explicit Counter(const char* name) : name(name), next(head().load()) {
    while (!head().compare_exchange_weak(next, this)) {
    }
  }
  static std::atomic<Counter*>& head() {
    static std::atomic<Counter*> first{nullptr};
    return first;
  }
  const char* name;
  std::atomic<int64_t> count{0};
  Counter* next;
};

}  // namespace fastseg

#define FASTSEG_COUNT(name)                                \
  do {                                                     \
    static ::fastseg::Counter counter(name);               \
    counter.count.fetch_add(1, std::memory_order_relaxed); \
  } while (false)
