// Vectors of the instruction set in hand as compiler vector types: one source for zmm, ymm, xmm and
// NEON code. The register tile of the GEMM below uses kRows x 2 accumulators.
#if FASTSEG_ISA_LEVEL >= 2
constexpr int kLanes = 16;
constexpr int kRows = 14;  // 28 accumulators + 2 of B + 1 of A in 32 registers
#elif FASTSEG_ISA_LEVEL == 1
constexpr int kLanes = 8;
constexpr int kRows = 6;  // 12 + 2 + 1 of 16
#else
constexpr int kLanes = 4;
constexpr int kRows = 6;
#endif
static_assert(kRows <= kMaxRows, "workspaces are sized by kMaxRows");

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef Vec UnalignedVec __attribute__((aligned(sizeof(float))));

FASTSEG_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
FASTSEG_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// Writes past the caches; p must be aligned to the vector.
FASTSEG_INLINE void store_stream(float* p, Vec v) {
#if FASTSEG_ISA_LEVEL >= 2
  _mm512_stream_ps(p, (__m512)v);
#elif FASTSEG_ISA_LEVEL == 1
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}

// Makes streamed data visible to other threads before anything that follows.
FASTSEG_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
