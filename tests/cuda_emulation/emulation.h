// The CUDA language for g++: what a kernel source needs to run on CPU tensors, one fiber per CUDA
// thread. Included by common/cuda.h when FASTSEG_EMULATE is defined; needs no CUDA toolkit.
// Test code: it shows wrong results, races and overruns of kernels on machines without a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// Shared memory needs a size the emulator can see: FASTSEG_SHARED or FASTSEG_DYNAMIC_SHARED.
#pragma GCC poison __shared__ __constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace fastseg {
namespace emulation {

struct Block;

// A cp.async that has not been waited for.
struct AsyncCopy {
  char* to;
  const char* from;
  bool valid;
};

// A tensor in global memory and the box that a bulk copy moves, innermost axis first; what the
// driver encodes on a GPU.
struct TensorMap {
  char* data;
  int element_bytes, rank;
  int64_t sizes[4], strides[4];  // strides in bytes
  bool im2col, swizzle;
  int box[3];                                      // of a tiled map
  int low[2], high[2], step[2], channels, pixels;  // of an im2col map
  int row_bytes() const { return (im2col ? channels : box[0]) * element_bytes; }
  int rows() const { return im2col ? pixels : box[1] * box[2]; }
};

// A bulk store that has not been waited for.
struct BulkStore {
  TensorMap map;
  const char* from;
  int at[3];
};

// A warpgroup's product that has not been waited for, as one of its threads sees it.
struct Product {
  float* d;
  uint64_t a, b;
  bool accumulate;
  void (*compute)(const Product& product, float* value);  // adds this thread's part
};

// Registers that pending products will write: NaN until then.
struct Accumulator {
  float* d;
  int pending;
  std::vector<float> value;
};

// One CUDA thread as its kernel sees it.
struct Thread {
  uint3 index;
  int linear, lane, warp;
  Block* block;
  dim3 grid_dim, block_dim;
  uint3 block_index;
  std::vector<AsyncCopy> copies;  // oldest first
  std::vector<size_t> groups;     // end of each committed group in `copies`
  std::vector<BulkStore> stores;  // the same for bulk stores and products
  std::vector<size_t> store_groups;
  std::vector<Product> products;
  std::vector<size_t> product_groups;
  std::vector<Accumulator> accumulators;
  bool products_fenced = false;
};

extern thread_local Thread* current __attribute__((tls_model("initial-exec")));

// What the emulated device says it is.
extern int multiprocessors, compute_capability_major;
extern bool capturing;  // a graph, so that nothing may be copied to the host

// Events a test may assert on. Sectors are 32 bytes; a request is one 128-bit access of a warp.
struct Counters {
  uint64_t launches, mma, wgmma, ldmatrix, bank_conflicts, requests, sectors, ideal_sectors;
};
extern Counters counters;                       // updated with relaxed atomics
void count(uint64_t& counter, uint64_t n = 1);  // counters.mma etc.
void count_access(const void* address);         // one lane's part of a 128-bit access

// Stops the whole launch: the launcher throws std::runtime_error with block and thread named.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What goes to a stream: runs it, and while a graph is captured keeps it for replay().
void submit(std::function<void()> work);

// Runs body() once per CUDA thread of the grid.
void run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes,
              const std::function<void()>& body);

// The block's allocation that belongs to one FASTSEG_SHARED declaration (identified by `site`).
void* static_shared(const void* site, size_t bytes);
void* dynamic_shared();
// Whether [address, address + bytes) lies in this block's shared memory.
bool is_shared(const void* address, size_t bytes);

// Waits until `expected` threads have come to barrier `id`; combines what they brought.
struct Votes {
  int any, all, count;
};
Votes block_barrier(int id, int expected, bool predicate, bool wait = true);

// Every lane of `mask` brings `bytes` (at most 64); returns 32 slots of 64 bytes, one per lane,
// valid until this lane's next exchange. The last lane to arrive runs finish(slots) first.
// `synchronise` also orders memory among the lanes, as __syncwarp does and shuffles do not.
using Finish = void (*)(char* slots);
char* warp_exchange(uint32_t mask, const char* what, const void* mine, size_t bytes,
                    bool synchronise = false, Finish finish = nullptr);
