// The gradient of a convolution in its weight on tensor cores: for each tap a matrix product of dy
// and the shifted x over the output pixels that read inside the image there. Rows of a tile are
// output channels, columns input channels, a step is 32 pixels.
#include "conv_bn/conv_tile.cuh"

namespace fastseg {
namespace {

constexpr int kPixels = 32;  // of a step

// Where chunk `chunk` of a pixel's `kRow` channels lies: permuted so that the 8 pixels of an
// ldmatrix fall into different banks.
template <int kRow>
__device__ __forceinline__ int swizzled(int pixel, int chunk) {
  return pixel * kRow * 2 + (chunk ^ (pixel & 7)) * 16;
}

// A pixel of a rectangle of every image, as the walk through them goes.
struct Walk {
  int n, row, col;
  __device__ void advance(int by, int height, int width) {
    for (col += by; col >= width; col -= width) {
      if (++row == height) row = 0, ++n;
    }
  }
};

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    conv_weight_gradient(const __grid_constant__ ConvWeightGradient conv, StreamK stream_k,
                         const T* x, const T* dy, T* dweight) {
  constexpr int kRowChunks = kConvTile / 8, kColumnChunks = kColumns / 8;  // of 16 bytes
  constexpr int kRowStep = kThreads / kRowChunks, kColumnStep = kThreads / kColumnChunks;
  FASTSEG_DYNAMIC_SHARED(shared);
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  const Schedule& schedule = conv.schedule;
  const ConvAxis &rows = conv.rows, &cols = conv.cols;
  const int taps = rows.taps * cols.taps, column_tiles = ceil_div(conv.C, kColumns);
  const int begin = schedule.first_step(blockIdx.x);
  for (int end = schedule.first_step(blockIdx.x + 1); end > begin;) {
    const int last = end;
    const TilePart part = last_part(schedule, begin, last);
    end = part.first_step + part.begin;
    const int tap = static_cast<int>(part.run.taps);

    // The rectangle of output pixels that read inside the image under this tap.
    const auto range = [](const ConvAxis& a, int offset, int* first) {
      *first = offset >= 0 ? 0 : min(ceil_div(-offset, a.stride), a.out);
      const int last = offset >= a.in ? 0 : (a.in - 1 - offset) / a.stride + 1;
      return max(min(last, a.out) - *first, 0);
    };
    const int down = tap / cols.taps * rows.dilation - rows.padding;
    const int right = tap % cols.taps * cols.dilation - cols.padding;
    int top, left;
    int height = range(rows, down, &top), width = range(cols, right, &left);
    const int images = height > 0 && width > 0 ? conv.N : 0;
    height = max(height, 1), width = max(width, 1);  // of none, to walk through

    // Pixels of this thread's copies: the first, then every kRowStep-th (dy) or kColumnStep-th (x).
    const auto start = [&](int first) {
      const int64_t at = int64_t{part.begin} * kPixels + first;
      const int64_t line = at / width;
      return Walk{static_cast<int>(line / height), static_cast<int>(line % height),
                  static_cast<int>(at - line * width)};
    };
    Walk walk = start(t / kRowChunks), x_walk{};
    if constexpr (kRowStep != kColumnStep) x_walk = start(t / kColumnChunks);
    const int k = part.tile / column_tiles * kConvTile + t % kRowChunks * 8;
    const int c = part.tile % column_tiles * kColumns + t % kColumnChunks * 8;
    const auto copy_x = [&](unsigned char* b, int pixel, const Walk& at) {
      const bool valid = at.n < images && c < conv.C;
      const int row = (top + at.row) * rows.stride + down;
      const int col = (left + at.col) * cols.stride + right;
      const int64_t from = (int64_t{at.n} * rows.in + row) * cols.in + col;
      cp_async_16(b + swizzled<kColumns>(pixel, t % kColumnChunks),
                  valid ? x + from * conv.x_stride + c : x, valid);
    };
    const auto copy = [&](unsigned char* a) {
      unsigned char* b = a + kConvTile * kStepBytes;
#pragma unroll
      for (int i = 0; i < kPixels / kRowStep; ++i) {
        const int pixel = t / kRowChunks + i * kRowStep;
        const bool valid = walk.n < images && k < conv.K;
        const int64_t from =
            (int64_t{walk.n} * rows.out + top + walk.row) * cols.out + left + walk.col;
        cp_async_16(a + swizzled<kConvTile>(pixel, t % kRowChunks),
                    valid ? dy + from * conv.dy_stride + k : dy, valid);
        if constexpr (kRowStep == kColumnStep) copy_x(b, pixel, walk);
        walk.advance(kRowStep, height, width);
      }
      if constexpr (kRowStep != kColumnStep) {
#pragma unroll
        for (int i = 0; i < kPixels / kColumnStep; ++i) {
          copy_x(b, t / kColumnChunks + i * kColumnStep, x_walk);
          x_walk.advance(kColumnStep, height, width);
        }
      }
    };

    Accumulators<kColumns> acc = {};
    pipeline<kColumns>(shared, part.end - part.begin, copy, [&](const unsigned char* a) {
      const unsigned char* b = a + kConvTile * kStepBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a_regs[4][4], b_regs[kColumns / 32][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int pixel = half * 16 + lane / 16 * 8 + lane % 8;
          const int chunk = warp / 2 * 8 + i * 2 + lane / 8 % 2;
          ldmatrix_x4_transposed(a_regs[i], a + swizzled<kConvTile>(pixel, chunk));
        }
#pragma unroll
        for (int j = 0; j < kColumns / 32; ++j) {
          const int pixel = half * 16 + lane % 16;
          const int chunk = warp % 2 * (kColumns / 16) + j * 2 + lane / 16;
          ldmatrix_x4_transposed(b_regs[j], b + swizzled<kColumns>(pixel, chunk));
        }
        multiply<T, kColumns>(acc, a_regs, b_regs);
      }
    });

    if (!complete<kColumns>(stream_k, schedule, begin, last, acc)) continue;
    const TilePart done = last_part(schedule, begin, last);  // anew, as in `complete`
    const int first_row = done.tile / column_tiles * kConvTile;
    const int first_column = done.tile % column_tiles * kColumns;
    const auto emit = [&](int half, const float* staging) {
      for (int item = t; item < kStagingRows * kColumnChunks; item += kThreads) {
        const int line = item / kColumnChunks, c = item % kColumnChunks * 8;
        const int k = first_row + half * kStagingRows + line, count = conv.C - first_column - c;
        if (k >= conv.K || count <= 0) continue;
        float values[8];
        T result[8];
        load_vector(staging + line * kStagingStride<kColumns> + c, values);
#pragma unroll
        for (int e = 0; e < 8; ++e) result[e] = static_cast<T>(values[e]);
        store_vector(dweight + (int64_t{k} * taps + done.run.taps) * conv.C + first_column + c,
                     count, conv.whole != 0, result);
      }
    };
    emit_tile<kColumns>(shared, acc, [](int) {}, emit);
  }
}

}  // namespace

template <typename T>
void launch_conv_weight_gradient(const ConvWeightGradient& conv, bool wide, const StreamK& stream_k,
                                 const T* x, const T* dy, T* dweight, cudaStream_t stream) {
  const unsigned blocks = conv.schedule.blocks;
  if (wide) {
    launch(conv_weight_gradient<T, 128>, blocks, kThreads, kSharedBytes<128>, stream, conv,
           stream_k, x, dy, dweight);
  } else {
    launch(conv_weight_gradient<T, 64>, blocks, kThreads, kSharedBytes<64>, stream, conv, stream_k,
           x, dy, dweight);
  }
}

template void launch_conv_weight_gradient(const ConvWeightGradient&, bool, const StreamK&,
                                          const Half*, const Half*, Half*, cudaStream_t);
template void launch_conv_weight_gradient(const ConvWeightGradient&, bool, const StreamK&,
                                          const BFloat16*, const BFloat16*, BFloat16*,
                                          cudaStream_t);

}  // namespace fastseg
