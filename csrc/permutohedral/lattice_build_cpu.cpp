// Builds the lattice: simplices of all points tile by tile, one vertex table, blur chains.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "common/check.h"
#include "common/workspace.h"
#include "permutohedral/filter.h"
#include "permutohedral/lattice_kernels.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {
namespace {

using torch::stable::parallel_for;
using WideKey = unsigned __int128;

template <typename Key>
inline uint64_t hash_key(Key key) {
  uint64_t x = static_cast<uint64_t>(key);
  if constexpr (sizeof(Key) > 8) x ^= static_cast<uint64_t>(key >> 64) * 0x9e3779b97f4a7c15u;
  x *= 0x9e3779b97f4a7c15u;
  return x ^ (x >> 32);
}

// Open addressing with linear probing; the capacity is fixed and at least 4/3 of the entries.
template <typename Key>
class KeyTable {
 public:
  explicit KeyTable(int64_t entries) : mask_(1) {
    while (mask_ < static_cast<uint64_t>(entries + entries / 3 + 1)) mask_ *= 2;
    slots_.resize(mask_, {Key(), -1});
    --mask_;
  }
  // The id of `key`; -1 if it is not there.
  int32_t find(Key key) const {
    for (uint64_t at = hash_key(key) & mask_;; at = (at + 1) & mask_) {
      if (slots_[at].id < 0 || slots_[at].key == key) return slots_[at].id;
    }
  }
  // The id of `key`, which becomes `id` if it was not there.
  int32_t insert(Key key, int32_t id) {
    for (uint64_t at = hash_key(key) & mask_;; at = (at + 1) & mask_) {
      if (slots_[at].id < 0) slots_[at] = {key, id};
      if (slots_[at].key == key) return slots_[at].id;
    }
  }

 private:
  struct Slot {
    Key key;
    int32_t id;
  };
  uint64_t mask_;
  std::vector<Slot> slots_;
};

// A small table for one tile, emptied by an epoch count.
template <typename Key>
class TileTable {
 public:
  explicit TileTable(int entries) : mask_(1) {
    while (mask_ < 2u * static_cast<uint32_t>(entries)) mask_ *= 2;
    slots_.resize(mask_, {Key(), 0, 0});
    --mask_;
  }
  void clear() { ++epoch_; }
  // The id of `key`, which becomes `id` if it was not there.
  uint16_t insert(Key key, uint64_t hash, uint16_t id) {
    for (uint32_t at = static_cast<uint32_t>(hash) & mask_;; at = (at + 1) & mask_) {
      Slot& slot = slots_[at];
      if (slot.epoch != epoch_) slot = {key, epoch_, id};
      if (slot.key == key) return slot.id;
    }
  }

 private:
  struct Slot {
    Key key;
    uint32_t epoch;
    uint16_t id;
  };
  uint32_t mask_, epoch_ = 0;
  std::vector<Slot> slots_;
};

template <typename Key>
struct SimplexKey {
  Key vertex;
  uint64_t order;
  bool operator==(const SimplexKey& other) const {
    return vertex == other.vertex && order == other.order;
  }
};

// What the tiles of one task found; tasks are joined in order.
template <typename Key>
struct TaskOutput {
  std::vector<Key> keys;                 // of the vertices of each tile, tile by tile
  std::vector<uint16_t> simplex_vertex;  // see Lattice
  std::vector<int32_t> tile_keys, tile_simplices;
};

template <typename Key, typename T>
class Builder {
 public:
  Builder(const T* features, int64_t d, int64_t height, int64_t width, const KeyFields<Key>& fields)
      : features_(features),
        d_(static_cast<int>(d)),
        tiling_(height, width),
        points_(height * width),
        fields_(fields),
        point_simplex_(points_),
        weight_(points_ * (d + 1)) {}

  void build(Normalization normalization, const std::function<void*(int64_t)>& allocate) {
    locate_tiles();
    number_vertices();
    link_neighbours();
    write(normalization, allocate);
  }

 private:
  static constexpr int kStride = kTilePoints;

