// One level of Strassen's matrix product (1969): seven products of halves instead of eight. The
// left operand is an upper and a lower block of rows, the right one two panels of columns, and the
// reduction is in two halves:
//   (C11 C12)   (A11 A12) (B11 B12)
//   (C21 C22) = (A21 A22) (B21 B22)
// See strassen.inl for the products. Winograd's form has three additions fewer, but sums of up to
// four blocks: rounded to bfloat16 they have 1.3 times the error.
#pragma once

#include <cstdint>

namespace fastseg {
namespace conv_engine {

constexpr int kStrassenProducts = 7;
constexpr int kStrassenSums = 5;  // of the left operand, beside A11 and A22 themselves

// Right operands of the products, in their order. They are packed as panels of half the reduction,
// one product after the other: 7/4 of the memory of the plain panels.
inline void strassen_weights(double b11, double b12, double b21, double b22,
                             double (&operands)[kStrassenProducts]) {
  operands[0] = b11 + b22;
  operands[1] = b12 - b22;
  operands[2] = b22;
  operands[3] = b11;
  operands[4] = b21 - b11;
  operands[5] = b21 + b22;
  operands[6] = b11 + b12;
}

}  // namespace conv_engine
}  // namespace fastseg