constexpr size_t kSlotBytes = 64;

// Tensor maps with the driver's rules; throw std::runtime_error where it would refuse.
TensorMap tiled_map(const void* data, size_t element_bytes, const int64_t* sizes,
                    const int64_t* strides, const int* box, bool swizzle);
TensorMap im2col_map(const void* data, size_t element_bytes, const int64_t* sizes, int64_t stride,
                     const int* low, const int* high, const int* step, int channels, int pixels);
// Moves one box now. `at` has an entry for each axis, `offset` is that of im2col maps.
void copy_box(const TensorMap& map, char* shared, const int* at, const int* offset, bool to_shared);

// Barriers in shared memory. Bulk copies report their bytes to them.
void mbarrier_init(const void* barrier, int arrivals);
void fence_mbarriers();
void mbarrier_arrive(const void* barrier, int64_t bytes);
void mbarrier_wait(const void* barrier, int parity);
// Queues a bulk load, which is performed once a thread waits for its barrier.
void start_load(char* to, const TensorMap& map, const void* barrier, const int (&at)[4],
                const int (&offset)[2]);

// Shared memory as asynchronous accesses see it: what plain stores wrote shows there only after
// fence_proxy_async.
const char* asynchronous_view(const void* address, size_t bytes);
void fence_proxy();
// Lets all other threads of the block run until none can go on.
void wait_late();

// Gives other threads of the block a turn while *word == value.
void wait_while(const uint32_t* word, uint32_t value, const char* what);

// Tells ThreadSanitizer about an order between threads that the hardware guarantees.
void acquire(const void* object);
void release(const void* object);

template <typename T>
__attribute__((no_sanitize("thread"))) T lane_value(const char* slots, int lane) {
  T value;
  std::memcpy(&value, slots + lane * kSlotBytes, sizeof(T));
  return value;
}

template <typename T>
T shuffle(unsigned mask, const char* what, T value, int source, bool in_range) {
  const char* slots = warp_exchange(mask, what, &value, sizeof(T));
  if (!in_range) return value;
  if (!(mask >> source & 1))
    fail("%s reads lane %d, which is not in mask 0x%08x", what, source, mask);
  return lane_value<T>(slots, source);
}

template <typename T, typename F>
T reduce_lanes(unsigned mask, const char* what, T value, F combine) {
  const char* slots = warp_exchange(mask, what, &value, sizeof(T));
  bool first = true;
  T result{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T other = lane_value<T>(slots, lane);
    result = first ? other : combine(result, other);
    first = false;
  }
  return result;
}

// Relaxed read-modify-write; ThreadSanitizer sees an atomic.
template <typename T, typename F>
T atomic_update(T* address, F change) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Bits));
  Bits* word = reinterpret_cast<Bits*>(address);
  Bits seen = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (true) {
    T old, next;
    std::memcpy(&old, &seen, sizeof(T));
    next = change(old);
    Bits wanted;
    std::memcpy(&wanted, &next, sizeof(T));
    if (__atomic_compare_exchange_n(word, &seen, wanted, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
      return old;
    }
  }
}

// One access of 1 to 16 bytes, whose address must be a multiple of its size.
template <typename W>
void check_access(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(W) != 0) {
    fail("access of %d bytes at %p, which is not a multiple of it", static_cast<int>(sizeof(W)),
         address);
  }
  if (sizeof(W) == 16) count_access(address);
}
template <typename W>
W load_word(const W* address) {
  check_access<W>(address);
  return *address;
}
template <typename W>
void store_word(W* address, W word) {
  check_access<W>(address);
  *address = word;
}

}  // namespace emulation
}  // namespace fastseg

#define threadIdx (::fastseg::emulation::current->index)
#define blockIdx (::fastseg::emulation::current->block_index)
#define blockDim (::fastseg::emulation::current->block_dim)
#define gridDim (::fastseg::emulation::current->grid_dim)
constexpr int warpSize = 32;

