// How the CPU stores a lattice: one flat buffer per image, so that a lattice is an ordinary tensor.
//
// Points are cut into tiles of at most kTilePoints neighbouring points (blocks of pixels where the
// points form an image) and numbered tile by tile, which keeps the vertices in use in a near cache.
// A tile lists the distinct simplices of its points.
//
// Splatting sums into rows. Consecutive tiles form a chunk, and a chunk owns its rows: those of
// the vertices that it is the first to touch, and extra ones for the other vertices it touches.
// Merging adds the extra rows to their vertices in the order of the chunks: the result has the same
// bits for any number of threads. Vertices are numbered in the order of first use, so that the rows
// of a chunk are two ranges.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastseg {

constexpr int kTilePoints = 256;
constexpr int kTileRows = 8;  // runs of 32 pixels are quick to transpose

enum class Normalization : int64_t { kNone = 0, kBefore = 1, kAfter = 2, kSymmetric = 3 };

// Cuts height x width points (row-major) into tiles. A plain list of points has height 1.
struct Tiling {
  int64_t height, width, rows, columns, tiles_y, tiles_x;

  Tiling(int64_t height, int64_t width) : height(height), width(width) {
    rows = std::clamp<int64_t>(height, 1, kTileRows);
    columns = kTilePoints / rows / 16 * 16;
    tiles_y = (height + rows - 1) / rows;
    tiles_x = (width + columns - 1) / columns;
  }
  int64_t count() const { return tiles_y * tiles_x; }
  int64_t row_begin(int64_t ty) const { return std::min(height, ty * rows); }
  int64_t column_begin(int64_t tx) const { return std::min(width, tx * columns); }
  // Points before tile t, counting tile by tile.
  int64_t first_point(int64_t t) const {
    const int64_t ty = t / tiles_x, tx = t % tiles_x;
    const int64_t y = row_begin(ty);
    return y * width + (row_begin(ty + 1) - y) * column_begin(tx);
  }
  int64_t points(int64_t t) const { return first_point(t + 1) - first_point(t); }
  // Calls fn(begin, length, position): a run of points that lie at position.. within the tile.
  template <typename Fn>
  void for_each_run(int64_t t, Fn&& fn) const {
    const int64_t ty = t / tiles_x, tx = t % tiles_x;
    const int64_t x = column_begin(tx), length = column_begin(tx + 1) - x;
    int64_t position = 0;
    for (int64_t y = row_begin(ty); y < row_begin(ty + 1); ++y, position += length) {
      fn(y * width + x, length, position);
    }
  }
};

// Chunks of consecutive tiles: enough of them to share among threads, and few, since every one adds
// extra rows (at 12 chunks as many as there are vertices).
struct Chunking {
  int64_t tiles, count;

  explicit Chunking(const Tiling& tiling) : tiles(tiling.count()) {
    const int64_t points = tiling.height * tiling.width;
    const int64_t wanted = std::min(points / 2048, 8 + points / 131072 * 8);
    count = std::clamp<int64_t>(wanted, 1, std::min<int64_t>(64, std::max<int64_t>(tiles, 1)));
  }
  int64_t first_tile(int64_t chunk) const { return chunk * tiles / count; }
};

// Start of the buffer. Counts, and the offset in bytes of each array.
struct LatticeHeader {
  int64_t magic, bytes, element_bytes, normalization;
  int64_t points, features, height, width;
  int64_t vertices;    // M
  int64_t extra_rows;  // E
  int64_t simplices;   // distinct (tile, simplex) pairs
  int64_t chains;      // runs of neighbours, all axes together
  int64_t chain_vertices;
  int64_t simplex_begin, simplex_vertex, simplex_row, point_simplex, weight, scale, own_begin,
      extra_begin, merge_begin, merge_row, axis_begin, chain_begin, chain_vertex;
};
constexpr int64_t kLatticeMagic = 0x4c41545449434533;  // "LATTICE3"

