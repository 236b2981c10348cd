// 1x1 convolutions of few input channels, whose pixels follow each other in memory, as a matrix
// product by the wide tile. Of a short reduction the sums' way from and to memory takes as long as
// the products: here they come and go in runs of 256 bytes.

// Pixels that all panels pass by: they stay in L1, and so do two panels of 64 channels meanwhile.
constexpr int64_t kWideBlock = 4 * kWideRows;

constexpr int64_t kWideTerms = 512;  // words of the longest reduction

template <class Conv>
struct WideKernel {
  using T = typename Conv::Storage;
  using Y = typename Conv::Result;
  using Tile = WideTile<T, Y>;

  static bool fits(const Conv& conv) {
    return conv.pixels() >= kWideBlock && reads_flat(conv) && writes_flat(conv) &&
           conv.C % kWideStep<T> == 0 && conv.C2 % kWideStep<T> == 0 &&
           conv.C + conv.C2 <= kWideTerms * kPerWord<T> && conv.K % kWideColumns == 0 &&
           ends_wide(conv);
  }

  // Tiles [begin, end) of rows, pairs of panels [pair_begin, pair_end).
  static void run(const Conv& conv, int64_t begin, int64_t end, int64_t pair_begin,
                  int64_t pair_end) {
    const int64_t last = std::min(end * kWideRows, conv.pixels()), panel = conv.depth() * kPanel;
    const bool in_place = static_cast<const void*>(conv.residual.data) == conv.y.data;
    Tile tile{};
    tile.runs[0] = {nullptr, conv.flat_stride(), conv.C};
    tile.runs[1] = {nullptr, conv.x2.pixel, conv.C2};
    tile.residual = {nullptr, flat_pixel(conv, conv.residual), kPanel};
    tile.y = {nullptr, flat_pixel(conv, conv.y), kPanel};
    tile.next_residual = tile.residual;
    tile.next_y = {nullptr, tile.y.row, kPanel};
    set_bounds(tile, conv);
    const auto residual_at = [&](int64_t i, int64_t pair) {
      const T* data = conv.residual.data;
      return data ? data + i * tile.residual.row + pair * kWideColumns : nullptr;
    };
    const auto y_at = [&](int64_t i, int64_t pair) {
      return conv.y.data + i * tile.y.row + pair * kWideColumns;
    };
    for (int64_t block = begin * kWideRows; block < last; block += kWideBlock) {
      const int64_t block_end = std::min(block + kWideBlock, last);
      for (int64_t pair = pair_begin; pair < pair_end; ++pair) {
        tile.left = conv.weight + 2 * pair * panel;
        tile.right = tile.left + panel;
        tile.bias = conv.bias + pair * kWideColumns;
        for (int64_t i = block; i < block_end; i += kWideRows) {
          tile.runs[0].data = conv.x.data + i * tile.runs[0].row;
          if (conv.C2) tile.runs[1].data = conv.x2.data + i * tile.runs[1].row;
          tile.residual.data = residual_at(i, pair);
          tile.y.data = y_at(i, pair);
          if (i + kWideRows > last) {
            multiply_part(tile, last - i);
            continue;
          }
          const bool down = i + kWideRows >= block_end;  // the next tile is of the next panels
          const bool next_block = down && pair + 1 == pair_end;
          const int64_t next = !down ? i + kWideRows : next_block ? block_end : block;
          const int64_t next_pair = next_block ? pair_begin : pair + down;
          const bool fetches = next + kWideRows <= last;
          tile.next_residual.data = fetches ? residual_at(next, next_pair) : nullptr;
          tile.next_y.data = fetches && !in_place ? y_at(next, next_pair) : nullptr;
          // Four of the six rows that take this one's place in the next block; the others follow
          // by themselves.
          tile.lines = pair == pair_begin && i + kWideBlock + kWideRows <= last;
          tile.ahead[0] = tile.runs[0].data + kWideBlock * tile.runs[0].row;
          tile.ahead[1] = tile.ahead[0] + 2 * tile.runs[0].row;
          wide_tile(tile);
        }
      }
    }
  }

 private:
  // A tile of fewer rows, by way of copies.
  __attribute__((noinline)) static void multiply_part(Tile tile, int64_t rows) {
    alignas(64) T operands[kWideRows * kWideTerms * kPerWord<T>] = {}, added[kWideSums] = {};
    alignas(64) Y sums[kWideSums];
    T* to = operands;
    for (WideRun<T>& run : tile.runs) {
      for (int64_t r = 0; r < rows && run.length > 0; ++r) {
        copy_run(run.data + r * run.row, to + r * run.length, run.length);
      }
      run = {to, run.length, run.length};
      to += kWideRows * run.length;
    }
    for (int64_t r = 0; r < rows && tile.residual.data; ++r) {
      copy_run(tile.residual.at(r, 0), added + r * kWideColumns, kWideColumns);
    }
    const WideRows<Y> y = tile.y;
    tile.y = {sums, kWideColumns, kPanel};
    if (tile.residual.data) tile.residual = {added, kWideColumns, kPanel};
    tile.next_residual.data = nullptr;
    tile.next_y.data = nullptr;
    tile.lines = 0;
    wide_tile(tile);
    for (int64_t r = 0; r < rows; ++r) copy_run(sums + r * kWideColumns, y.at(r, 0), kWideColumns);
  }
};
