// How the CPU stores a lattice: one flat buffer per image, so that a lattice is an ordinary tensor.
//
// Points are cut into tiles of at most kTilePoints neighbouring points (blocks of pixels where the
// points form an image). A tile lists the distinct vertices its points touch, so that all work per
// point stays in rows that fit a near cache. Tiles own their partial sums, which are added in tile
// order: the result has the same bits for any number of threads. Points are numbered tile by tile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace fastseg {

constexpr int kTilePoints = 256;

enum class Normalization : int64_t { kNone = 0, kBefore = 1, kAfter = 2, kSymmetric = 3 };

// Cuts height x width points (row-major) into tiles. A plain list of points has height 1.
struct Tiling {
  int64_t height, width, tiles_y, tiles_x;

  Tiling(int64_t height, int64_t width) : height(height), width(width) {
    const int64_t rows = height >= 16 ? 16 : height > 0 ? height : 1;
    const int64_t columns = kTilePoints / rows;
    tiles_y = (height + rows - 1) / rows;
    tiles_x = (width + columns - 1) / columns;
  }
  int64_t count() const { return tiles_y * tiles_x; }
  int64_t row_begin(int64_t ty) const { return ty * height / tiles_y; }
  int64_t column_begin(int64_t tx) const { return tx * width / tiles_x; }
  // Points before tile t, counting tile by tile.
  int64_t first_point(int64_t t) const {
    const int64_t ty = t / tiles_x, tx = t % tiles_x;
    const int64_t y = row_begin(ty), rows = row_begin(ty + 1) - y;
    return y * width + rows * column_begin(tx);
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

// Start of the buffer. Counts, and the offset in bytes of each array.
struct LatticeHeader {
  int64_t magic, bytes, element_bytes, normalization;
  int64_t points, features, height, width;
  int64_t vertices;   // M
  int64_t pairs;      // P: distinct (tile, vertex) pairs
  int64_t simplices;  // distinct (tile, simplex) pairs
  int64_t merges;     // vertices touched by two or more tiles
  int64_t chains;     // runs of neighbours, all axes together
  int64_t chain_vertices;
  double largest_weight;  // of a point: the sum of its weights, times its scale
  int64_t pair_begin, pair_vertex, pair_row, simplex_begin, simplex_vertex, point_simplex, weight,
      scale, merge_vertex, merge_begin, axis_begin, chain_begin, chain_vertex;
};
constexpr int64_t kLatticeMagic = 0x4c41545449434531;  // "LATTICE1"

// Typed access to the buffer.
template <typename T>
struct Lattice {
  const LatticeHeader* header;
  const int32_t* pair_begin;       // [tiles + 1]
  const int32_t* pair_vertex;      // [P] vertex of each pair
  const int32_t* pair_row;         // [P] row that holds its partial sum: vertex, or M + k
  const int32_t* simplex_begin;    // [tiles + 1]
  const uint16_t* simplex_vertex;  // [simplices][d + 1] position in the tile's pair list
  const uint16_t* point_simplex;   // [N] position in the tile's simplex list
  const T* weight;                 // [N][d + 1]
  const T* scale;                  // [N] 1 / row sum, for kBefore and kAfter
  const int32_t* merge_vertex;     // [merges]
  const int32_t* merge_begin;      // [merges + 1] its further rows are M + begin .. M + end
  const int32_t* axis_begin;       // [d + 2] chains of each blur axis
  const int32_t* chain_begin;      // [chains + 1]
  const int32_t* chain_vertex;     // vertices along each chain

  explicit Lattice(const void* buffer) : header(static_cast<const LatticeHeader*>(buffer)) {
    const char* base = static_cast<const char*>(buffer);
    const auto at = [&](auto& pointer, int64_t offset) {
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(base + offset);
    };
    at(pair_begin, header->pair_begin);
    at(pair_vertex, header->pair_vertex);
    at(pair_row, header->pair_row);
    at(simplex_begin, header->simplex_begin);
    at(simplex_vertex, header->simplex_vertex);
    at(point_simplex, header->point_simplex);
    at(weight, header->weight);
    at(scale, header->scale);
    at(merge_vertex, header->merge_vertex);
    at(merge_begin, header->merge_begin);
    at(axis_begin, header->axis_begin);
    at(chain_begin, header->chain_begin);
    at(chain_vertex, header->chain_vertex);
  }
  int64_t d() const { return header->features; }
  int64_t rows() const { return header->vertices + extra_rows(); }
  int64_t extra_rows() const { return header->pairs - header->vertices; }
  Tiling tiling() const { return Tiling(header->height, header->width); }
};

// What the tile kernels read of one tile.
template <typename T>
struct TileView {
  int d1, pairs, points;
  const int32_t* pair_vertex;
  const int32_t* pair_row;
  const uint16_t* simplex_vertex;
  const uint16_t* point_simplex;
  const T* weight;
  const T* slice_scale;  // null: 1
  const T* splat_scale;

  // `transposed`: the view of the adjoint filter, which exchanges the two scales.
  TileView(const Lattice<T>& lattice, int64_t tile, int64_t first_point, int64_t points,
           bool transposed = false)
      : d1(static_cast<int>(lattice.d() + 1)), points(static_cast<int>(points)) {
    const int32_t pair = lattice.pair_begin[tile];
    pairs = lattice.pair_begin[tile + 1] - pair;
    pair_vertex = lattice.pair_vertex + pair;
    pair_row = lattice.pair_row + pair;
    simplex_vertex =
        lattice.simplex_vertex + static_cast<int64_t>(lattice.simplex_begin[tile]) * d1;
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
};

}  // namespace fastseg
