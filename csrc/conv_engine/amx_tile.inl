// The register tiles of bfloat16 operands on AMX, in the place of those of gemm_tile.inl: up to 32
// rows by kPanel columns of sums. A panel of weights is what a tile of b wants as it is.
//   tiles 0 to 3: sums; upper left, upper right, lower left, lower right
//   tiles 4, 5: a, upper and lower rows; 6, 7: b, left and right columns
// Each step of the reduction loads four of them and does four products, which take 16 cycles each.

constexpr int64_t kTileRows = 16;
constexpr int64_t kStep = kLine<BFloat16>;  // operands in a row of a
static_assert(kRows == 2 * kTileRows && kPanel == 2 * kTileRows && kStep == 2 * kTileRows,
              "two by two tiles");

// The tiles of this thread, to the end of a task: while they are in use, every switch of threads
// saves them. The upper and the lower rows are as many, the same for all blocks of a task, because
// to change that takes as long as a dozen products; in blocks of fewer rows the two overlap.
class TileRegisters {
 public:
  explicit TileRegisters(int64_t height) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(tile < 6 ? height : kTileRows);
    }
    tile_configure(config);
  }
  TileRegisters(const TileRegisters&) = delete;
  ~TileRegisters() { tile_release(); }
};

// Which tiles a block needs, and where its lower rows begin.
struct TileBlock {
  int64_t rows, lower;
  bool tall, wide;

  TileBlock(int64_t rows, int64_t height, int64_t columns)
      : rows(rows), lower(rows - height), tall(rows > height), wide(columns > kTileRows) {}

  // kStep operands of the reduction; rows of a are `row` apart. Fetches lines meanwhile.
  FASTSEG_MEMBER_INLINE void step(const BFloat16* a, int64_t row, const BFloat16* b,
                                  const void* fetch, int64_t lines) const {
    constexpr int64_t kBytes = sizeof(BFloat16);
    tile_load<4>(a, row * kBytes);
    tile_load<6>(b, kPanel * kPerWord<BFloat16> * kBytes);
    tile_multiply<0, 4, 6>();
    for (int64_t i = 0; i < lines; ++i) fetch_line(static_cast<const char*>(fetch) + i * 64);
    if (wide) {
      tile_load<7>(b + kTileRows * kPerWord<BFloat16>, kPanel * kPerWord<BFloat16> * kBytes);
      tile_multiply<1, 4, 7>();
    }
    if (tall) {
      tile_load<5>(a + lower * row, row * kBytes);
      tile_multiply<2, 5, 6>();
      if (wide) tile_multiply<3, 5, 7>();
    }
  }

  // The sums of what products() adds, between out.start() and out.finish(). Rows that both halves
  // have get the same sum from both.
  template <class Rows, class Products>
  FASTSEG_MEMBER_INLINE void sum(const Rows& rows_of_block, const Products& products) const {
    const Rows out = rows_of_block;
    alignas(64) float sums[kRows * kPanel];
    const auto each_tile = [&](auto&& at) __attribute__((always_inline)) {
      at(std::integral_constant<int, 0>{}, sums);
      if (wide) at(std::integral_constant<int, 1>{}, sums + kTileRows);
      if (tall) at(std::integral_constant<int, 2>{}, sums + lower * kPanel);
      if (tall && wide) at(std::integral_constant<int, 3>{}, sums + lower * kPanel + kTileRows);
    };
    const int64_t columns = wide ? kPanel : kTileRows;
    for (int r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < columns; k += kLanes) store(sums + r * kPanel + k, out.start(r, k));
    }
    each_tile([](auto tile, float* at)
                  __attribute__((always_inline)) { tile_load<tile>(at, kPanel * sizeof(float)); });
    products();
    each_tile([](auto tile, float* at)
                  __attribute__((always_inline)) { tile_store<tile>(at, kPanel * sizeof(float)); });
    for (int r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < columns; k += kLanes) out.finish(r, k, load(sums + r * kPanel + k));
    }
  }
};

// The lengths of runs are multiples of kStep.
template <class Rows>
static void patch_tile(int64_t rows, int64_t columns, const Patch<BFloat16>& first,
                       const BFloat16* b, const NextRuns& ahead, const Rows& out) {
  const TileBlock block(rows, first.height, columns);
  block.sum(out, [&]() __attribute__((always_inline)) {
    for (const Patch<BFloat16>* patch = &first; patch; patch = patch->then) {
      for (int64_t h = 0; h < patch->runs_h; ++h) {
        const char* fetch = patch == &first ? ahead.data + h * ahead.run : ahead.then;
        for (int64_t w = 0; w < patch->runs_w; ++w) {
          const BFloat16* a = patch->data + h * patch->run_h + w * patch->run_w;
          for (int64_t d = 0; d < patch->length; d += kStep) {
            block.step(a + d, patch->row, b, fetch, kGroup);
            b += kStep * kPanel;
            fetch += kGroup * 64;
          }
        }
      }
    }
  });
}

// The tiles have kTileRows rows. Where the block has fewer, they read on behind it: the transforms
// of other tiles or, behind the last of them, memory that is left for that.
template <class Rows>
static void gemm_tile(int64_t rows, int64_t stride, int64_t columns, const BFloat16* a,
                      const BFloat16* b, Ahead<BFloat16> ahead, int64_t depth, int64_t,
                      const Rows& out) {
  const TileBlock block(rows, kTileRows, columns);
  block.sum(out, [&]() __attribute__((always_inline)) {
    for (int64_t d = 0; d < depth; d += kStep) {
      block.step(a + d * stride, kStep, b + d * kPanel, ahead.lines, 2 * ahead.steps);
      ahead.lines += 2 * ahead.steps * kStep;
    }
  });
}