// Typed access to the buffer.
template <typename T>
struct Lattice {
  const LatticeHeader* header;
  const int32_t* simplex_begin;   // [tiles + 1]
  const int32_t* simplex_vertex;  // [simplices][d + 1] vertices by remainder
  const int32_t* simplex_row;     // [simplices][d + 1] their rows in this chunk: vertex, or M + k
  const uint16_t* point_simplex;  // [N] position in the tile's simplex list
  const T* weight;                // [N][d + 1] by remainder, then 64 bytes of zeros
  const T* scale;                 // [N] 1 / row sum, its root if kSymmetric (and in the weights)
  const int32_t* own_begin;       // [chunks + 1] vertices that a chunk is the first to touch
  const int32_t* extra_begin;     // [chunks + 1] its extra rows, counted from M
  const int32_t* merge_begin;     // [M + 1]
  const int32_t* merge_row;       // [E] extra rows, vertex by vertex
  const int32_t* axis_begin;      // [d + 2] chains of each blur axis
  const int32_t* chain_begin;     // [chains + 1]
  const int32_t* chain_vertex;    // vertices along each chain

  explicit Lattice(const void* buffer) : header(static_cast<const LatticeHeader*>(buffer)) {
    const char* base = static_cast<const char*>(buffer);
    const auto at = [&](auto& pointer, int64_t offset) {
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(base + offset);
    };
    at(simplex_begin, header->simplex_begin);
    at(simplex_vertex, header->simplex_vertex);
    at(simplex_row, header->simplex_row);
    at(point_simplex, header->point_simplex);
    at(weight, header->weight);
    at(scale, header->scale);
    at(own_begin, header->own_begin);
    at(extra_begin, header->extra_begin);
    at(merge_begin, header->merge_begin);
    at(merge_row, header->merge_row);
    at(axis_begin, header->axis_begin);
    at(chain_begin, header->chain_begin);
    at(chain_vertex, header->chain_vertex);
  }
  int64_t d() const { return header->features; }
  // Rows that a splat needs.
  int64_t rows() const { return header->vertices + header->extra_rows; }
  Tiling tiling() const { return Tiling(header->height, header->width); }
  // Zeroes the rows of a chunk before its points are splatted.
  void clear_rows(int64_t chunk, int width, T* sums) const {
    const auto clear = [&](int64_t begin, int64_t end) {
      std::memset(sums + begin * width, 0, static_cast<size_t>((end - begin) * width) * sizeof(T));
    };
    clear(own_begin[chunk], own_begin[chunk + 1]);
    clear(header->vertices + extra_begin[chunk], header->vertices + extra_begin[chunk + 1]);
  }
};

// What the tile kernels read of one tile.
template <typename T>
struct TileView {
  int d1, points, simplices;
  const int32_t* simplex_vertex;
  const int32_t* simplex_row;
  const uint16_t* point_simplex;
  const T* weight;
  const T* slice_scale;  // null: 1
  const T* splat_scale;

  // `transposed`: the view of the adjoint filter, which exchanges the two scales.
  TileView(const Lattice<T>& lattice, int64_t tile, int64_t first_point, int64_t points,
           bool transposed = false)
      : d1(static_cast<int>(lattice.d() + 1)), points(static_cast<int>(points)) {
    simplices = lattice.simplex_begin[tile + 1] - lattice.simplex_begin[tile];
    const int64_t simplex = static_cast<int64_t>(lattice.simplex_begin[tile]) * d1;
    simplex_vertex = lattice.simplex_vertex + simplex;
    simplex_row = lattice.simplex_row + simplex;
    point_simplex = lattice.point_simplex + first_point;
    weight = lattice.weight + first_point * d1;
    const auto mode = static_cast<Normalization>(lattice.header->normalization);
    const T* scale = lattice.scale + first_point;
    slice_scale = mode == Normalization::kAfter ? scale : nullptr;
    splat_scale = mode == Normalization::kBefore ? scale : nullptr;
    if (transposed) {
      const T* other = slice_scale;
      slice_scale = splat_scale;
      splat_scale = other;
    }
  }
  // The view of `count` of its points alone.
  TileView part(int begin, int count) const {
    TileView view = *this;
    view.points = count;
    view.point_simplex += begin;
    view.weight += static_cast<int64_t>(begin) * d1;
    if (slice_scale != nullptr) view.slice_scale += begin;
    if (splat_scale != nullptr) view.splat_scale += begin;
    return view;
  }
};

}  // namespace fastseg
