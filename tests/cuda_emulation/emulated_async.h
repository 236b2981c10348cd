// What common/ptx.cuh has for compute capability 9.0, for the emulation. Everything asynchronous
// happens as late as it may: a bulk load when a thread waits for its barrier, a product when all
// other threads of the block wait; until then its destination is NaN. So a stage that is
// overwritten, or a result that is read, too early shows up in the result.
#pragma once

#include <algorithm>

#include "emulation.h"

namespace fastseg {

using emulation::TensorMap;

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulation::mbarrier_init(barrier, arrivals);
}
inline void fence_mbarrier_init() { emulation::fence_mbarriers(); }
inline void mbarrier_arrive(uint64_t* barrier) { emulation::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  emulation::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_wait(uint64_t* barrier, int parity) {
  emulation::mbarrier_wait(barrier, parity);
}
inline void fence_proxy_async() { emulation::fence_proxy(); }

namespace emulation {

// Fails where plain stores to [p, p + bytes) were not followed by a proxy fence.
inline void check_proxy(const void* p, size_t bytes, const char* what) {
  const char* view = asynchronous_view(p, bytes);
  if (std::memcmp(p, view, bytes) != 0) {
    fail("%s: plain stores to shared memory at %p without fence_proxy_async before it", what, p);
  }
}

inline void load_box(void* to, const TensorMap& map, uint64_t* barrier, const int (&at)[4],
                     const int (&offset)[2] = {0, 0}) {
  const size_t bytes = static_cast<size_t>(map.rows()) * map.row_bytes();
  const uintptr_t alignment = map.swizzle ? 1024 : 128;
  if (reinterpret_cast<uintptr_t>(to) % alignment != 0) {
    fail("bulk load: the destination must be a multiple of %d bytes, got %p",
         static_cast<int>(alignment), to);
  }
  check_proxy(to, bytes, "bulk load");
  char* view = const_cast<char*>(asynchronous_view(to, bytes));
  for (size_t i = 0; i < bytes; i += 16) {  // no memset: ThreadSanitizer overlooks it
    *reinterpret_cast<uint4*>(static_cast<char*>(to) + i) = {~0u, ~0u, ~0u, ~0u};
    *reinterpret_cast<uint4*>(view + i) = {~0u, ~0u, ~0u, ~0u};
  }
  start_load(static_cast<char*>(to), map, barrier, at, offset);
}

// Ends all groups of `groups` but the latest `pending`: returns how many items those held.
inline size_t end_groups(std::vector<size_t>& groups, size_t pending) {
  if (groups.size() <= pending) return 0;
  const size_t ended = groups.size() - pending, items = groups[ended - 1];
  groups.erase(groups.begin(), groups.begin() + static_cast<long>(ended));
  for (size_t& group : groups) group -= items;
  return items;
}

}  // namespace emulation

inline void tma_load_3d(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2) {
  if (map.im2col) emulation::fail("tma_load_3d needs a tiled map");
  emulation::load_box(to, map, barrier, {c0, c1, c2, 0});
}

inline void tma_load_im2col(void* to, const TensorMap& map, uint64_t* barrier, int c, int w, int h,
                            int n, int right, int down) {
  if (!map.im2col) emulation::fail("tma_load_im2col needs an im2col map");
  if (std::min(right, down) < 0 || std::max(right, down) > 255) {
    emulation::fail("tma_load_im2col: offsets are 0 to 255, got (%d, %d)", right, down);
  }
  emulation::load_box(to, map, barrier, {c, w, h, n}, {right, down});
}

inline void tma_store_3d(const TensorMap& map, const void* from, int c0, int c1, int c2) {
  emulation::check_proxy(from, static_cast<size_t>(map.rows()) * map.row_bytes(), "bulk store");
  emulation::current->stores.push_back({map, static_cast<const char*>(from), {c0, c1, c2}});
}
inline void tma_store_commit() {
  emulation::Thread& thread = *emulation::current;
  thread.store_groups.push_back(thread.stores.size());
}
template <int kPending>
void tma_store_wait() {
  emulation::Thread& thread = *emulation::current;
  const size_t ended = emulation::end_groups(thread.store_groups, kPending);
  if (ended > 0) emulation::wait_late();
  for (size_t i = 0; i < ended; ++i) {
    const emulation::BulkStore& store = thread.stores[i];
    const size_t bytes = static_cast<size_t>(store.map.rows()) * store.map.row_bytes();
    emulation::check_proxy(store.from, bytes, "bulk store");  // also shows ThreadSanitizer the read
    emulation::copy_box(store.map, const_cast<char*>(store.from), store.at, nullptr, false);
  }
  thread.stores.erase(thread.stores.begin(), thread.stores.begin() + static_cast<long>(ended));
}

// The address field counts 16 bytes from the start of dynamic shared memory.
inline uint64_t wgmma_operand(const void* rows) {
  using namespace emulation;
  const int64_t offset = static_cast<const char*>(rows) - static_cast<char*>(dynamic_shared());
  if (offset < 0 || offset >= 1 << 18 || offset % 16 != 0) {
    fail("wgmma_operand: needs an address in dynamic shared memory, got %p", rows);
  }
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16 | offset >> 4;
}

template <int kCount>
void wgmma_fence(float (&)[kCount]) {
  emulation::current->products_fenced = true;
}
inline void wgmma_continue() {}
inline void wgmma_commit() {
  emulation::Thread& thread = *emulation::current;
  thread.product_groups.push_back(thread.products.size());
}

namespace emulation {

// 16 elements of T of row `row` of an operand, as float.
template <typename T>
void operand_row(uint64_t operand, int row, float (&values)[16]) {
  const uint64_t start = (operand & 0x3fff) << 4, eight_rows = (operand >> 32 & 0x3fff) << 4;
  for (int half = 0; half < 2; ++half) {
    uint64_t at = start + row / 8 * eight_rows + row % 8 * 128 + half * 16;
    at ^= (at >> 7 & 7) << 4;
    const char* p = static_cast<char*>(dynamic_shared()) + at;
    const uint4 words = *reinterpret_cast<const uint4*>(p);
    const char* view = asynchronous_view(p, 16);
    if (std::memcmp(&words, view, 16) != 0) check_proxy(p, 16, "wgmma");
    T elements[8];
    std::memcpy(elements, &words, 16);
    for (int i = 0; i < 8; ++i) values[half * 8 + i] = static_cast<float>(elements[i]);
  }
}

template <typename T, int kN>
void compute_product(const Product& product, float* value) {
  const int lane = current->lane, warp = current->warp % 4;
  float a[2][16], b[16];
  for (int i = 0; i < 2; ++i) operand_row<T>(product.a, warp * 16 + lane / 4 + i * 8, a[i]);
  for (int i = 0; i < kN / 2; ++i) {
    // Values i and i + 2 share their column.
    if (i / 2 % 2 == 1) continue;
    operand_row<T>(product.b, i / 4 * 8 + lane % 4 * 2 + i % 2, b);
    for (int row = 0; row < 2; ++row) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k];
      value[i + 2 * row] = product.accumulate ? value[i + 2 * row] + sum : sum;
    }
  }
}

}  // namespace emulation

