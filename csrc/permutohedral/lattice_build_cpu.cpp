// Builds the lattice. Chunk by chunk, the simplices of all points and the vertices of those; then
// one number per vertex, blur chains, and the normalisation.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "permutohedral/filter.h"
#include "permutohedral/key_tables.h"
#include "permutohedral/lattice_kernels.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {
namespace {

template <typename Key, typename T>
class Builder {
 public:
  Builder(const T* features, int64_t d, int64_t height, int64_t width, const KeyFields<Key>& fields)
      : features_(features),
        d_(static_cast<int>(d)),
        tiling_(height, width),
        chunks_(tiling_),
        points_(height * width),
        fields_(fields),
        found_(static_cast<size_t>(chunks_.count)),
        tile_simplices_(static_cast<size_t>(tiling_.count())),
        simplex_vertex_(points_ * (d + 1)),
        point_simplex_(points_),
        weight_(points_ * (d + 1)) {}

  void build(Normalization normalization, const std::function<void*(int64_t)>& allocate) {
    locate_points();
    number_vertices();
    link_neighbours();
    write(normalization, allocate);
  }

 private:
  static constexpr int kStride = kTilePoints;

  // The points of a chunk. Its vertices have numbers of their own at first.
  struct Chunk {
    std::unique_ptr<KeyTable<Key>> vertices;
    std::vector<int32_t> id, row;  // of its vertices, in the whole lattice
    int64_t simplices = 0;
  };

  struct TileScratch {
    explicit TileScratch(int d)
        : features(kStride * d),
          weight(kStride * (d + 1)),
          weight_rows(kStride * (d + 1) + 16),
          cell(kStride * (d + 1)),
          rank(kStride * (d + 1)),
          key(kStride),
          order(kStride) {
      lattice_scale(d, scale);
    }
    T scale[kMaxFeatures];
    Workspace<T> features, weight, weight_rows;
    Workspace<int32_t> cell, rank;
    Workspace<Key> key;
    Workspace<uint64_t> order;
    TileSimplices<Key> simplices;
  };

  int64_t first_point(int64_t chunk) const {
    return tiling_.first_point(chunks_.first_tile(chunk));
  }

  void locate_points() {
    parallel_tasks(chunks_.count, [&](int64_t c) {
      TileScratch scratch(d_);
      Chunk& chunk = found_[static_cast<size_t>(c)];
      chunk.vertices.reset(new KeyTable<Key>((first_point(c + 1) - first_point(c)) / 4));
      int32_t* simplex_vertex = simplex_vertex_.data() + first_point(c) * (d_ + 1);
      for (int64_t t = chunks_.first_tile(c); t < chunks_.first_tile(c + 1); ++t) {
        const int count = locate_tile(t, scratch, simplex_vertex, chunk.vertices.get());
        tile_simplices_[static_cast<size_t>(t)] = count;
        chunk.simplices += count;
        simplex_vertex += count * (d_ + 1);
      }
    });
  }

  // Appends the vertices of the tile's simplices to `simplex_vertex`; returns the number of these.
  int locate_tile(int64_t tile, TileScratch& s, int32_t* simplex_vertex, KeyTable<Key>* vertices) {
    const auto& kernels = lattice_kernels<T>();
    const int d1 = d_ + 1;
    const int64_t first = tiling_.first_point(tile);
    const int n = static_cast<int>(tiling_.points(tile));
    const int padded = (n + 15) / 16 * 16;
    for (int k = 0; k < d_; ++k) {
      T* row = s.features.data() + k * kStride;
      tiling_.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
        std::copy_n(features_ + k * points_ + begin, length, row + position);
      });
      for (int i = n; i < padded; ++i) row[i] = row[0];
    }
    kernels.locate_points(d_, padded, kStride, s.features.data(), s.scale, s.cell.data(),
                          s.rank.data(), s.weight.data());
    if constexpr (sizeof(Key) == 8) {
      kernels.pack_simplices(fields_, padded, kStride, s.cell.data(), s.rank.data(), s.key.data(),
                             s.order.data());
    } else {
      kernels.pack_wide_simplices(fields_, padded, kStride, s.cell.data(), s.rank.data(),
                                  s.key.data(), s.order.data());
    }

