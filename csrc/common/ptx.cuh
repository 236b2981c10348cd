// Instructions that CUDA C++ has no name for: asynchronous copies to shared memory and tensor-core
// products (compute capability 8.0 and later), and what 9.0 adds: barriers in shared memory that
// count bytes, bulk copies of tensor boxes, products of whole warpgroups. The only file with inline
// PTX; in the emulation the same functions come from emulated_ptx.h and emulated_async.h.
#pragma once

#include "common/cuda.h"
#include "common/dispatch.h"
#include "common/tensor_map.h"

#if defined(FASTSEG_EMULATE)
#include "emulated_async.h"
#include "emulated_ptx.h"
#else

namespace fastseg {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Starts a copy of 16 bytes from global to shared memory, or of zeros if not `valid` (`from` must
// then still be a legal address). It is there after cp_async_wait and, for other threads, a
// barrier.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the group of this thread's copies since the last one.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all groups of this thread but the latest kPending.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: `row` is row lane % 8 of matrix lane / 8. Lane l gets
// elements 2 * (l % 4) and the next of row l / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with every matrix transposed: lane l gets rows 2 * (l % 4) and the next of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8, float32) += a (16x16) * b (16x8), elements of T.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// float32 to the nearest TF32 number (10 bits of mantissa), ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// d (16x8, float32) += a (16x8) * b (8x8), elements as to_tf32 gives them.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sets a flag for other blocks: who sees it by wait_acquire sees all that this thread, and those it
// met at a barrier before, wrote until now.
__device__ __forceinline__ void store_release(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ __forceinline__ void wait_acquire(const uint64_t* flag, uint64_t value) {
  uint64_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(flag) : "memory");
  } while (seen != value);
}

// Waits for `threads` threads of the block, whole warps, at barrier `id` (1 to 15; __syncthreads is
// 0).
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- barriers in shared memory, compute capability 9.0 ------------------------------------------

// A phase of the barrier is complete after `arrivals` arrivals and all bytes that were announced.
// Call fence_mbarrier_init and a block barrier before others use it.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to bulk copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::
                   : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Announces `bytes` of bulk copies that report to the barrier, and arrives.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits for the end of the phase of this parity: 0 for the first, 1 for the second, and so on. The
// phase before the first counts as ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- bulk copies of tensor boxes, compute capability 9.0 ----------------------------------------

// Orders this thread's plain accesses to shared memory before its later asynchronous ones, and
// those of threads that it then meets: bulk copies and warpgroup products.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Fetches the box of a tiled map that starts at element (c0, c1, c2), innermost first, to `to`,
// which must be a multiple of 128 bytes (1024 if swizzled); elements beyond the tensor become 0.
// `barrier` counts its bytes. One thread calls it.
__device__ __forceinline__ void tma_load_3d(void* to, const TensorMap& map, uint64_t* barrier,
                                            int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// The same for an im2col map: as many pixels as the map says, from base pixel (n, h, w) on in
// row-major order through the map's box, each read at (h + down, w + right), channels from c on.
__device__ __forceinline__ void tma_load_im2col(void* to, const TensorMap& map, uint64_t* barrier,
                                                int c, int w, int h, int n, int right, int down) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n),
      "h"(static_cast<uint16_t>(right)), "h"(static_cast<uint16_t>(down))
      : "memory");
}

// Stores a box from shared memory; elements beyond the tensor are dropped. Plain writes to `from`
// need fence_proxy_async, by the threads that made them, and then a barrier.
__device__ __forceinline__ void tma_store_3d(const TensorMap& map, const void* from, int c0, int c1,
                                             int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], "
      "[%1];" ::"l"(&map),
      "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Closes the group of this thread's bulk stores since the last one.
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all groups of this thread's bulk stores but the latest kPending have read their
// shared memory. kPending 0 is due before the thread ends.
template <int kPending>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// ---- products of warpgroups, compute capability 9.0 only (sm_90a) -------------------------------

// What wgmma needs to know of an operand in shared memory: rows of 64 16-bit elements (K), 128
// bytes each, swizzled by 128 bytes, as a bulk copy leaves them. `rows` is the first of them,
// a multiple of 1024 bytes, plus 32 bytes for each 16 elements of K to skip.
__device__ __forceinline__ uint64_t wgmma_operand(const void* rows) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kEightRows | uint64_t{1} << 16 | (shared_address(rows) & 0x3ffff) >> 4;
}

