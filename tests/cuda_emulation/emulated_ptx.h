// The functions of common/ptx.cuh for the emulation. A copy's destination is NaN until its group is
// waited for; the warp's product is computed once, by the last lane to arrive.
#pragma once

#include <unistd.h>

#include "emulation.h"

namespace fastseg {

inline void cp_async_16(void* to, const void* from, bool valid) {
  using namespace emulation;
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("cp.async: addresses must be multiples of 16, got %p and %p", to, from);
  }
  if (!is_shared(to, 16)) fail("cp.async: the destination is not in shared memory");
  *static_cast<uint4*>(to) = {~0u, ~0u, ~0u, ~0u};  // no memset: ThreadSanitizer overlooks it
  count_access(from);
  current->copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), valid});
}

inline void cp_async_commit() {
  emulation::Thread& thread = *emulation::current;
  thread.groups.push_back(thread.copies.size());
}

template <int kPending>
void cp_async_wait() {
  emulation::Thread& thread = *emulation::current;
  if (thread.groups.size() <= kPending) return;
  const size_t groups = thread.groups.size() - kPending, copies = thread.groups[groups - 1];
  for (size_t i = 0; i < copies; ++i) {
    const emulation::AsyncCopy& copy = thread.copies[i];
    *reinterpret_cast<uint4*>(copy.to) =
        copy.valid ? *reinterpret_cast<const uint4*>(copy.from) : uint4{};
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<long>(copies));
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + static_cast<long>(groups));
  for (size_t& group : thread.groups) group -= copies;
}

namespace emulation {

// Brings the lanes' rows together and counts their bank conflicts.
inline const char* matrix_rows(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0 || !is_shared(row, 16)) {
    fail("ldmatrix: a row must be 16 aligned bytes of shared memory, got %p", row);
  }
  const char* slots = warp_exchange(0xffffffffu, "ldmatrix", &row, sizeof(row));
  const int lane = current->lane;
  if (lane == 0) {  // 8 banks of 16 bytes; rows at one address are one access
    count(counters.ldmatrix);
    for (int m = 0; m < 4; ++m) {
      const char* bank[8] = {};
      for (int i = 0; i < 8; ++i) {
        const char* p = lane_value<const char*>(slots, m * 8 + i);
        const char*& held = bank[reinterpret_cast<uintptr_t>(p) / 16 % 8];
        if (held != nullptr && held != p) count(counters.bank_conflicts);
        held = p;
      }
    }
  }
  return slots;
}

}  // namespace emulation

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const char* slots = emulation::matrix_rows(row);
  const int lane = emulation::current->lane;
  for (int m = 0; m < 4; ++m) {
    const char* p = emulation::lane_value<const char*>(slots, m * 8 + lane / 4);
    std::memcpy(&r[m], p + lane % 4 * 4, 4);
  }
}

inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  const char* slots = emulation::matrix_rows(row);
  const int lane = emulation::current->lane;
  for (int m = 0; m < 4; ++m) {
    for (int i = 0; i < 2; ++i) {
      const char* p = emulation::lane_value<const char*>(slots, m * 8 + lane % 4 * 2 + i);
      std::memcpy(reinterpret_cast<char*>(&r[m]) + 2 * i, p + lane / 4 * 2, 2);
    }
  }
}

namespace emulation {

struct Fragments {
  uint32_t a[4], b[2];
  float d[4];
};
static_assert(sizeof(Fragments) <= kSlotBytes);

// T is Half, BFloat16, or float for TF32, of which the hardware reads the upper 19 bits.
template <typename T>
__attribute__((no_sanitize("thread"))) void multiply_fragments(char* slots) {
  constexpr int kDepth = 32 / sizeof(T);
  float a[16][kDepth], b[kDepth][8];
  const auto element = [](uint32_t word, int half) {
    if constexpr (sizeof(T) == 4) {
      word &= 0xffffe000u;
      float value;
      std::memcpy(&value, &word, sizeof(value));
      return value;
    } else {
      const uint16_t bits = static_cast<uint16_t>(word >> 16 * half);
      T value;
      std::memcpy(&value, &bits, sizeof(T));
      return static_cast<float>(value);
    }
  };
  constexpr int kPer = 4 / sizeof(T);  // elements of a register
  Fragments* fragments[32];
  for (int lane = 0; lane < 32; ++lane) {
    Fragments& f = *(fragments[lane] = reinterpret_cast<Fragments*>(slots + lane * kSlotBytes));
    const int row = lane / 4, column = lane % 4 * kPer;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < kPer; ++e) {
        a[row + i % 2 * 8][column + i / 2 * kDepth / 2 + e] = element(f.a[i], e);
        if (i < 2) b[column + i * kDepth / 2 + e][row] = element(f.b[i], e);
      }
    }
  }
  float d[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      fragments[lane]->d[i] += d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  }
  count(counters.mma);
}

template <typename T>
void multiply_lanes(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  const char* slots =
      warp_exchange(0xffffffffu, "mma.sync", &mine, sizeof(mine), false, &multiply_fragments<T>);
  const Fragments result = lane_value<Fragments>(slots, current->lane);
  for (int i = 0; i < 4; ++i) d[i] = result.d[i];
}

}  // namespace emulation

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply_lanes<T>(d, a, b0, b1);
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply_lanes<float>(d, a, b0, b1);
}

inline void named_barrier_sync(int id, int threads) {
  emulation::block_barrier(id, threads, false);
}

inline void store_release(uint64_t* flag, uint64_t value) {
  if (value != 0 && __atomic_load_n(flag, __ATOMIC_RELAXED) == value) {
    emulation::fail("a flag stands before it is set: who waits must clear it for the next replay");
  }
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
}

// Waits for another block, which runs on another OS thread.
inline void wait_acquire(const uint64_t* flag, uint64_t value) {
  for (int64_t turns = 0; __atomic_load_n(flag, __ATOMIC_ACQUIRE) != value; ++turns) {
    if (turns > 1 << 17) emulation::fail("a flag of another block is never set");
    usleep(100);
  }
}

}  // namespace fastseg
