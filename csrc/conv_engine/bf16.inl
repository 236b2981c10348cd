// bfloat16 as storage, widened and rounded to nearest even on the way, and as operand of products
// that are summed in float32.

typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t)), may_alias));
typedef Halves UnalignedHalves __attribute__((aligned(sizeof(uint16_t))));
typedef Words UnalignedWords __attribute__((aligned(sizeof(uint32_t))));

FASTSEG_INLINE Vec widen(Halves halves) {
  // Of the plain form GCC 12 makes two halves and joins them: four instructions on one port.
#if FASTSEG_ISA_LEVEL >= 2
  const Words words = (Words)_mm512_cvtepu16_epi32((__m256i)halves);
#elif FASTSEG_ISA_LEVEL == 1
  const Words words = (Words)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  const Words words = __builtin_convertvector(halves, Words);
#endif
  return (Vec)(words << 16);
}

FASTSEG_INLINE Vec load(const BFloat16* p) {
  return widen(*reinterpret_cast<const UnalignedHalves*>(p));
}

FASTSEG_INLINE Halves narrow(Vec v) {
#if FASTSEG_ISA_LEVEL >= 3
  return (Halves)_mm512_cvtneps_pbh((__m512)v);  // subnormal numbers become 0
#else
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Words is_nan = (Words)(v != v);
  return __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), Halves);
#endif
}

FASTSEG_INLINE void store(BFloat16* p, Vec v) {
  *reinterpret_cast<UnalignedHalves*>(p) = narrow(v);
}

// Half of a register, so whole lines leave the write-combining buffers after two to eight of these.
FASTSEG_INLINE void store_stream(BFloat16* p, Vec v) {
#if FASTSEG_ISA_LEVEL >= 2
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(v));
#elif FASTSEG_ISA_LEVEL == 1
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow(v));
#else
  store(p, v);
#endif
}

// Vectors that are stored at once: two of bfloat16 make a line.
template <typename T>
constexpr int kTogether = FASTSEG_ISA_LEVEL >= 2 && sizeof(T) == 2 ? 2 : 1;

template <typename T>
FASTSEG_INLINE void store(T* p, const Vec (&v)[1]) {
  store(p, v[0]);
}
template <typename T>
FASTSEG_INLINE void store_stream(T* p, const Vec (&v)[1]) {
  store_stream(p, v[0]);
}
FASTSEG_INLINE void store(BFloat16* p, const Vec (&v)[2]) {
#if FASTSEG_ISA_LEVEL >= 3
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]));
#else
  store(p, v[0]);
  store(p + kLanes, v[1]);
#endif
}
FASTSEG_INLINE void store_stream(BFloat16* p, const Vec (&v)[2]) {
#if FASTSEG_ISA_LEVEL >= 3
  const auto line = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), line);
#else
  store_stream(p, v[0]);
  store_stream(p + kLanes, v[1]);
#endif
}

FASTSEG_INLINE Vec load_part(const BFloat16* p, int64_t n) {
#if FASTSEG_ISA_LEVEL >= 2
  const auto mask = static_cast<__mmask16>(n <= 0 ? 0 : (1u << n) - 1);
  return widen((Halves)_mm256_maskz_loadu_epi16(mask, p));
#else
  Halves halves{};
  for (int64_t i = 0; i < n; ++i) halves[i] = p[i].x;
  return widen(halves);
#endif
}

FASTSEG_INLINE void store_part(BFloat16* p, int64_t n, Vec v) {
#if FASTSEG_ISA_LEVEL >= 2
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)narrow(v));
#else
  const Halves halves = narrow(v);
  for (int64_t i = 0; i < n; ++i) p[i].x = halves[i];
#endif
}

// n values of storage type to n operands.
template <typename T>
FASTSEG_INLINE void copy_run(const T* src, T* dst, int64_t n) {
  std::memcpy(dst, src, n * sizeof(T));
}
FASTSEG_INLINE void copy_run(const BFloat16* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(src[i].x) << 16;
    std::memcpy(dst + i, &bits, sizeof bits);
  }
}

// A word of operands is a float, or two bfloat16 whose products are added to the same sum.
FASTSEG_INLINE uint32_t load_bits(const void* p) {
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}
FASTSEG_INLINE Vec load_words(const float* p) { return load(p); }
FASTSEG_INLINE Vec broadcast(float a) { return a - Vec{}; }
#if FASTSEG_ISA_LEVEL >= 2
// One to be broadcast is loaded as an integer: AMD's broadcast of a float from memory to 512 bits
// takes a turn of the pipes that multiply, that of an integer is a load alone.
struct FloatWord {
  uint32_t bits;
};
FASTSEG_INLINE FloatWord load_word(const float* p) { return {load_bits(p)}; }
FASTSEG_INLINE Vec broadcast(FloatWord a) { return (Vec)(a.bits - Words{}); }
#else
FASTSEG_INLINE float load_word(const float* p) { return *p; }
#endif
FASTSEG_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
#if FASTSEG_ISA_LEVEL >= 1
  // Left to itself the compiler puts the sum where a was and then spills two of 28 sums.
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#else
  return sum + a * b;
#endif
}

FASTSEG_INLINE uint32_t load_word(const BFloat16* p) { return load_bits(p); }
FASTSEG_INLINE Words broadcast(uint32_t a) { return a - Words{}; }
FASTSEG_INLINE Words load_words(const BFloat16* p) {
  return *reinterpret_cast<const UnalignedWords*>(p);
}
FASTSEG_INLINE Vec multiply_add(Vec sum, Words a, Words b) {
#if FASTSEG_ISA_LEVEL >= 3
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // as above
  return sum;
#else
  sum += (Vec)(a << 16) * (Vec)(b << 16);
  return sum + (Vec)(a & 0xffff0000) * (Vec)(b & 0xffff0000);
#endif
}