inline int fastseg_block_threads() {
  const dim3& d = fastseg::emulation::current->block_dim;
  return static_cast<int>(d.x * d.y * d.z);
}
inline void __syncthreads() {
  fastseg::emulation::block_barrier(0, fastseg_block_threads(), false);
}
inline int __syncthreads_or(int p) {
  return fastseg::emulation::block_barrier(0, fastseg_block_threads(), p).any;
}
inline int __syncthreads_and(int p) {
  return fastseg::emulation::block_barrier(0, fastseg_block_threads(), p).all;
}
inline int __syncthreads_count(int p) {
  return fastseg::emulation::block_barrier(0, fastseg_block_threads(), p).count;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  fastseg::emulation::warp_exchange(mask, "__syncwarp", "", 1, true);
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = fastseg::emulation::current->lane;
  return fastseg::emulation::shuffle(mask, "__shfl_sync", value,
                                     (lane & ~(width - 1)) | (source & (width - 1)), true);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = fastseg::emulation::current->lane, source = lane ^ bits;
  return fastseg::emulation::shuffle(mask, "__shfl_xor_sync", value, source,
                                     source < (lane & ~(width - 1)) + width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = fastseg::emulation::current->lane, source = lane + static_cast<int>(delta);
  return fastseg::emulation::shuffle(mask, "__shfl_down_sync", value, source,
                                     source < (lane & ~(width - 1)) + width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = fastseg::emulation::current->lane, source = lane - static_cast<int>(delta);
  return fastseg::emulation::shuffle(mask, "__shfl_up_sync", value, source,
                                     source >= (lane & ~(width - 1)));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const int lane = fastseg::emulation::current->lane;
  return fastseg::emulation::reduce_lanes(mask, "__ballot_sync", predicate ? 1u << lane : 0u,
                                          [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  const char* slots =
      fastseg::emulation::warp_exchange(mask, "__match_any_sync", &value, sizeof(T));
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && fastseg::emulation::lane_value<T>(slots, lane) == value) {
      same |= 1u << lane;
    }
  }
  return same;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline float __int_as_float(int x) {
  return fastseg::emulation::lane_value<float>(reinterpret_cast<char*>(&x), 0);
}
inline int __float_as_int(float x) {
  return fastseg::emulation::lane_value<int>(reinterpret_cast<char*>(&x), 0);
}
inline float __uint_as_float(unsigned x) { return __int_as_float(static_cast<int>(x)); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;  // volatile: no contraction with a following addition
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}
using std::max;
using std::min;

template <typename T>
T atomicAdd(T* p, std::common_type_t<T> v) {
  return fastseg::emulation::atomic_update(p, [v](T old) { return static_cast<T>(old + v); });
}
template <typename T>
T atomicMax(T* p, std::common_type_t<T> v) {
  return fastseg::emulation::atomic_update(p, [v](T old) { return std::max<T>(old, v); });
}
template <typename T>
T atomicMin(T* p, std::common_type_t<T> v) {
  return fastseg::emulation::atomic_update(p, [v](T old) { return std::min<T>(old, v); });
}
template <typename T>
T atomicOr(T* p, std::common_type_t<T> v) {
  return fastseg::emulation::atomic_update(p, [v](T old) { return static_cast<T>(old | v); });
}
template <typename T>
T atomicExch(T* p, std::common_type_t<T> v) {
  return fastseg::emulation::atomic_update(p, [v](T) { return static_cast<T>(v); });
}
template <typename T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> v) {
  return fastseg::emulation::atomic_update(
      p, [=](T old) { return old == expected ? static_cast<T>(v) : old; });
}

#define FASTSEG_SHARED(T, name, count)                                 \
  T* const name = static_cast<T*>(::fastseg::emulation::static_shared( \
      [] {                                                             \
        static char site;                                              \
        return static_cast<const void*>(&site);                        \
      }(),                                                             \
      sizeof(T) * (count)))
#define FASTSEG_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::fastseg::emulation::dynamic_shared())
