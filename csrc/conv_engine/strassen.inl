// The products of strassen.h, and what becomes of each product Q, by its left operand:
//   0  A11   u  = Q
//   1  A12   C11 = u + Q
//   2  S2    u += Q
//   3  S3    w  = u + Q
//   4  A22   C21 = w + Q
//   5  S1    u += Q, C22 = w + Q
//   6  S4    C12 = u + Q
// with S1 = A21 + A22, S2 = S1 - A11, S3 = A11 - A21, S4 = A12 - S2. The lower block may have fewer
// rows than the upper one: those that are missing are zeros in the sums.

struct StrassenProduct {
  bool lower;   // of the lower block's rows alone
  bool writes;  // a block of C: of the lower rows if `lower`, of the right panel if `right`
  bool right;
};
constexpr StrassenProduct kStrassen[kStrassenProducts] = {
    {false, false, false}, {false, true, false}, {false, false, false}, {true, false, false},
    {true, true, false},   {true, true, true},   {false, true, true},
};

// What a pair of blocks keeps between the products of a pair of panels: register tiles, which stay
// in L1 or L2.
struct StrassenSums {
  alignas(64) float u[kRows * kPanel], w[kRows * kPanel];
};

// Product 5: it is wanted in u and in C22.
template <class Out>
struct StrassenSplit {
  Out out;
  float *u, *w;
  const float* base = nullptr;  // to be added to the product, kRows x kPanel

  FASTSEG_MEMBER_INLINE Vec start(int r, int64_t column) const {
    float* to = w + r * kPanel + column;
    store(to, load(to) + out.start(r, column));
    return Vec{};
  }
  FASTSEG_MEMBER_INLINE void finish(int r, int64_t column, Vec q) const {
    const int64_t at = r * kPanel + column;
    if (base) q += load(base + at);
    store(u + at, load(u + at) + q);
    out.finish(r, column, load(w + at) + q);
  }
};

// One of the products: multiply(tile) makes it, `out` is the tile of the block of C that it writes.
// Sums are added behind the product: at its start they would be rounded with each of its terms.
template <class Out, class Multiply>
FASTSEG_INLINE void strassen_product(int product, StrassenSums& sums, Out out,
                                     const Multiply& multiply) {
  float *u = sums.u, *w = sums.w;
  switch (product) {
    case 0:
      return multiply(StoreTile{u});
    case 2:
      return multiply(StoreTile{u, false, kPanel, u});
    case 3:
      return multiply(StoreTile{w, false, kPanel, u});
    case 5:
      return multiply(StrassenSplit<Out>{out, u, w});
    default:
      out.base = product == 4 ? w : u;
      return multiply(out);
  }
}

// S1 to S4 of n values of a row, n a multiple of kLanes. a21 and a22 are null where the lower block
// does not have the row.
template <typename T>
static void strassen_sums(const T* a11, const T* a12, const T* a21, const T* a22, int64_t n,
                          float* s1, float* s2, float* s3, float* s4) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec upper = load(a11 + i);
    const Vec lower = a21 ? load(a21 + i) : Vec{};
    const Vec sum = a22 ? lower + load(a22 + i) : lower;
    store(s1 + i, sum);
    store(s2 + i, sum - upper);
    store(s3 + i, upper - lower);
    store(s4 + i, load(a12 + i) - (sum - upper));
  }
}