    s.simplices.find(n, s.key.data(), s.order.data(), point_simplex_.data() + first);
    for (int k = 0; k < s.simplices.count; ++k) {
      const int i = s.simplices.first_point[k];
      int axis_of_rank[kMaxFeatures + 1];
      for (int j = 0; j < d1; ++j) axis_of_rank[s.rank[j * kStride + i]] = j;
      Key vertex = s.key[i];
      for (int r = 0; r < d1; ++r) {
        *simplex_vertex++ = vertices->insert(vertex);
        vertex = next_in_simplex(fields_, vertex, axis_of_rank[d_ - r]);
      }
    }
    if (d1 <= 8) {  // transposed 8 wide: the next row overwrites what is beyond d + 1
      kernels.load_rows(s.weight.data(), kStride, d1, n, T(1), T(0), 8, d1, s.weight_rows.data());
    } else {
      for (int i = 0; i < n; ++i) {
        for (int r = 0; r < d1; ++r) s.weight_rows[i * d1 + r] = s.weight[r * kStride + i];
      }
    }
    std::copy_n(s.weight_rows.data(), n * d1, weight_.data() + first * d1);
    return s.simplices.count;
  }

  // Gives every distinct key a number in the order of first use, and every (chunk, vertex) pair a
  // row: the first chunk uses the vertex's own.
  void number_vertices() {
    int64_t pairs = 0;
    for (const Chunk& chunk : found_) pairs += static_cast<int64_t>(chunk.vertices->keys().size());
    table_.reset(new KeyTable<Key>(pairs / 2));
    std::vector<int32_t> extras;  // of each vertex
    std::vector<int32_t> extra_vertex;
    for (Chunk& chunk : found_) {
      own_begin_.push_back(static_cast<int32_t>(extras.size()));
      extra_begin_.push_back(static_cast<int32_t>(extra_vertex.size()));
      const std::vector<Key>& keys = chunk.vertices->keys();
      chunk.id.resize(keys.size());
      chunk.row.resize(keys.size());
      for (size_t k = 0; k < keys.size(); ++k) {
        if (k + 8 < keys.size()) table_->prefetch(keys[k + 8]);
        const int32_t id = table_->insert(keys[k]);
        chunk.id[k] = id;
        if (id == static_cast<int32_t>(extras.size())) {
          chunk.row[k] = id;
          extras.push_back(0);
        } else {
          chunk.row[k] = -1 - static_cast<int32_t>(extra_vertex.size());  // M is not known yet
          extra_vertex.push_back(id);
          ++extras[static_cast<size_t>(id)];
        }
      }
      chunk.vertices.reset();
    }
    const auto vertices = static_cast<int32_t>(extras.size());
    own_begin_.push_back(vertices);
    extra_begin_.push_back(static_cast<int32_t>(extra_vertex.size()));
    for (Chunk& chunk : found_) {
      for (int32_t& row : chunk.row) row = row < 0 ? vertices - 1 - row : row;
    }
    merge_begin_.push_back(0);
    for (int32_t& count : extras) {
      const int32_t begin = merge_begin_.back();
      merge_begin_.push_back(begin + count);
      count = begin;  // position of the next extra row
    }
    merge_row_.resize(extra_vertex.size());
    for (size_t k = 0; k < extra_vertex.size(); ++k) {
      merge_row_[static_cast<size_t>(extras[static_cast<size_t>(extra_vertex[k])]++)] =
          vertices + static_cast<int32_t>(k);
    }
  }

  // A blur axis: the number of the next vertex for every vertex, then chains of these.
  struct Axis {
    explicit Axis(int64_t vertices) : next(vertices), has_previous(vertices), chain(vertices) {}
    Workspace<int32_t> next;
    Workspace<char> has_previous;
    Workspace<int32_t> chain;
    std::vector<int32_t> begin;  // of each chain
    int32_t entries = 0;
  };

  void link_neighbours() {
    const std::vector<Key>& keys = table_->keys();
    const auto vertices = static_cast<int64_t>(keys.size());
    const Key remainder_mask = (Key(1) << fields_.shift[1]) - 1;
    for (int axis = 0; axis <= d_; ++axis) axes_.emplace_back(vertices);
    constexpr int64_t kBlock = 4096;
    const int64_t blocks = (vertices + kBlock - 1) / kBlock;
    parallel_tasks(blocks * (d_ + 1), [&](int64_t task) {
      const auto axis = static_cast<int>(task / blocks);
      const int64_t begin = task % blocks * kBlock, end = std::min(vertices, begin + kBlock);
      int32_t* next = axes_[static_cast<size_t>(axis)].next.data();
      const auto key_of_next = [&](int64_t v) {
        const Key key = keys[static_cast<size_t>(v)];
        return neighbour(fields_, key, static_cast<int>(key & remainder_mask), axis);
      };
      constexpr int64_t kAhead = 12;
      for (int64_t v = begin; v < end; ++v) {
        if (v + kAhead < end) table_->prefetch(key_of_next(v + kAhead));
        next[v] = table_->find(key_of_next(v));
      }
    });
    parallel_tasks(d_ + 1, [&](int64_t a) {
      Axis& axis = axes_[static_cast<size_t>(a)];
      std::fill_n(axis.has_previous.data(), vertices, char(0));
      for (int64_t v = 0; v < vertices; ++v) {
        if (axis.next[v] >= 0) axis.has_previous[axis.next[v]] = 1;
      }
      for (int64_t v = 0; v < vertices; ++v) {
        if (axis.next[v] < 0 || axis.has_previous[v]) continue;
        axis.begin.push_back(axis.entries);
        for (auto at = static_cast<int32_t>(v); at >= 0; at = axis.next[at]) {
          axis.chain[axis.entries++] = at;
        }
      }
    });
  }

  void write(Normalization normalization, const std::function<void*(int64_t)>& allocate) {
    const int d1 = d_ + 1;
    const int64_t tiles = tiling_.count();
    LatticeHeader h{};
    h.magic = kLatticeMagic;
    h.element_bytes = sizeof(T);
    h.normalization = static_cast<int64_t>(normalization);
    h.points = points_;
    h.features = d_;
    h.height = tiling_.height;
    h.width = tiling_.width;
    h.vertices = own_begin_.back();
    h.extra_rows = extra_begin_.back();
    for (const Chunk& chunk : found_) h.simplices += chunk.simplices;
    for (const Axis& axis : axes_) {
      h.chains += static_cast<int64_t>(axis.begin.size());
      h.chain_vertices += axis.entries;
    }
    int64_t end = sizeof(LatticeHeader);
    const auto place = [&](int64_t count, int64_t bytes) {
      const int64_t at = (end + 63) / 64 * 64;
      end = at + count * bytes;
      return at;
    };
    h.simplex_begin = place(tiles + 1, 4);
    h.simplex_vertex = place(h.simplices * d1, 4);
    h.simplex_row = place(h.simplices * d1, 4);
    h.point_simplex = place(points_, 2);
    h.weight = place(points_ * d1 + 64 / sizeof(T), sizeof(T));
    h.scale = place(points_, sizeof(T));
    h.own_begin = place(chunks_.count + 1, 4);
    h.extra_begin = place(chunks_.count + 1, 4);
    h.merge_begin = place(h.vertices + 1, 4);
    h.merge_row = place(h.extra_rows, 4);
    h.axis_begin = place(d1 + 1, 4);
    h.chain_begin = place(h.chains + 1, 4);
    h.chain_vertex = place(h.chain_vertices, 4);
    h.bytes = end;

    char* base = static_cast<char*>(allocate(end));
    std::memcpy(base, &h, sizeof(h));
    const auto ints = [&](int64_t offset) { return reinterpret_cast<int32_t*>(base + offset); };
    const auto copy = [&](int64_t offset, const std::vector<int32_t>& values) {
      std::copy(values.begin(), values.end(), ints(offset));
    };
    copy(h.own_begin, own_begin_);
    copy(h.extra_begin, extra_begin_);
    copy(h.merge_begin, merge_begin_);
    copy(h.merge_row, merge_row_);
    int32_t* simplex_begin = ints(h.simplex_begin);
    simplex_begin[0] = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      simplex_begin[t + 1] = simplex_begin[t] + tile_simplices_[static_cast<size_t>(t)];
    }
    int32_t *axis_begin = ints(h.axis_begin), *chain_begin = ints(h.chain_begin);
    int32_t chains = 0, entries = 0;
    for (int a = 0; a < d1; ++a) {
      const Axis& axis = axes_[static_cast<size_t>(a)];
      axis_begin[a] = chains;
      for (const int32_t begin : axis.begin) chain_begin[chains++] = entries + begin;
      std::copy_n(axis.chain.data(), axis.entries, ints(h.chain_vertex) + entries);
      entries += axis.entries;
    }
    axis_begin[d1] = chains;
    chain_begin[chains] = entries;
    T* weight = reinterpret_cast<T*>(base + h.weight);
    std::memset(weight + points_ * d1, 0, 64);
    parallel_tasks(chunks_.count, [&](int64_t c) {
      const Chunk& chunk = found_[static_cast<size_t>(c)];
      const int32_t* vertex = simplex_vertex_.data() + first_point(c) * d1;
      const int64_t at = int64_t{simplex_begin[chunks_.first_tile(c)]} * d1;
      for (int64_t k = 0; k < chunk.simplices * d1; ++k) {
        ints(h.simplex_vertex)[at + k] = chunk.id[static_cast<size_t>(vertex[k])];
        ints(h.simplex_row)[at + k] = chunk.row[static_cast<size_t>(vertex[k])];
      }
      const int64_t first = first_point(c), count = first_point(c + 1) - first;
      std::copy_n(point_simplex_.data() + first, count,
                  reinterpret_cast<uint16_t*>(base + h.point_simplex) + first);
      std::copy_n(weight_.data() + first * d1, count * d1, weight + first * d1);
    });
    normalize(base, h, normalization);
  }

  // Row sums of the filter, and from them the scale of each point.
  void normalize(char* base, const LatticeHeader& h, Normalization normalization) {
    if (normalization == Normalization::kNone) return;
    auto* header = reinterpret_cast<LatticeHeader*>(base);
    header->normalization = static_cast<int64_t>(Normalization::kNone);
    T* scale = reinterpret_cast<T*>(base + h.scale);
    filter_ones(Lattice<T>(base), scale);
    header->normalization = h.normalization;
    const bool symmetric = normalization == Normalization::kSymmetric;
    T* weight = reinterpret_cast<T*>(base + h.weight);
    torch::stable::parallel_for(0, points_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T sum = scale[i] + T(1e-20);
        scale[i] = symmetric ? T(1) / std::sqrt(sum) : T(1) / sum;
      }
      if (!symmetric) return;
      for (int64_t i = begin; i < end; ++i) {
        for (int r = 0; r <= d_; ++r) weight[i * (d_ + 1) + r] *= scale[i];
      }
    });
  }

  const T* features_;
  int d_;
  Tiling tiling_;
  Chunking chunks_;
  int64_t points_;
  KeyFields<Key> fields_;
  std::vector<Chunk> found_;
  std::vector<int32_t> tile_simplices_;
  Workspace<int32_t> simplex_vertex_;  // of each chunk from its first point on
  Workspace<uint16_t> point_simplex_;
  Workspace<T> weight_;
  std::unique_ptr<KeyTable<Key>> table_;
  std::vector<int32_t> own_begin_, extra_begin_, merge_begin_, merge_row_;
  std::vector<Axis> axes_;
};

}  // namespace

