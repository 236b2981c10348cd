// Implicit-GEMM convolutions of one input on tensor cores (compute capability 8.0 and later): rows
// of a tile are output pixels, columns output channels, a step is 64 bytes of input channels under
// one tap. Pixels are taken class by class, a class being a rectangle in which the same taps lie
// inside the image, so that a tile skips the others whole.
#include "conv_bn/conv_epilogue.cuh"
#include "conv_bn/conv_tile.cuh"

namespace fastseg {
namespace {

// Where chunk `chunk` (16 bytes) of a 64-byte row lies: permuted so that the 8 rows of an ldmatrix
// and the writes of a copy fall into different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kStepBytes + (chunk ^ (row >> 1 & 3)) * 16;
}

struct Pixel {
  int n, row, col;
};

// Pixel number m in the order of the classes; within one by image, row, column.
__device__ Pixel pixel_at(int N, const ConvBranch& b, int64_t m) {
  for (int i = 0; i < b.row_segments.count; ++i) {
    const int top = b.row_segments.begin[i], height = b.row_segments.begin[i + 1] - top;
    for (int j = 0; j < b.col_segments.count; ++j) {
      const int left = b.col_segments.begin[j], width = b.col_segments.begin[j + 1] - left;
      const int64_t size = int64_t{N} * height * width;
      if (m < size) {
        const int within = static_cast<int>(m), line = within / width;
        return {line / height, top + line % height, left + within % width};
      }
      m -= size;
    }
  }
  return {-1, 0, 0};  // beyond the last
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    conv_forward(const __grid_constant__ ConvForward conv, StreamK stream_k, const T* x,
                 const T* residual, Moments<float>* moments, T* z) {
  constexpr int kPack = 16 / sizeof(T), kDepth = kStepBytes / sizeof(T);
  constexpr int kRowsOfThread = kConvTile / 32;  // of A; four threads share a row
  FASTSEG_DYNAMIC_SHARED(shared);
  const int t = threadIdx.x, lane = t % 32, warp = t / 32, chunk = t % 4;
  const Schedule& schedule = conv.schedule;
  const int begin = schedule.first_step(blockIdx.x);
  // Backwards, so that what the next block waits for comes first.
  for (int end = schedule.first_step(blockIdx.x + 1); end > begin;) {
    const int last = end;
    const TilePart part = last_part(schedule, begin, last);
    end = part.first_step + part.begin;
    const ConvBranch& branch = conv.branch[part.run.branch];
    const ConvAxis &rows = branch.rows, &cols = branch.cols;
    const int column_tiles = ceil_div(branch.K, kColumns);
    const int row_tile = part.run.first_tile + part.tile / column_tiles;
    const int first_column = part.tile % column_tiles * kColumns;

    // Thread t looks after row t of the tile in z, and copies chunk t % 4 of rows t / 4 + 32 * i.
    const Pixel own = pixel_at(conv.N, branch, int64_t{row_tile} * kConvTile + t);
    const int own_pixel = own.n < 0 ? -1 : (own.n * rows.out + own.row) * cols.out + own.col;
    int corner[kRowsOfThread], pixel0[kRowsOfThread];  // corner: row and column in 16 bits each
    {
      const int top = own.n < 0 ? INT16_MIN : own.row * rows.stride - rows.padding;
      const int left = own.col * cols.stride - cols.padding;
      const int place[2] = {top * 65536 + (left & 0xffff),
                            (own.n * rows.in + top) * cols.in + left};
      int* table = reinterpret_cast<int*>(shared);
      store_vector(table + t * 2, place);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        int other[2];
        load_vector(table + (t / 4 + 32 * i) * 2, other);
        corner[i] = other[0], pixel0[i] = other[1];
      }
      __syncthreads();
    }

    // The step that is copied next: under the taps left in `rest`, then 64 bytes further on.
    const int taps = rows.taps * cols.taps, tap_count = __popcll(part.run.taps);
    int c = part.begin / tap_count * kDepth + chunk * kPack;
    uint64_t rest = part.run.taps;
    for (int skip = part.begin % tap_count; skip > 0; --skip) rest &= rest - 1;
    const auto copy = [&](unsigned char* a) {
      unsigned char* b = a + kConvTile * kStepBytes;
      const int tap = 63 - __clzll(static_cast<long long>(rest & (~rest + 1)));
      const int down = tap / cols.taps * rows.dilation, right = tap % cols.taps * cols.dilation;
      const int filter_tap = branch.flipped ? taps - 1 - tap : tap;
      const T* weight = static_cast<const T*>(branch.weight);
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const int row = (corner[i] >> 16) + down;
        const int col = static_cast<int16_t>(corner[i]) + right;
        const bool valid = row >= 0 && row < rows.in && col >= 0 && col < cols.in && c < conv.C;
        const int64_t pixel = pixel0[i] + down * cols.in + right;
        cp_async_16(a + swizzled(t / 4 + 32 * i, chunk), valid ? x + pixel * conv.x_stride + c : x,
                    valid);
      }
#pragma unroll
      for (int i = 0; i < kColumns / 32; ++i) {
        const int k = first_column + t / 4 + 32 * i;
        const bool valid = k < branch.K && c < conv.C;
        const int64_t filter = int64_t{k} * taps + filter_tap;
        cp_async_16(b + swizzled(t / 4 + 32 * i, chunk),
                    valid ? weight + filter * conv.C + c : weight, valid);
      }
      rest &= rest - 1;
      if (rest == 0) {
        rest = part.run.taps;
        c += kDepth;
      }
    };

    Accumulators<kColumns> acc = {};
    pipeline<kColumns>(shared, part.end - part.begin, copy, [&](const unsigned char* a) {
      const unsigned char* b = a + kConvTile * kStepBytes;
#pragma unroll 1  // both halves at once spill on compute capability 9 and later
      for (int half = 0; half < 2; ++half) {
        uint32_t a_regs[4][4], b_regs[kColumns / 32][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = warp / 2 * 64 + i * 16 + lane % 16;
          ldmatrix_x4(a_regs[i], a + swizzled(row, half * 2 + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < kColumns / 32; ++j) {
          const int row = warp % 2 * (kColumns / 2) + j * 16 + lane % 8 + lane / 16 * 8;
          ldmatrix_x4(b_regs[j], b + swizzled(row, half * 2 + lane / 8 % 2));
        }
        multiply<T, kColumns>(acc, a_regs, b_regs);
      }
    });

    if (!complete<kColumns>(stream_k, schedule, begin, last, acc)) continue;

    int* pixels = reinterpret_cast<int*>(shared) + kStagingRows * kStagingStride<kColumns>;
    const T* biases = static_cast<const T*>(branch.bias);
    const ConvEpilogue<T> epilogue{biases, residual, z, conv.slope, conv.whole != 0};
    Moments<float> own_moments{0, 0, 0};  // of column t
    const auto prepare = [&](int half) {
      if (t / kStagingRows == half) pixels[t % kStagingRows] = own_pixel;
    };
    const auto emit = [&](int half, const float* staging) {
      if (moments != nullptr && t < kColumns) {
        int count = 0;
        while (count < kStagingRows && pixels[count] >= 0) ++count;
        Moments<float> some{static_cast<float>(count), 0, 0};
        const float* column = staging + t;
        for (int r = 0; r < count; ++r) some.mean += column[r * kStagingStride<kColumns>];
        if (count > 0) some.mean /= some.n;
        for (int r = 0; r < count; ++r) {
          const float delta = column[r * kStagingStride<kColumns>] - some.mean;
          some.m2 += delta * delta;
        }
        own_moments.merge(some);
      }
      for (int item = t; item < kStagingRows * (kColumns / 8); item += kThreads) {
        const int line = item / (kColumns / 8), k = item % (kColumns / 8) * 8;
        const int channel = first_column + k, left = branch.K - channel;
        if (pixels[line] < 0 || left <= 0) continue;
        const int64_t at = int64_t{pixels[line]} * conv.z_stride + branch.first_channel + channel;
        float values[8];
        load_vector(staging + line * kStagingStride<kColumns> + k, values);
        epilogue.store(values, at, channel, left);
      }
    };
    emit_tile<kColumns>(shared, acc, prepare, emit);
    if (moments != nullptr && t < kColumns && first_column + t < branch.K) {
      if (biases) own_moments.mean += static_cast<float>(biases[first_column + t]);
      moments[int64_t{row_tile} * branch.K + first_column + t] = own_moments;
    }
  }
}

}  // namespace

template <typename T>
void launch_conv_forward(const ConvForward& conv, bool wide, const StreamK& stream_k, const T* x,
                         const T* residual, Moments<float>* moments, T* z, cudaStream_t stream) {
  const unsigned blocks = conv.schedule.blocks;
  if (wide) {
    launch(conv_forward<T, 128>, blocks, kThreads, kSharedBytes<128>, stream, conv, stream_k, x,
           residual, moments, z);
  } else {
    launch(conv_forward<T, 64>, blocks, kThreads, kSharedBytes<64>, stream, conv, stream_k, x,
           residual, moments, z);
  }
}

#define FASTSEG_INSTANTIATE(T)                                                                    \
  template void launch_conv_forward(const ConvForward&, bool, const StreamK&, const T*, const T*, \
                                    Moments<float>*, T*, cudaStream_t);
FASTSEG_INSTANTIATE(Half)
FASTSEG_INSTANTIATE(BFloat16)
FASTSEG_INSTANTIATE(float)
#undef FASTSEG_INSTANTIATE

}  // namespace fastseg