  void locate_tiles() {
    const int64_t tiles = tiling_.count();
    tasks_.resize(static_cast<size_t>(std::min<int64_t>(tiles, 64)));
    const int64_t count = static_cast<int64_t>(tasks_.size());
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      TileScratch scratch(d_);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t t = i * tiles / count; t < (i + 1) * tiles / count; ++t) {
          locate_tile(t, scratch, &tasks_[static_cast<size_t>(i)]);
        }
      }
    });
  }

  struct TileScratch {
    explicit TileScratch(int d)
        : features(kStride * d),
          weight(kStride * (d + 1)),
          cell(kStride * (d + 1)),
          rank(kStride * (d + 1)),
          vertex_keys(kStride),
          orders(kStride),
          simplices(kStride),
          vertices(kStride * (d + 1)) {
      lattice_scale(d, scale);
    }
    T scale[kMaxFeatures];
    std::vector<T> features, weight;
    std::vector<int32_t> cell, rank;
    std::vector<Key> vertex_keys;
    std::vector<uint64_t> orders;
    TileTable<SimplexKey<Key>> simplices;
    TileTable<Key> vertices;
  };

  void locate_tile(int64_t tile, TileScratch& s, TaskOutput<Key>* out) {
    const int d1 = d_ + 1;
    const int64_t first = tiling_.first_point(tile);
    const int n = static_cast<int>(tiling_.points(tile));
    const int padded = (n + 15) / 16 * 16;
    for (int k = 0; k < d_; ++k) {
      T* row = &s.features[static_cast<size_t>(k * kStride)];
      tiling_.for_each_run(tile, [&](int64_t begin, int64_t length, int64_t position) {
        std::memcpy(row + position, features_ + k * points_ + begin,
                    static_cast<size_t>(length) * sizeof(T));
      });
      for (int i = n; i < padded; ++i) row[i] = row[0];
    }
    lattice_kernels<T>().locate_points(d_, padded, kStride, s.features.data(), s.scale,
                                       s.cell.data(), s.rank.data(), s.weight.data());
    // The key of the remainder-0 vertex, and a number for the order of the ranks. Ranks 1..d-1 in
    // base d + 1 and which of the last two coordinates is larger: at most 63 bits for d = 16.
    Key* key = s.vertex_keys.data();
    uint64_t* order = s.orders.data();
    const int32_t* rank = s.rank.data();
    for (int i = 0; i < n; ++i) {
      key[i] = 0;
      order[i] = rank[d_ * kStride + i] > rank[i] ? 1 : 0;
    }
    for (int j = 1; j <= d_; ++j) {
      const int32_t* cell = &s.cell[static_cast<size_t>(j * kStride)];
      const int64_t low = fields_.low[j];
      const int shift = fields_.shift[j];
      for (int i = 0; i < n; ++i) key[i] += static_cast<Key>(cell[i] - low) << shift;
      if (j < d_) {
        for (int i = 0; i < n; ++i) {
          order[i] =
              order[i] * static_cast<uint64_t>(d1) + static_cast<uint64_t>(rank[j * kStride + i]);
        }
      }
    }

    s.simplices.clear();
    s.vertices.clear();
    const size_t key_base = out->keys.size();
    int simplices = 0, keys = 0;
    uint16_t* simplex = point_simplex_.data() + first;
    for (int i = 0; i < n; ++i) {
      if (i > 0 && key[i] == key[i - 1] && order[i] == order[i - 1]) {
        simplex[i] = simplex[i - 1];
        continue;
      }
      const uint64_t hash = hash_key(key[i]) + (order[i] * 0xd1342543de82ef95u >> 40);
      simplex[i] = s.simplices.insert({key[i], order[i]}, hash, static_cast<uint16_t>(simplices));
      if (simplex[i] < simplices) continue;
      ++simplices;
      int axis_of_rank[kMaxFeatures + 1];
      for (int j = 0; j < d1; ++j) axis_of_rank[rank[j * kStride + i]] = j;
      Key vertex = key[i];
      for (int r = 0; r < d1; ++r) {
        const uint16_t id =
            s.vertices.insert(vertex, hash_key(vertex), static_cast<uint16_t>(keys));
        if (id == keys) {
          out->keys.push_back(vertex);
          ++keys;
        }
        out->simplex_vertex.push_back(id);
        vertex = next_in_simplex(fields_, vertex, axis_of_rank[d_ - r]);
      }
    }
    for (int i = 0; i < n; ++i) {
      T* weight = weight_.data() + (first + i) * d1;
      for (int r = 0; r < d1; ++r) weight[r] = s.weight[static_cast<size_t>(r * kStride + i)];
    }
    out->tile_keys.push_back(static_cast<int32_t>(out->keys.size() - key_base));
    out->tile_simplices.push_back(simplices);
  }

  // Gives every distinct key a number in the order of first use, and every (tile, vertex) pair a
  // row for its partial sum: the first pair of a vertex uses the vertex's own row.
  void number_vertices() {
    int64_t pairs = 0;
    for (const auto& task : tasks_) pairs += static_cast<int64_t>(task.keys.size());
    table_.reset(new KeyTable<Key>(pairs));
    pair_vertex_.reserve(static_cast<size_t>(pairs));
    for (const auto& task : tasks_) {
      for (const Key key : task.keys) {
        const int32_t id = table_->insert(key, static_cast<int32_t>(keys_.size()));
        if (id == static_cast<int32_t>(keys_.size())) {
          keys_.push_back(key);
          extras_.push_back(0);
        } else {
          ++extras_[static_cast<size_t>(id)];
        }
        pair_vertex_.push_back(id);
      }
    }
    merge_begin_.push_back(0);
    for (size_t v = 0; v < extras_.size(); ++v) {
      const int32_t count = extras_[v];
      extras_[v] = merge_begin_.back() - 1;  // the row before the next extra row of v
      if (count == 0) continue;
      merge_vertex_.push_back(static_cast<int32_t>(v));
      merge_begin_.push_back(merge_begin_.back() + count);
    }
    const auto vertices = static_cast<int32_t>(keys_.size());
    int32_t seen = 0;
    pair_row_.reserve(pair_vertex_.size());
    for (const int32_t v : pair_vertex_) {
      pair_row_.push_back(v == seen ? seen++ : vertices + ++extras_[static_cast<size_t>(v)]);
    }
  }

  void link_neighbours() {
    const auto vertices = static_cast<int64_t>(keys_.size());
    const int remainder_bits = d_ > 0 ? fields_.shift[1] : 1;
    axis_chain_begin_.resize(static_cast<size_t>(d_) + 1);
    axis_chain_vertex_.resize(static_cast<size_t>(d_) + 1);
    parallel_for(0, d_ + 1, 1, [&](int64_t first_axis, int64_t last_axis) {
      std::vector<int32_t> next(static_cast<size_t>(vertices));
      std::vector<bool> has_previous(static_cast<size_t>(vertices));
      for (int64_t axis = first_axis; axis < last_axis; ++axis) {
        has_previous.assign(static_cast<size_t>(vertices), false);
        for (size_t v = 0; v < next.size(); ++v) {
          const int remainder = static_cast<int>(keys_[v]) & ((1 << remainder_bits) - 1);
          next[v] = table_->find(neighbour(fields_, keys_[v], remainder, static_cast<int>(axis)));
          if (next[v] >= 0) has_previous[static_cast<size_t>(next[v])] = true;
        }
        auto& begin = axis_chain_begin_[static_cast<size_t>(axis)];
        auto& chain = axis_chain_vertex_[static_cast<size_t>(axis)];
        for (size_t v = 0; v < next.size(); ++v) {
          if (next[v] < 0 || has_previous[v]) continue;
          begin.push_back(static_cast<int32_t>(chain.size()));
          for (auto at = static_cast<int32_t>(v); at >= 0; at = next[static_cast<size_t>(at)]) {
            chain.push_back(at);
          }
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
    h.vertices = static_cast<int64_t>(keys_.size());
    h.pairs = static_cast<int64_t>(pair_vertex_.size());
    h.merges = static_cast<int64_t>(merge_vertex_.size());
    for (const auto& task : tasks_) {
      h.simplices += static_cast<int64_t>(task.simplex_vertex.size()) / d1;
    }
    for (int a = 0; a < d1; ++a) {
      h.chains += static_cast<int64_t>(axis_chain_begin_[static_cast<size_t>(a)].size());
      h.chain_vertices += static_cast<int64_t>(axis_chain_vertex_[static_cast<size_t>(a)].size());
    }
    int64_t end = sizeof(LatticeHeader);
    const auto place = [&](int64_t count, int64_t bytes) {
      const int64_t at = (end + 63) / 64 * 64;
      end = at + count * bytes;
      return at;
    };
    h.pair_begin = place(tiles + 1, 4);
    h.pair_vertex = place(h.pairs, 4);
    h.pair_row = place(h.pairs, 4);
    h.simplex_begin = place(tiles + 1, 4);
    h.simplex_vertex = place(h.simplices * d1, 2);
    h.point_simplex = place(points_, 2);
    h.weight = place(points_ * d1, sizeof(T));
    h.scale = place(points_, sizeof(T));
    h.merge_vertex = place(h.merges, 4);
    h.merge_begin = place(h.merges + 1, 4);
    h.axis_begin = place(d1 + 1, 4);
    h.chain_begin = place(h.chains + 1, 4);
    h.chain_vertex = place(h.chain_vertices, 4);
    h.bytes = end;

    char* base = static_cast<char*>(allocate(end));
    std::memcpy(base, &h, sizeof(h));
    const auto copy = [&](int64_t offset, const auto& values) {
      std::memcpy(base + offset, values.data(), values.size() * sizeof(values[0]));
    };
    auto* pair_begin = reinterpret_cast<int32_t*>(base + h.pair_begin);
    auto* simplex_begin = reinterpret_cast<int32_t*>(base + h.simplex_begin);
    int64_t tile = 0, written = 0;
    pair_begin[0] = simplex_begin[0] = 0;
    for (const auto& task : tasks_) {
      copy(h.simplex_vertex + written * 2, task.simplex_vertex);
      written += static_cast<int64_t>(task.simplex_vertex.size());
      for (size_t i = 0; i < task.tile_keys.size(); ++i, ++tile) {
        pair_begin[tile + 1] = pair_begin[tile] + task.tile_keys[i];
        simplex_begin[tile + 1] = simplex_begin[tile] + task.tile_simplices[i];
      }
    }
    copy(h.pair_vertex, pair_vertex_);
    copy(h.pair_row, pair_row_);
    copy(h.merge_vertex, merge_vertex_);
    copy(h.merge_begin, merge_begin_);
    auto* axis_begin = reinterpret_cast<int32_t*>(base + h.axis_begin);
    auto* chain_begin = reinterpret_cast<int32_t*>(base + h.chain_begin);
    auto* chain_vertex = reinterpret_cast<int32_t*>(base + h.chain_vertex);
    int32_t chains = 0, entries = 0;
    for (int a = 0; a < d1; ++a) {
      axis_begin[a] = chains;
      for (const int32_t begin : axis_chain_begin_[static_cast<size_t>(a)]) {
        chain_begin[chains++] = entries + begin;
      }
      const auto& chain = axis_chain_vertex_[static_cast<size_t>(a)];
      std::copy(chain.begin(), chain.end(), chain_vertex + entries);
      entries += static_cast<int32_t>(chain.size());
    }
    axis_begin[d1] = chains;
    chain_begin[chains] = entries;
    std::memcpy(base + h.point_simplex, point_simplex_.data(), static_cast<size_t>(points_) * 2);
    std::memcpy(base + h.weight, weight_.data(), static_cast<size_t>(points_ * d1) * sizeof(T));
    normalize(base, h, normalization);
  }

  // Row sums of the filter, and from them the scale of each point.
  void normalize(char* base, LatticeHeader h, Normalization normalization) {
    auto* header = reinterpret_cast<LatticeHeader*>(base);
    header->largest_weight = 1.001;  // barycentric weights sum to 1 up to rounding
    if (normalization == Normalization::kNone) return;
    header->normalization = static_cast<int64_t>(Normalization::kNone);
    Workspace<T> row_sum(points_);
    filter_ones(Lattice<T>(base), row_sum.data());
    header->normalization = h.normalization;
    const bool symmetric = normalization == Normalization::kSymmetric;
    if (normalization != Normalization::kBefore) {
      const T least = *std::min_element(row_sum.data(), row_sum.data() + points_) + T(1e-20);
      header->largest_weight *= symmetric ? 1 / std::sqrt(least) : 1 / least;
    }
    T* scale = reinterpret_cast<T*>(base + h.scale);
    T* weight = reinterpret_cast<T*>(base + h.weight);
    parallel_for(0, points_, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T sum = row_sum[i] + T(1e-20);
        scale[i] = symmetric ? T(1) / std::sqrt(sum) : T(1) / sum;
        if (!symmetric) continue;
        for (int r = 0; r <= d_; ++r) weight[i * (d_ + 1) + r] *= scale[i];
      }
    });
  }

  const T* features_;
  int d_;
  Tiling tiling_;
  int64_t points_;
  KeyFields<Key> fields_;
  std::vector<TaskOutput<Key>> tasks_;
  Workspace<uint16_t> point_simplex_;
  Workspace<T> weight_;
  std::unique_ptr<KeyTable<Key>> table_;
  std::vector<Key> keys_;
  std::vector<int32_t> extras_, pair_vertex_, pair_row_, merge_vertex_, merge_begin_;
  std::vector<std::vector<int32_t>> axis_chain_begin_, axis_chain_vertex_;
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
  parallel_for(0, d, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const T* row = features + k * points;
      T least = row[0], most = row[0], sum = 0;
      for (int64_t i = 0; i < points; ++i) {
        least = row[i] < least ? row[i] : least;
        most = row[i] > most ? row[i] : most;
        sum += row[i] * 0;  // NaN if any value is not finite
      }
      low[static_cast<size_t>(k)] = least;
      high[static_cast<size_t>(k)] = most;
      finite[static_cast<size_t>(k)] = sum == 0;
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
