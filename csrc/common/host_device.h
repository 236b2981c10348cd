// FASTSEG_HOST_DEVICE marks functions that CPU and CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define FASTSEG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTSEG_HOST_DEVICE inline __attribute__((always_inline))
#endif