template <typename T>
void build_lattice(const T* features, int64_t d, int64_t height, int64_t width,
                   Normalization normalization, const std::function<void*(int64_t)>& allocate) {
  const int64_t points = height * width;
  FASTSEG_CHECK(points * (d + 1) <= INT32_MAX,
                "permutohedral lattice: points * (features + 1) must be below 2^31, got ", points,
                " * ", d + 1);
  std::vector<T> low(static_cast<size_t>(d)), high(static_cast<size_t>(d));
  std::vector<char> finite(static_cast<size_t>(d), 1);
  torch::stable::parallel_for(0, d, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const auto at = static_cast<size_t>(k);
      finite[at] =
          lattice_kernels<T>().value_range(features + k * points, points, &low[at], &high[at]);
    }
  });
  double cell_low[kMaxFeatures + 1], cell_high[kMaxFeatures + 1];
  checked_cell_bounds(static_cast<int>(d), low.data(), high.data(), finite.data(), cell_low,
                      cell_high);
  KeyFields<uint64_t> fields;
  if (make_fields(static_cast<int>(d), cell_low, cell_high, &fields) <= 64) {
    Builder<uint64_t, T>(features, d, height, width, fields).build(normalization, allocate);
    return;
  }
  KeyFields<WideKey> wide;
  const int bits = make_fields(static_cast<int>(d), cell_low, cell_high, &wide);
  FASTSEG_CHECK(bits <= 128, "permutohedral lattice: ", d,
                " features over this range need vertex keys of ", bits,
                " bits, more than 128: divide them by larger standard deviations");
  Builder<WideKey, T>(features, d, height, width, wide).build(normalization, allocate);
}

template void build_lattice<float>(const float*, int64_t, int64_t, int64_t, Normalization,
                                   const std::function<void*(int64_t)>&);
template void build_lattice<double>(const double*, int64_t, int64_t, int64_t, Normalization,
                                    const std::function<void*(int64_t)>&);

}  // namespace fastseg
