// What test_parallel.py calls: tasks that count themselves, one of which throws.
#include "common/parallel.h"

#include <stdexcept>

namespace {

constexpr int kPhases = 3;

template <typename Run>
int caught(const Run& run) {
  try {
    run();
  } catch (...) {
    return 1;
  }
  return 0;
}

}  // namespace

// done[phase * tasks + task] counts the runs of a task; the one numbered `bad` throws instead.
// Returns whether an exception reached the caller.
extern "C" __attribute__((visibility("default"))) int run_phases(int64_t tasks, int64_t bad,
                                                                 std::atomic<int64_t>* done) {
  return caught([&] {
    fastseg::parallel_phases(
        kPhases, [&](int) { return tasks; },
        [&](int phase, int64_t task) {
          if (phase * tasks + task == bad) throw std::runtime_error("bad task");
          ++done[phase * tasks + task];
        });
  });
}

extern "C" __attribute__((visibility("default"))) int run_tasks(int64_t tasks, int64_t bad,
                                                                std::atomic<int64_t>* done) {
  return caught([&] {
    fastseg::parallel_tasks(tasks, [&](int64_t task) {
      if (task == bad) throw std::runtime_error("bad task");
      ++done[task];
    });
  });
}
