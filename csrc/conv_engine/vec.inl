// Vectors of the instruction set in hand as compiler vector types: one source for zmm, ymm, xmm and
// NEON code. The register tile of the GEMM below uses kRows x 2 accumulators.
#if FASTSEG_ISA_LEVEL >= 2
constexpr int kLanes = 16;
// 28 accumulators + 2 of B + 1 of A in 32 registers. With AMX see amx_tile.inl.
constexpr int kRows = FASTSEG_ISA_LEVEL == 4 ? 32 : 14;
#elif FASTSEG_ISA_LEVEL == 1
constexpr int kLanes = 8;
constexpr int kRows = 6;  // 12 + 2 + 1 of 16
#else
constexpr int kLanes = 4;
constexpr int kRows = 6;
#endif
static_assert(kRows <= kMaxRows || FASTSEG_ISA_LEVEL == 4, "workspaces are sized by kMaxRows");

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef Vec UnalignedVec __attribute__((aligned(sizeof(float))));

FASTSEG_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
FASTSEG_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// Fetches a line into L2, or into L1 to be written. GCC drops loops of __builtin_prefetch, as
// without effect.
FASTSEG_INLINE void fetch_line(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 0, 2);
#endif
}
FASTSEG_INLINE void fetch_line_to_write(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 1);
#endif
}

// The first n < kLanes values at p; the others are 0 and are not touched.
FASTSEG_INLINE Vec load_part(const float* p, int64_t n) {
#if FASTSEG_ISA_LEVEL >= 2
  return n <= 0 ? Vec{} : (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  Vec v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
FASTSEG_INLINE void store_part(float* p, int64_t n, Vec v) {
#if FASTSEG_ISA_LEVEL >= 2
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

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
