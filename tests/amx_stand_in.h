// The tile instructions of common/amx.h in plain C++, so that the kernels run on CPUs without AMX:
// what they do to tiles and memory is that of the manual's operation sections. Using a tile that is
// not configured, or products of tiles that do not fit, end the process, as on a CPU with AMX.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastseg {
namespace amx_stand_in {

struct Tile {
  alignas(64) uint8_t row[16][64];
};
struct State {
  TileConfig config;
  Tile tile[8];
  int64_t configured = 0, released = 0;  // how often
};
inline thread_local State state{{0}, {}};

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX stand-in: %s\n", what);
  std::abort();
}
inline int rows_of(int tile) {
  require(state.config.palette == 1 && state.config.rows[tile] > 0, "a tile is not configured");
  return state.config.rows[tile];
}

// Denormals are zero, as operands and as results.
inline float flush(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
inline float widen(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return flush(v);
}

}  // namespace amx_stand_in

inline void tile_configure(const TileConfig& config) {
  using namespace amx_stand_in;
  require(config.palette == 1 && config.start_row == 0, "palette must be 1, start row 0");
  for (int i = 0; i < 16; ++i) {
    require(config.rows[i] <= (i < 8 ? 16 : 0) && config.row_bytes[i] <= (i < 8 ? 64 : 0) &&
                (config.rows[i] == 0) == (config.row_bytes[i] == 0),
            "bad sizes of a tile");
  }
  state.config = config;
  std::memset(state.tile, 0, sizeof state.tile);
  ++state.configured;
}
inline void tile_release() {
  amx_stand_in::state.config.palette = 0;
  ++amx_stand_in::state.released;
}

template <int tile>
void tile_load(const void* rows, int64_t stride) {
  using namespace amx_stand_in;
  static_assert(tile < 8, "there are eight");
  std::memset(&state.tile[tile], 0, sizeof(Tile));
  for (int r = 0; r < rows_of(tile); ++r) {
    std::memcpy(state.tile[tile].row[r], static_cast<const char*>(rows) + r * stride,
                state.config.row_bytes[tile]);
  }
}
template <int tile>
void tile_store(void* rows, int64_t stride) {
  using namespace amx_stand_in;
  static_assert(tile < 8, "there are eight");
  for (int r = 0; r < rows_of(tile); ++r) {
    std::memcpy(static_cast<char*>(rows) + r * stride, state.tile[tile].row[r],
                state.config.row_bytes[tile]);
  }
}

// TDPBF16PS: the even and the odd terms of a row are summed apart from zero by fused multiply-adds,
// then both are added, and that to the tile. Rounding is to nearest even.
template <int sums, int a, int b>
void tile_multiply() {
  using namespace amx_stand_in;
  static_assert(sums != a && sums != b && a != b, "three different tiles");
  const TileConfig& config = state.config;
  const int pairs = config.row_bytes[a] / 4, columns = config.row_bytes[sums] / 4;
  require(rows_of(a) == rows_of(sums) && rows_of(b) == pairs &&
              config.row_bytes[b] == config.row_bytes[sums],
          "sizes of the tiles of a product do not fit");
  for (int m = 0; m < rows_of(sums); ++m) {
    uint16_t from_a[32];
    std::memcpy(from_a, state.tile[a].row[m], sizeof from_a);
    float even[16] = {}, odd[16] = {}, total[16];
    for (int k = 0; k < pairs; ++k) {
      uint16_t from_b[32];
      std::memcpy(from_b, state.tile[b].row[k], sizeof from_b);
      for (int n = 0; n < columns; ++n) {
        even[n] = flush(std::fma(widen(from_a[2 * k]), widen(from_b[2 * n]), even[n]));
        odd[n] = flush(std::fma(widen(from_a[2 * k + 1]), widen(from_b[2 * n + 1]), odd[n]));
      }
    }
    std::memcpy(total, state.tile[sums].row[m], sizeof total);
    for (int n = 0; n < columns; ++n) {
      total[n] = flush(flush(total[n]) + flush(even[n] + odd[n]));
    }
    std::memcpy(state.tile[sums].row[m], total, config.row_bytes[sums]);
  }
}

}  // namespace fastseg
