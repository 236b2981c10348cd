// Weights to the forms of WinogradKernel and Winograd1dKernel.

// Channels [first, first + kLine) of one panel of 3x3 weights to the form of WinogradKernel,
// padding included. Output channels are the lanes.
template <typename E>
static void pack_winograd_panel(const Weights& weights, const WeightTransform& transform,
                                int64_t panel, int64_t first, E* packed) {
  const int products = transform.products;
  const auto& g = transform.row;
  const int64_t K = weights.K, C = weights.C;
  const int64_t panels = ceil_div(K, kPanel), columns = K - panel * kPanel;
  const int64_t channels = round_up(C, kLine<E>), most = winograd_piece<E>(channels);
  const int64_t piece = first / most * most;
  const int64_t depth = channels - piece < most ? channels - piece : most;
  packed += (piece * products * products * panels + panel * depth) * kPanel;
  for (int64_t c = first; c < first + kLine<E>; ++c) {
    double w[9][kPanel] = {}, half[WeightTransform::kMost][3][kPanel];
    for (int64_t k = 0; k < kPanel && k < columns && c < C; ++k) {
      const float* from = weights.at(panel * kPanel + k, c);
      for (int tap = 0; tap < 9; ++tap) w[tap][k] = from[tap / 3 * weights.r + tap % 3 * weights.s];
    }
    for (int i = 0; i < products; ++i) {
      for (int s = 0; s < 3; ++s) {
        for (int k = 0; k < kPanel; ++k) {
          half[i][s][k] = g[i][0] * w[s][k] + g[i][1] * w[3 + s][k] + g[i][2] * w[6 + s][k];
        }
      }
    }
    const int64_t d = c - piece;
    E* dst = packed + (d / kPerWord<E> * kPanel) * kPerWord<E> + d % kPerWord<E>;
    for (int i = 0; i < products; ++i) {
      for (int j = 0; j < products; ++j, dst += depth * panels * kPanel) {
        for (int k = 0; k < kPanel; ++k) {
          const double u =
              g[j][0] * half[i][0][k] + g[j][1] * half[i][1][k] + g[j][2] * half[i][2][k];
          dst[k * kPerWord<E>] = static_cast<E>(static_cast<float>(u));
        }
      }
    }
  }
}

// Channels [first, first + kLine) of weights (K, C, taps) to the form of Winograd1dKernel, padding
// included. Points are the lanes here: a point by itself would gather its taps one by one.
template <typename E>
static void pack_winograd_line(const float* weight, int64_t K, int64_t C, int64_t taps,
                               int64_t first, E* packed) {
  using Scheme = LineScheme<E>;
  constexpr int kTaps = Scheme::kKernel;                      // of a group
  constexpr int kProducts = Scheme::kProducts, kPoints = 16;  // padded
  double rows[kTaps][kPoints] = {};
  for (int i = 0; i < kProducts; ++i) {
    double row[kTaps];
    Scheme::weight_row(i, row);
    for (int j = 0; j < kTaps; ++j) rows[j][i] = row[j];
  }
  const int64_t depth = round_up(C, kLine<E>), columns = ceil_div(taps, kTaps) * K;
  for (int64_t column = 0; column < columns; column += kPanel) {
    E* panel = packed + column * kProducts * depth;
    for (int64_t c = first; c < first + kLine<E>; ++c) {
      alignas(64) float u[kPanel][kPoints] = {};
      for (int64_t i = 0; i < kPanel && column + i < columns && c < C; ++i) {
        const int64_t k = (column + i) % K, tap = (column + i) / K * kTaps;
        const float* w = weight + (k * C + c) * taps + tap;
        double sums[kPoints] = {};
        for (int64_t j = 0; j < (taps - tap < kTaps ? taps - tap : kTaps); ++j) {
#pragma GCC unroll 16
          for (int point = 0; point < kPoints; ++point) sums[point] += rows[j][point] * w[j];
        }
        for (int point = 0; point < kPoints; ++point) {
          u[i][point] = static_cast<float>(sums[point]);
        }
      }
      for (int point = 0; point < kProducts; ++point) {
        E* dst = panel + (point * depth + c / kPerWord<E> * kPerWord<E>)*kPanel + c % kPerWord<E>;
        for (int64_t i = 0; i < kPanel; ++i) dst[i * kPerWord<E>] = static_cast<E>(u[i][point]);
      }
    }
  }
}
