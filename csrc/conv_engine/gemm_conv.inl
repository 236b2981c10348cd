// Any convolution as one matrix product: rows are output pixels, the reduction is (tap, channel).
// The rows are gathered straight into the packed form, so there is no im2col matrix.
// Packed weight: [panel][depth / kPerWord][kPanel][kPerWord].

// A line of operands; zeros where src is null.
template <typename T, typename E>
FASTSEG_INLINE void copy_line(const T* src, E* dst) {
  for (int64_t l = 0; l < kLine<E>; l += kLanes) store(dst + l, src ? load(src + l) : Vec{});
}

// The taps of one output pixel, [tap][C], to `row`. `run` taps that lie side by side in memory are
// copied at once: one by one, the three channels of a 7x7 stem took 12 ms instead of 5.
template <class Conv>
static void gather_pixel(const Conv& conv, int64_t n, int64_t oy, int64_t ox,
                         typename Conv::Operand* row) {
  const int64_t x0 = ox * conv.stride_w - conv.pad_w;
  const bool whole =
      conv.dilation_w == 1 && conv.x.pixel == conv.C && x0 >= 0 && x0 + conv.S <= conv.W;
  const int64_t run = whole ? conv.S : 1;
  for (int64_t r = 0; r < conv.R; ++r) {
    const int64_t iy = oy * conv.stride_h - conv.pad_h + r * conv.dilation_h;
    for (int64_t s = 0; s < conv.S; s += run, row += run * conv.C) {
      const int64_t ix = x0 + s * conv.dilation_w;
      if (iy >= 0 && iy < conv.H && ix >= 0 && ix < conv.W) {
        copy_run(conv.x.at(n, iy, ix), row, run * conv.C);
      } else {
        std::memset(row, 0, run * conv.C * sizeof *row);
      }
    }
  }
}

// Packs output pixels [first, first + rows) as [depth / kLine][rows][kLine]. `row` takes one of
// them.
template <class Conv, typename E = typename Conv::Operand>
static void pack_pixels(const Conv& conv, int64_t first, int64_t rows, E* a, E* row) {
  const int64_t line = rows * kLine<E>, C = conv.C, depth = conv.depth();
  for (int64_t d = conv.R * conv.S * C; d < depth; ++d) row[d] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t pixel = first + r;
    const int64_t ox = pixel % conv.Wo, oy = pixel / conv.Wo % conv.Ho;
    const int64_t n = pixel / (conv.Wo * conv.Ho);
    E* dst = a + r * kLine<E>;
    if (C % kLine<E> != 0) {
      gather_pixel(conv, n, oy, ox, row);
      for (int64_t d = 0; d < depth; d += kLine<E>, dst += line) copy_line(row + d, dst);
      continue;
    }
    for (int64_t tap = 0; tap < conv.R * conv.S; ++tap) {
      const int64_t iy = oy * conv.stride_h - conv.pad_h + tap / conv.S * conv.dilation_h;
      const int64_t ix = ox * conv.stride_w - conv.pad_w + tap % conv.S * conv.dilation_w;
      const bool inside = iy >= 0 && iy < conv.H && ix >= 0 && ix < conv.W;
      const auto* src = inside ? conv.x.at(n, iy, ix) : nullptr;
      for (int64_t c = 0; c < C; c += kLine<E>, dst += line) {
        copy_line(src ? src + c : nullptr, dst);
      }
    }
  }
}

template <class Conv, typename T = typename Conv::Storage>
static void locate_pixels(const Conv& conv, int64_t begin, int64_t end, PixelAddress<T>* pixels) {
  int64_t ox = begin % conv.Wo, oy = begin / conv.Wo % conv.Ho;
  int64_t n = begin / (conv.Wo * conv.Ho);
  for (int64_t i = 0; i < end - begin; ++i) {
    pixels[i] = {conv.y.at(n, oy, ox), conv.residual.data ? conv.residual.at(n, oy, ox) : nullptr};
    if (++ox == conv.Wo) {
      ox = 0;
      if (++oy == conv.Ho) oy = 0, ++n;
    }
  }
}

// The pixels of one block, columns of one panel. Sums start from bias and residual: read at the
// end, between stores to rows that lie whole pages apart just like theirs, the residual took 256 ->
// 1024 channels from 5.6 to 7.6 ms.
template <class Conv>
struct OutputPixels {
  const Conv& conv;
  int64_t k;
  const PixelAddress<typename Conv::Storage>* pixels;

  FASTSEG_MEMBER_INLINE Vec start(int r, int64_t column) const {
    const Vec bias = load(conv.bias + k + column);
    const bool first = conv.residual.data && !conv.residual_last;
    return first ? bias + load(pixels[r].residual + k + column) : bias;
  }
  FASTSEG_MEMBER_INLINE void finish(int r, int64_t column, Vec v) const {
    v = activate(v, conv.activation, conv.slope);
    if (conv.residual_last) v += load(pixels[r].residual + k + column);
    store_output(conv, v, pixels[r].y + k + column);
  }
};

// Output pixels [begin, end), panels [panel_begin, panel_end). `packed` takes the packed pixels and
// one more, `pixels` where their outputs lie.
template <class Conv, typename T = typename Conv::Storage>
static void gemm_conv(const Conv& conv, int64_t begin, int64_t end, int64_t panel_begin,
                      int64_t panel_end, typename Conv::Operand* packed, PixelAddress<T>* pixels) {
  // Longer reductions are summed in pieces: one sum of 5000 terms has an error of 4e-6, beyond that
  // of torch's convolution.
  constexpr int64_t kPiece = 1024;
  const int64_t depth = conv.depth(), count = end - begin;
  const int64_t blocks = ceil_div(count, kRows);  // of nearly equal height: no thin last one
  locate_pixels(conv, begin, end, pixels);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = part_begin(count, blocks, i), last = part_begin(count, blocks, i + 1);
    pack_pixels(conv, begin + first, last - first, packed + first * depth, packed + count * depth);
  }
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t k = panel * kPanel;
    const int64_t columns = conv.K - k < kPanel ? conv.K - k : kPanel;
    const auto* b = conv.weight + k * depth;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = part_begin(count, blocks, i), last = part_begin(count, blocks, i + 1);
      const int64_t rows = last - first;
      const auto* a = packed + first * depth;
      if (conv.residual.data && i + 1 < blocks) {
        // No hardware prefetcher follows rows that lie pages apart.
        for (int64_t r = last; r < part_begin(count, blocks, i + 2); ++r) {
          __builtin_prefetch(pixels[r].residual + k);
          __builtin_prefetch(pixels[r].residual + k + kPanel / 2);
        }
      }
      if (columns % kLanes == 0 && depth <= kPiece) {
        gemm_tile(rows, columns, a, b, depth, OutputPixels<Conv>{conv, k, pixels + first});
      } else {
        alignas(64) float tile[kRows * kPanel];
        for (int64_t d = 0; d < depth; d += kPiece) {
          gemm_tile(rows, columns, a + d * rows, b + d * kPanel,
                    depth - d < kPiece ? depth - d : kPiece, StoreTile{tile, d > 0});
        }
        for (int64_t r = 0; r < rows; ++r) {
          finish_pixel(conv, k, columns, tile + r * kPanel, pixels[first + r].y,
                       pixels[first + r].residual);
        }
      }
    }
  }
  if (conv.stream) stream_fence();
}
