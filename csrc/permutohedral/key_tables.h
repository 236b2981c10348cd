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

// A number >= 0 for each key. Open addressing with linear probing, at most half full.
template <typename Key>
class KeyTable {
 public:
  explicit KeyTable(int64_t entries = 0) {
    int64_t capacity = 64;
    while (capacity < 2 * entries) capacity *= 2;
    slots_.assign(static_cast<size_t>(capacity), {Key(), -1});
  }
  void prefetch(Key key) const { __builtin_prefetch(&slots_[at(key)]); }
  // -1 if the key is not there.
  int32_t find(Key key) const {
    for (size_t i = at(key);; i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i].id < 0 || slots_[i].key == key) return slots_[i].id;
    }
  }
  // The number that the key has, `id` if it is new.
  int32_t insert(Key key, int32_t id) {
    for (size_t i = at(key);; i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i].id < 0) {
        slots_[i] = {key, id};
        if (++used_ > slots_.size() / 2) grow();
        return id;
      }
      if (slots_[i].key == key) return slots_[i].id;
    }
  }
  // fn(number) for every number.
  template <typename Fn>
  void replace(Fn&& fn) {
    for (Slot& slot : slots_) {
      if (slot.id >= 0) slot.id = fn(slot.id);
    }
  }

 private:
  struct Slot {
    Key key;
    int32_t id;
  };

  size_t at(Key key) const { return hash_key(key) & (slots_.size() - 1); }
  void grow() {
    std::vector<Slot> old(2 * slots_.size(), {Key(), -1});
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.id < 0) continue;
      size_t i = at(slot.key);
      while (slots_[i].id >= 0) i = (i + 1) & (slots_.size() - 1);
      slots_[i] = slot;
    }
  }

  size_t used_ = 0;
  std::vector<Slot> slots_;
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
