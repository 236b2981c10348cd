// Scratch memory that stays warm between calls: fresh pages cost more than the work on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastseg {

// Freed blocks, kept for reuse up to a total of kKept bytes; the newest stay.
class WorkspacePool {
 public:
  static constexpr size_t kKept = size_t{256} << 20;
  static constexpr size_t kHugePage = size_t{2} << 20;

  struct Block {
    void* data;
    size_t bytes;
  };

  static WorkspacePool& instance() {
    static WorkspacePool* pool = new WorkspacePool;  // never destroyed: threads may outlive main
    return *pool;
  }

  // A block of so many bytes, or one that is there of up to `most` times as many.
  Block take(size_t bytes, double most) {
    bytes = (bytes + 4095) / 4096 * 4096;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      size_t best = free_.size();
      for (size_t i = 0; i < free_.size(); ++i) {
        if (free_[i].bytes >= bytes &&
            static_cast<double>(free_[i].bytes) <= most * static_cast<double>(bytes) &&
            (best == free_.size() || free_[i].bytes < free_[best].bytes)) {
          best = i;
        }
      }
      if (best < free_.size()) {
        const Block block = free_[best];
        free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(best));
        kept_ -= block.bytes;
        return block;
      }
    }
    // Not a multiple of the alignment: a huge page for the tail would be resident in full.
    void* data = nullptr;
    if (posix_memalign(&data, bytes >= kHugePage ? kHugePage : 4096, bytes) != 0) {
      throw std::bad_alloc();
    }
#if defined(__linux__)
    if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return {data, bytes};
  }

  void give(Block block) {
    std::vector<void*> evicted;  // the oldest ones, freed without the lock
    if (block.bytes > kKept) {
      evicted.push_back(block.data);
    } else {
      std::lock_guard<std::mutex> lock(mutex_);
      size_t oldest = 0;
      for (; kept_ + block.bytes > kKept; ++oldest) {
        kept_ -= free_[oldest].bytes;
        evicted.push_back(free_[oldest].data);
      }
      free_.erase(free_.begin(), free_.begin() + static_cast<std::ptrdiff_t>(oldest));
      kept_ += block.bytes;
      free_.push_back(block);
    }
    for (void* data : evicted) std::free(data);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> free_;
  size_t kept_ = 0;
};

// An uninitialised array of `count` trivially copyable T from the pool, aligned to a page.
template <typename T>
class Workspace {
 public:
  explicit Workspace(int64_t count)
      : block_(WorkspacePool::instance().take(static_cast<size_t>(count) * sizeof(T) + 64, 4)) {}
  ~Workspace() {
    if (block_.data != nullptr) WorkspacePool::instance().give(block_);
  }
  Workspace(Workspace&& other) noexcept : block_(std::exchange(other.block_, {nullptr, 0})) {}
  Workspace& operator=(Workspace&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  // Gives the memory back to the system instead of the pool if it is more than twice the `image`
  // bytes that could have it next, and not small: it would lie beside the other arrays of a
  // training step. The page faults that bring it back do not show in the time of one.
  void release_beyond(int64_t image) {
    constexpr size_t kSmall = size_t{4} << 20;
    if (block_.bytes <= kSmall || block_.bytes / 2 <= static_cast<size_t>(image)) return;
    std::free(std::exchange(block_, {nullptr, 0}).data);
  }
  T* data() const { return static_cast<T*>(block_.data); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  WorkspacePool::Block block_;
};

}  // namespace fastseg
