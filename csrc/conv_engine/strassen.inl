// The products of strassen.h, and what becomes of each product Q, by its left operand:
//   0  A11 + A22  u = Q
//   1  A11        v = Q, w = u + Q
//   2  A11 + A12  u -= Q, C12 = v + Q
//   3  A21 + A22  v = Q, w -= Q
//   4  A22        u += Q, C21 = v + Q
//   5  A12 - A22  C11 = u + Q
//   6  A21 - A11  C22 = w + Q
// The lower block may have fewer rows than the upper one: those that are missing are zeros in the
// sums.

struct StrassenProduct {
  bool lower;   // of the lower block's rows alone
  bool writes;  // a block of C: of the lower rows if `lower`, of the right panel if `right`
  bool right;
};
constexpr StrassenProduct kStrassen[kStrassenProducts] = {
    {false, false, false}, {false, false, false}, {false, true, true}, {true, false, false},
    {true, true, false},   {false, true, false},  {true, true, true},
};
constexpr int kUpperLeft = 1, kLowerRight = 4;  // the products of A11 and A22

// What a pair of blocks keeps between the products of a pair of panels: register tiles, which stay
// in L1 or L2.
struct StrassenSums {
  alignas(64) float u[kRows * kPanel], v[kRows * kPanel], w[kRows * kPanel];
};

// A product Q that is wanted twice: to = from + sign * Q, and v + Q goes to `out`.
template <class Out>
struct StrassenSplit {
  Out out;
  float* v;  // may be null
  float* to;
  const float* from;
  float sign;

  FASTSEG_MEMBER_INLINE Vec start(int r, int64_t column) const {
    float* at = v + r * kPanel + column;
    if (out.add_first) store(at, load(at) + out.residual(r, column));
    return Vec{};
  }
  FASTSEG_MEMBER_INLINE void finish(int r, int64_t column, Vec q) const {
    const int64_t at = r * kPanel + column;
    store(to + at, load(from + at) + sign * q);
    out.finish(r, column, v ? load(v + at) + q + out.biases(column) : q);
  }
};

// One of the products: multiply(tile) makes it, `out` is the tile of the block of C that it writes.
// Sums are added behind the product: at its start they would be rounded with each of its terms.
template <class Out, class Multiply>
FASTSEG_INLINE void strassen_product(int product, StrassenSums& sums, Out out,
                                     const Multiply& multiply) {
  float *u = sums.u, *v = sums.v, *w = sums.w;
  switch (product) {
    case 0:
      return multiply(StoreTile{u});
    case 1:
      return multiply(StrassenSplit<StoreTile>{{v}, nullptr, w, u, 1});
    case 2:
      return multiply(StrassenSplit<Out>{out, v, u, u, -1});
    case 3:
      return multiply(StrassenSplit<StoreTile>{{v}, nullptr, w, w, -1});
    case 4:
      return multiply(StrassenSplit<Out>{out, v, u, u, 1});
    default:
      out.base = product == 5 ? u : w;
      return multiply(out);
  }
}

// The sums of n values of a row, n a multiple of kLanes, each from sums[product] + at on. a21 and
// a22 are null where the lower block does not have the row.
template <typename T, typename E>
static void strassen_sums(const T* a11, const T* a12, const T* a21, const T* a22, int64_t n,
                          E* const (&sums)[kStrassenProducts], int64_t at) {
  constexpr int64_t kAhead = 256;  // bytes; five rows at a time are too many for the hardware
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec left = load(a11 + i), right = load(a12 + i);
    const Vec below = a21 ? load(a21 + i) : Vec{}, across = a22 ? load(a22 + i) : Vec{};
    const auto write = [&](int product, Vec sum) __attribute__((always_inline)) {
      E* to = sums[product] + at + i;
      fetch_line_to_write(reinterpret_cast<char*>(to) + kAhead);
      store(to, sum);
    };
    write(0, left + across);
    write(2, left + right);
    write(3, below + across);
    write(5, right - across);
    write(6, below - left);
  }
}
