// Tables that number distinct vertex keys, and the distinct simplices of a tile, on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "permutohedral/lattice_cpu.h"

namespace fastseg {

template <typename Key>
inline uint64_t hash_key(Key key) {
  uint64_t x = static_cast<uint64_t>(key);
  if constexpr (sizeof(Key) > 8) x ^= static_cast<uint64_t>(key >> 64) * 0x9e3779b97f4a7c15u;
  x *= 0x9e3779b97f4a7c15u;
  return x ^ (x >> 32);
}

// Numbers keys in the order of insertion. Open addressing with linear probing, at most half full.
template <typename Key>
class KeyTable {
 public:
  explicit KeyTable(int64_t entries) {
    int64_t capacity = 64;
    while (capacity < 2 * entries) capacity *= 2;
    resize(capacity);
  }
  const std::vector<Key>& keys() const { return keys_; }
  void prefetch(Key key) const { __builtin_prefetch(&slots_[hash_key(key) & mask_]); }
  // The number of `key`; -1 if it is not there.
  int32_t find(Key key) const {
    for (uint64_t at = hash_key(key) & mask_;; at = (at + 1) & mask_) {
      if (slots_[at].id < 0 || slots_[at].key == key) return slots_[at].id;
    }
  }
  int32_t insert(Key key) {
    for (uint64_t at = hash_key(key) & mask_;; at = (at + 1) & mask_) {
      if (slots_[at].id < 0) {
        const auto id = static_cast<int32_t>(keys_.size());
        slots_[at] = {key, id};
        keys_.push_back(key);
        if (keys_.size() > slots_.size() / 2) resize(2 * static_cast<int64_t>(slots_.size()));
        return id;
      }
      if (slots_[at].key == key) return slots_[at].id;
    }
  }

 private:
  struct Slot {
    Key key;
    int32_t id;
  };

  void resize(int64_t capacity) {
    slots_.assign(static_cast<size_t>(capacity), {Key(), -1});
    mask_ = static_cast<uint64_t>(capacity) - 1;
    for (size_t id = 0; id < keys_.size(); ++id) {
      uint64_t at = hash_key(keys_[id]) & mask_;
      while (slots_[at].id >= 0) at = (at + 1) & mask_;
      slots_[at] = {keys_[id], static_cast<int32_t>(id)};
    }
  }

  uint64_t mask_ = 0;
  std::vector<Slot> slots_;
  std::vector<Key> keys_;
};

// Numbers the simplices of a tile in the order of their first points. Without branches that depend
// on the data, except where two simplices meet in a slot: simplices change with every other point.
template <typename Key>
class TileSimplices {
 public:
  int count = 0;
  uint8_t first_point[kTilePoints];  // of each simplex

  void find(int n, const Key* key, const uint64_t* order, uint16_t* simplex) {
    for (int i = n; i-- > 0;) {
      hash_[i] = hash_key(key[i] ^ static_cast<Key>(order[i] * 0xd1342543de82ef95u)) % kSlots;
      slots_[hash_[i]] = static_cast<uint8_t>(i);
    }
    const auto same = [&](int i, int j) { return key[i] == key[j] && order[i] == order[j]; };
    uint16_t number[kTilePoints];
    int crowded[kTilePoints], crowd = 0;  // first points of simplices without a slot
    count = 0;
    for (int i = 0; i < n; ++i) {
      int first = slots_[hash_[i]];
      if (!same(first, i)) {
        int k = 0;
        while (k < crowd && !same(crowded[k], i)) ++k;
        if (k == crowd) crowded[crowd++] = i;
        first = crowded[k];
      }
      number[i] = static_cast<uint16_t>(count);
      first_point[count] = static_cast<uint8_t>(i);
      simplex[i] = number[first];
      count += first == i;
    }
  }

 private:
  static constexpr int kSlots = 2048;
  static_assert(kTilePoints <= 256, "points of a tile are numbered in 8 bits");
  uint16_t hash_[kTilePoints];
  uint8_t slots_[kSlots] = {};
};

}  // namespace fastseg
