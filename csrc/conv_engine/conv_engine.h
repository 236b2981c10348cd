// What crosses from the host functions of the convolution engine to its kernels: sizes, strides in
// elements, pointers and the arithmetic on them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

namespace fastseg {
namespace conv_engine {

using torch::headeronly::BFloat16;

// Weights are packed in panels of this many output channels, the same for every instruction set:
// one AVX-512 register tile is 32 wide, narrower ones cut a panel into parts.
constexpr int64_t kPanel = 32;
// Channels (the reduction) are packed in groups of one cache line: 16 words, each of them a float
// or two bfloat16 of neighbouring channels.
constexpr int64_t kGroup = 16;
template <typename E>
constexpr int64_t kPerWord = sizeof(float) / sizeof(E);
template <typename E>
constexpr int64_t kLine = kGroup * kPerWord<E>;
// Up to so many output channels a matrix product is not worth its panel (narrow_conv.inl).
constexpr int64_t kNarrowOutputs = 8;
// Rows of the largest register tile of float32 operands.
constexpr int kMaxRows = 14;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

enum class Activation : int {
  kNone = 0,
  kRelu = 1,
  kLeakyRelu = 2,  // up to here one or two instructions, see epilogue.inl
  kRelu6 = 3,
  kHardSwish = 4,
  kHardSigmoid = 5,
  kSilu = 6,
  kSigmoid = 7,
  kGelu = 8,
  kGeluTanh = 9,
};
constexpr int64_t kActivations = 10;

// A channels-last image batch: the channel stride is 1.
template <typename T>
struct Image {
  T* data;
  int64_t batch, row, pixel;  // strides
  T* at(int64_t n, int64_t y, int64_t x) const { return data + n * batch + y * row + x * pixel; }
};

// T: how images are stored. E: what is multiplied, that is packed weights and transformed input;
// sums are float32. Images in bfloat16 work with both, float32 images with float32 alone.
// Y: how the result is stored, of bfloat16 products also as float32.
template <typename T, typename E, typename Y = T>
struct Convolution {
  using Source = T;  // what x is stored as
  using Storage = T;
  using Operand = E;
  using Result = Y;
  int64_t N, C, H, W;  // input
  int64_t K, Ho, Wo;   // output
  int64_t R, S;        // kernel
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Image<const T> x;
  Image<Y> y;
  Image<const T> residual;  // data == nullptr: none
  const E* weight;          // packed, see the kernel in question
  const float* bias;        // K rounded up to kPanel
  Activation activation;
  float slope;
  bool residual_last;  // it is added behind the activation
  int64_t strassen;    // levels of Strassen's algorithm in the products, see strassen.inl
  bool stream;         // write y past the caches
  // Max pooling by 2x2 windows with stride 2, see conv_pool.inl. Where x is such a pooled image to
  // be unpooled, x_codes says where in its window each value belongs.
  Image<const uint8_t> x_codes;  // data == nullptr: x is the image itself
  Image<T> pooled;               // of y; data == nullptr: not wanted. Else y.data may be null
  Image<uint8_t> codes;          // and where in its window each maximum lies, or null
  int64_t Hp, Wp;                // windows
  // A 1x1 convolution of another image to be summed with a 1x1 convolution: the reduction goes on
  // with its channels.
  Image<const T> x2;
  int64_t C2;  // 0: none
  int64_t stride2_h, stride2_w;
  // By what the channels of an image are multiplied before a 1x1 convolution, (N, C).
  const T* scale;  // nullptr: nothing
  int64_t scale_batch;

  int64_t pixels() const { return N * Ho * Wo; }
  int64_t panels() const { return ceil_div(K, kPanel); }
  // Lengths of the reduction of a tap and of the GEMM form, a whole number of lines.
  int64_t channels() const { return round_up(C, kLine<E>); }
  int64_t depth() const { return round_up(R * S * C + C2, kLine<E>); }

  // Whether every output pixel reads one pixel of the input, one after the other in memory.
  bool is_pointwise() const {
    return R == 1 && S == 1 && stride_h == 1 && stride_w == 1 && pad_h == 0 && pad_w == 0 &&
           (H == 1 || x.row == W * flat_stride()) && (N == 1 || x.batch == H * W * flat_stride());
  }
  int64_t flat_stride() const { return W > 1 ? x.pixel : H > 1 ? x.row : x.batch; }

  // What output pixel (oy, ox) reads of the other image, and whether such pixels follow each other.
  const T* summand(int64_t n, int64_t oy, int64_t ox) const {
    return x2.at(n, oy * stride2_h, ox * stride2_w);
  }
  bool summand_is_flat() const {
    return stride2_h == 1 && stride2_w == 1 && (Ho == 1 || x2.row == Wo * x2.pixel) &&
           (N == 1 || x2.batch == Ho * Wo * x2.pixel);
  }
};

// How the matrix product of a convolution is cut into blocks of output pixels, see gemm_conv.inl.
struct GemmForm {
  enum Rows {
    kFlat,      // any pixels that follow each other: 1x1 on a dense image
    kLines,     // pixels of one line of output
    kGathered,  // any pixels, each with its taps copied to one place: very narrow images, pixels
                // whose lines would share a set of L1, and those that are multiplied by a scale
  } rows;
  int64_t taps;          // of a kernel row that are read as one run
  int64_t blocks;        // all of them
  int64_t line_blocks;   // those of a line
  int64_t width, copy;   // pixels of a line and operands that the copy of a block takes
  int64_t row;           // operands from one gathered pixel to the next
  int64_t summand_copy;  // where in it those of the second image begin
  int64_t height;        // rows of the tiles of AMX
  int64_t operands;      // that come into L2 with each block of a task
  bool panels_first;     // the outer loop; else the blocks
};

// Of bfloat16 images whose result is the last of a network and wanted in float32.
using WidenedConvolution = Convolution<BFloat16, BFloat16, float>;

// Where an output pixel lies, and its residual or null.
template <class Conv>
struct PixelAddress {
  typename Conv::Result* y;
  const typename Conv::Storage* residual;
};

// Part i of n nearly equal parts of [0, total) begins here.
inline int64_t part_begin(int64_t total, int64_t n, int64_t i) { return total * i / n; }

}  // namespace conv_engine
}  // namespace fastseg
