// One level of Strassen's matrix product in Winograd's form: seven products of halves instead of
// eight. The left operand is an upper and a lower block of rows, the right one two panels of
// columns, and the reduction is in two halves:
//   (C11 C12)   (A11 A12) (B11 B12)
//   (C21 C22) = (A21 A22) (B21 B22)
// See strassen.inl for the products.
#pragma once

#include <cstdint>

namespace fastseg {
namespace conv_engine {

constexpr int kStrassenProducts = 7;
constexpr int kStrassenSums = 4;  // of the left operand, beside A11, A12 and A22 themselves

// Right operands of the products, in their order. They are packed as panels of half the reduction,
// one product after the other: 7/4 of the memory of the plain panels.
inline void strassen_weights(double b11, double b12, double b21, double b22,
                             double (&operands)[kStrassenProducts]) {
  const double t1 = b12 - b11, t2 = b22 - t1;
  operands[0] = b11;
  operands[1] = b21;
  operands[2] = t2;
  operands[3] = b22 - b12;
  operands[4] = b21 - t2;
  operands[5] = t1;
  operands[6] = b22;
}

}  // namespace conv_engine
}  // namespace fastseg