namespace detail {
// Keeps the compiler from moving registers across the asynchronous product that they are part of.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
}  // namespace detail

// To call before the first product into d and after any other use of d, not between products.
template <int kCount>
__device__ __forceinline__ void wgmma_fence(float (&d)[kCount]) {
  detail::pin(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Before products into registers that others are still being added to: without it ptxas puts one in
// and, inside a loop, runs the products one after another (its remark C7520).
__device__ __forceinline__ void wgmma_continue() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for all committed groups of products but the latest kPending; d is ready if that is 0.
template <int kPending, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&d)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  if constexpr (kPending == 0) detail::pin(d);
}

#define FASTSEG_PINS_8(i)                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTSEG_PINS_32(i) \
  FASTSEG_PINS_8(i), FASTSEG_PINS_8(i + 8), FASTSEG_PINS_8(i + 16), FASTSEG_PINS_8(i + 24)
#define FASTSEG_REGISTERS_32                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTSEG_REGISTERS_64                                                         \
  FASTSEG_REGISTERS_32                                                               \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTSEG_REGISTERS_128                                                                  \
  FASTSEG_REGISTERS_64                                                                         \
  ", "                                                                                         \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
  "%111, "                                                                                     \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"
// The numbers of the operands that follow the registers of d: descriptors of a and b, whether to
// add.
#define FASTSEG_WGMMA(n, type, registers, a_number, b_number, add_number, ...)        \
  asm volatile("{\n\t.reg .pred add;\n\tsetp.ne.b32 add, " add_number                 \
               ", 0;\n\twgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
               " {" registers "}, " a_number ", " b_number ", add, 1, 1, 0, 0;\n\t}"  \
               : __VA_ARGS__                                                          \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

// d (64 x kN, float32) = a (64x16) * b (16 x kN) [+ d], elements of T, by the four warps of a
// warpgroup. d: value i of lane l in warp w is that of row 16 w + l / 4 + i / 2 % 2 * 8 and column
// i / 4 * 8 + l % 4 * 2 + i % 2. It may be read after wgmma_wait.
template <typename T, int kN>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[kN / 2], uint64_t a, uint64_t b,
                                             bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  constexpr bool kHalf = std::is_same_v<T, Half>;
  if constexpr (kN == 64 && kHalf) {
    FASTSEG_WGMMA("64", "f16", FASTSEG_REGISTERS_32, "%32", "%33", "%34", FASTSEG_PINS_32(0));
  } else if constexpr (kN == 64) {
    FASTSEG_WGMMA("64", "bf16", FASTSEG_REGISTERS_32, "%32", "%33", "%34", FASTSEG_PINS_32(0));
  } else if constexpr (kN == 128 && kHalf) {
    FASTSEG_WGMMA("128", "f16", FASTSEG_REGISTERS_64, "%64", "%65", "%66", FASTSEG_PINS_32(0),
                  FASTSEG_PINS_32(32));
  } else if constexpr (kN == 128) {
    FASTSEG_WGMMA("128", "bf16", FASTSEG_REGISTERS_64, "%64", "%65", "%66", FASTSEG_PINS_32(0),
                  FASTSEG_PINS_32(32));
  } else if constexpr (kHalf) {
    FASTSEG_WGMMA("256", "f16", FASTSEG_REGISTERS_128, "%128", "%129", "%130", FASTSEG_PINS_32(0),
                  FASTSEG_PINS_32(32), FASTSEG_PINS_32(64), FASTSEG_PINS_32(96));
  } else {
    FASTSEG_WGMMA("256", "bf16", FASTSEG_REGISTERS_128, "%128", "%129", "%130", FASTSEG_PINS_32(0),
                  FASTSEG_PINS_32(32), FASTSEG_PINS_32(64), FASTSEG_PINS_32(96));
  }
}
#undef FASTSEG_WGMMA
#undef FASTSEG_REGISTERS_128
#undef FASTSEG_REGISTERS_64
#undef FASTSEG_REGISTERS_32
#undef FASTSEG_PINS_32
#undef FASTSEG_PINS_8

// Gives registers of this warpgroup back, or takes some that others gave: each thread then has
// kRegisters, a multiple of 8. All warps of the warpgroup call it.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fastseg

#endif
