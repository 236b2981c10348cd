// widen and narrow: runs of n elements between storage type T and its accumulation type. Include it
// inside a kernel file, once per instruction set. Half and BFloat16 are converted with the vector
// unit, rounding to nearest even; NaN stays NaN.

template <typename T>
inline void widen(const T* src, typename Accumulate<T>::type* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<typename Accumulate<T>::type>(src[i]);
}

template <>
inline void widen<BFloat16>(const BFloat16* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(src[i].x) << 16;
    std::memcpy(dst + i, &bits, sizeof bits);
  }
}

template <typename T>
inline void narrow(const typename Accumulate<T>::type* src, T* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<T>(src[i]);
}

template <>
inline void narrow<BFloat16>(const float* src, BFloat16* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, src + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    dst[i].x = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
  }
}

#if FASTSEG_ISA_LEVEL >= 1  // F16C
template <>
inline void widen<Half>(const Half* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(dst + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
  for (; i < n; ++i) dst[i] = static_cast<float>(src[i]);
}

template <>
inline void narrow<Half>(const float* src, Half* dst, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) dst[i] = static_cast<Half>(src[i]);
}
#endif
