// Intel's AMX: eight tiles of up to 16 rows of 64 bytes and their products. Whether this process
// may use them, and a function for each instruction.
#pragma once

#include <cstdint>

// For compilers that know the instructions; only Linux has the way below to ask for the tiles.
#if defined(__x86_64__) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FASTSEG_AMX
#endif

#if defined(FASTSEG_AMX)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fastseg {

// Whether the CPU has tiles of bfloat16, the operating system saves them, and it lets this process
// use them, which Linux wants to be asked once: the tiles make the saved state of a thread 8 KB
// larger. The answer holds for all threads and for forked children.
inline bool request_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kBf16 | kTile))) return false;
  constexpr unsigned kTileConfig = 17, kTileData = 18;  // parts of the saved state
  unsigned saved, high;
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (~saved & (1u << kTileConfig | 1u << kTileData)) return false;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The palette 1 of LDTILECFG: sizes of the tiles.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "as the instruction reads it");

}  // namespace fastseg

#if defined(FASTSEG_AMX_STAND_IN)
#include "amx_stand_in.h"  // tests/: the same in plain C++, for machines without the instructions
#else

namespace fastseg {

// GCC's own intrinsics take digits alone as numbers of tiles, and do not say that they read memory.
#define FASTSEG_TILE __attribute__((always_inline, target("amx-tile,amx-bf16"))) inline

FASTSEG_TILE void tile_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config));
}
FASTSEG_TILE void tile_release() { asm volatile("tilerelease"); }
// Rows of `tile` from or to memory, `stride` bytes apart.
template <int tile>
FASTSEG_TILE void tile_load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
FASTSEG_TILE void tile_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(tile) : "memory");
}
// sums[m][n] += the dot product of row m of a and column n of b, whose rows hold pairs of
// neighbours in the reduction: [k / 2][n][k % 2].
template <int sums, int a, int b>
FASTSEG_TILE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

#undef FASTSEG_TILE

}  // namespace fastseg

#endif  // FASTSEG_AMX_STAND_IN
#endif  // FASTSEG_AMX
