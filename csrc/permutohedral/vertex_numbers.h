// Numbers the vertices of a lattice from those that its chunks of points found, see lattice_cpu.h.
#pragma once

#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "common/workspace.h"
#include "permutohedral/key_tables.h"

namespace fastseg {

// Every distinct key gets a number in the order of first use, and every (chunk, vertex) pair a row:
// the first chunk uses the vertex's own, the others an extra one.
//
// Keys are dealt to parts by their hash. A thread goes through the pairs of a part chunk by chunk,
// with a table that a near cache holds; neither numbers nor rows depend on the parts.
template <typename Key>
class VertexNumbers {
 public:
  // chunks[c]: the distinct keys of chunk c in the order of first use.
  explicit VertexNumbers(const std::vector<std::vector<Key>>& chunks)
      : chunks_(static_cast<int64_t>(chunks.size())),
        begin_(pairs_begin(chunks)),
        id_(begin_.back()),
        row_(begin_.back()),
        own_begin(chunks.size() + 1),
        extra_begin(chunks.size() + 1) {
    while (bits_ < kMostBits && int64_t{kPartPairs} << bits_ < begin_.back()) ++bits_;
    parts_ = int64_t{1} << bits_;
    Workspace<int32_t> pair(begin_.back()), part_begin(chunks_ * (parts_ + 1));
    deal(chunks, pair.data(), part_begin.data());
    const auto for_each_pair = [&](int64_t p, auto&& fn) {
      for (int64_t c = 0; c < chunks_; ++c) {
        const int32_t* begin = part_begin.data() + c * (parts_ + 1) + p;
        for (int32_t i = begin[0]; i < begin[1]; ++i) fn(pair[i], c);
      }
    };

    Workspace<int32_t> first(begin_.back());  // pair of the same vertex
    tables_.resize(static_cast<size_t>(parts_));
    parallel_tasks(parts_, [&](int64_t p) {
      KeyTable<Key>& table = tables_[static_cast<size_t>(p)];
      table = KeyTable<Key>(begin_.back() / parts_ / 2);
      for_each_pair(p, [&](int32_t i, int64_t c) {
        const Key* key = chunks[static_cast<size_t>(c)].data();
        first[i] = table.insert(key[i - begin_[static_cast<size_t>(c)]], i);
      });
    });
    number(chunks, first.data());

    merge_begin.assign(static_cast<size_t>(vertices()) + 1, 0);
    merge_row.resize(static_cast<size_t>(extra_begin.back()));
    int32_t *begin = merge_begin.data(), *row = merge_row.data();
    parallel_tasks(parts_, [&](int64_t p) {  // all pairs of a vertex are in one part
      for_each_pair(p, [&](int32_t i, int64_t) {
        if (first[i] == i) return;
        id_[i] = id_[first[i]];
        ++begin[id_[i] + 1];
      });
      tables_[static_cast<size_t>(p)].replace([&](int32_t i) { return id_[i]; });
    });
    for (int32_t v = 0; v < vertices(); ++v) begin[v + 1] += begin[v];
    std::vector<int32_t> next_row(merge_begin);
    int32_t* next = next_row.data();
    parallel_tasks(merge_row.empty() ? 0 : parts_, [&](int64_t p) {
      for_each_pair(p, [&](int32_t i, int64_t) {
        if (first[i] != i) row[next[id_[i]]++] = row_[i];
      });
    });
  }

  int32_t vertices() const { return own_begin.back(); }
  // Of the vertices of a chunk, in its own order.
  const int32_t* id(int64_t c) const { return id_.data() + begin_[static_cast<size_t>(c)]; }
  const int32_t* row(int64_t c) const { return row_.data() + begin_[static_cast<size_t>(c)]; }
  // The number of a key; -1 if it is no vertex.
  int32_t find(Key key) const { return tables_[part(key)].find(key); }
  void prefetch(Key key) const { tables_[part(key)].prefetch(key); }

 private:
  static constexpr int kPartPairs = 1024, kMostBits = 6;

  static std::vector<int32_t> pairs_begin(const std::vector<std::vector<Key>>& chunks) {
    std::vector<int32_t> begin{0};
    for (const auto& keys : chunks)
      begin.push_back(begin.back() + static_cast<int32_t>(keys.size()));
    return begin;
  }
  size_t part(Key key) const { return static_cast<size_t>(hash_key(key) >> 1 >> (63 - bits_)); }

  // Sorts the pairs of each chunk by part: those of part p lie at part_begin[c][p]..
  void deal(const std::vector<std::vector<Key>>& chunks, int32_t* pair, int32_t* part_begin) {
    parallel_tasks(chunks_, [&](int64_t c) {
      const std::vector<Key>& keys = chunks[static_cast<size_t>(c)];
      int32_t next[1 << kMostBits] = {};
      for (const Key key : keys) ++next[part(key)];
      int32_t at = begin_[static_cast<size_t>(c)];
      int32_t* begin = part_begin + c * (parts_ + 1);
      for (int64_t p = 0; p < parts_; ++p) {
        begin[p] = at;
        at += next[p];
        next[p] = begin[p];
      }
      begin[parts_] = at;
      at = begin[0];
      for (const Key key : keys) pair[next[part(key)]++] = at++;
    });
  }

  // Numbers of the vertices where they come first, and rows of all pairs.
  void number(const std::vector<std::vector<Key>>& chunks, const int32_t* first) {
    parallel_tasks(chunks_, [&](int64_t c) {
      const auto at = static_cast<size_t>(c);
      int32_t own = 0;
      for (int32_t i = begin_[at]; i < begin_[at + 1]; ++i) own += first[i] == i;
      own_begin[at + 1] = own;
      extra_begin[at + 1] = begin_[at + 1] - begin_[at] - own;
    });
    for (size_t c = 0; c < chunks.size(); ++c) {
      own_begin[c + 1] += own_begin[c];
      extra_begin[c + 1] += extra_begin[c];
    }
    keys.resize(static_cast<size_t>(vertices()));
    parallel_tasks(chunks_, [&](int64_t c) {
      const auto at = static_cast<size_t>(c);
      int32_t id = own_begin[at], row = vertices() + extra_begin[at];
      for (int32_t i = begin_[at]; i < begin_[at + 1]; ++i) {
        if (first[i] != i) {
          row_[i] = row++;
          continue;
        }
        keys[static_cast<size_t>(id)] = chunks[at][static_cast<size_t>(i - begin_[at])];
        id_[i] = row_[i] = id++;
      }
    });
  }

  int64_t chunks_, parts_ = 1;
  int bits_ = 0;
  std::vector<int32_t> begin_;  // pairs of each chunk
  Workspace<int32_t> id_, row_;
  std::vector<KeyTable<Key>> tables_;

 public:
  std::vector<Key> keys;                                                // of the vertices
  std::vector<int32_t> own_begin, extra_begin, merge_begin, merge_row;  // as in Lattice
};

}  // namespace fastseg
