// Channels [first, first + kLine) of one panel of 3x3 weights to the form of WinogradKernel,
// padding included. Output channels are the lanes.
template <class Pair, typename E>
static void pack_winograd_panel(const Weights& weights, int64_t panel, int64_t first, E* packed) {
  constexpr int kProducts = Pair::kProducts, kPoints = kProducts * kProducts;
  double g[kProducts][3];
  for (int i = 0; i < kProducts; ++i) Pair::weight_row(i, g[i]);
  const int64_t K = weights.K, C = weights.C;
  const int64_t panels = ceil_div(K, kPanel), columns = K - panel * kPanel;
  const int64_t piece = first / kWinogradPiece * kWinogradPiece;
  const int64_t rest = round_up(C, kLine<E>) - piece;
  const int64_t depth = rest < kWinogradPiece ? rest : kWinogradPiece;
  packed += (piece * kPoints * panels + panel * depth) * kPanel;
  for (int64_t c = first; c < first + kLine<E>; ++c) {
    double w[9][kPanel] = {}, half[kProducts][3][kPanel];
    for (int64_t k = 0; k < kPanel && k < columns && c < C; ++k) {
      const float* from = weights.at(panel * kPanel + k, c);
      for (int tap = 0; tap < 9; ++tap) w[tap][k] = from[tap / 3 * weights.r + tap % 3 * weights.s];
    }
    for (int i = 0; i < kProducts; ++i) {
      for (int s = 0; s < 3; ++s) {
        for (int k = 0; k < kPanel; ++k) {
          half[i][s][k] = g[i][0] * w[s][k] + g[i][1] * w[3 + s][k] + g[i][2] * w[6 + s][k];
        }
      }
    }
    const int64_t d = c - piece;
    E* dst = packed + (d / kPerWord<E> * kPanel) * kPerWord<E> + d % kPerWord<E>;
    for (int i = 0; i < kProducts; ++i) {
      for (int j = 0; j < kProducts; ++j, dst += depth * panels * kPanel) {
        for (int k = 0; k < kPanel; ++k) {
          const double u =
              g[j][0] * half[i][0][k] + g[j][1] * half[i][1][k] + g[j][2] * half[i][2][k];
          dst[k * kPerWord<E>] = static_cast<E>(static_cast<float>(u));
        }
      }
    }
  }
}
