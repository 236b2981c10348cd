// Sizes of the caches, for CPU kernels that cut their work to fit.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace fastseg {

// Bytes of L2 per core; 1 MB where the system does not say.
inline int64_t l2_bytes() {
  static const int64_t bytes = [] {
    int64_t size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return size > 0 ? size : int64_t{1} << 20;
  }();
  return bytes;
}

}  // namespace fastseg