template <typename T, int kN>
void wgmma_m64k16(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  using namespace emulation;
  Thread& thread = *current;
  struct Arguments {
    uint64_t a, b;
    bool accumulate;
  };
  const Arguments mine{a, b, accumulate};
  const char* slots = warp_exchange(0xffffffffu, "wgmma", &mine, sizeof(mine));
  const Arguments first = lane_value<Arguments>(slots, 0);
  if (first.a != a || first.b != b || first.accumulate != accumulate) {
    fail("wgmma: the lanes of a warp disagree on its operands");
  }
  for (const uint64_t operand : {a, b}) {
    if (operand >> 62 != 1 || (operand >> 49 & 7) != 0 || (operand & 0x38) != 0) {
      fail("wgmma: operands are rows of 128 bytes, swizzled, from a multiple of 1024 bytes on");
    }
  }
  if (!thread.products_fenced) fail("wgmma: no wgmma_fence since its registers were last used");
  if (thread.lane == 0 && thread.warp % 4 == 0) count(counters.wgmma);
  auto held = std::find_if(thread.accumulators.begin(), thread.accumulators.end(),
                           [&](const Accumulator& other) { return other.d == d; });
  if (held == thread.accumulators.end()) {
    thread.accumulators.push_back({d, 0, std::vector<float>(d, d + kN / 2)});
    held = thread.accumulators.end() - 1;
    std::fill(d, d + kN / 2, __uint_as_float(~0u));
  }
  ++held->pending;
  thread.products.push_back({d, a, b, accumulate, &compute_product<T, kN>});
}

template <int kPending, int kCount>
void wgmma_wait(float (&)[kCount]) {
  using namespace emulation;
  Thread& thread = *current;
  const size_t ended = end_groups(thread.product_groups, kPending);
  if (ended > 0) wait_late();
  for (size_t i = 0; i < ended; ++i) {
    const Product& product = thread.products[i];
    const auto held = std::find_if(thread.accumulators.begin(), thread.accumulators.end(),
                                   [&](const Accumulator& other) { return other.d == product.d; });
    product.compute(product, held->value.data());
    if (--held->pending > 0) continue;
    std::copy(held->value.begin(), held->value.end(), held->d);
    thread.accumulators.erase(held);
  }
  thread.products.erase(thread.products.begin(),
                        thread.products.begin() + static_cast<long>(ended));
  if (kPending == 0) thread.products_fenced = false;
  __syncwarp();
}

template <int kRegisters>
void release_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulation::warp_exchange(0xffffffffu, "setmaxnreg", "", 1);
}
template <int kRegisters>
void take_registers() {
  release_registers<kRegisters>();
}

}  // namespace fastseg
