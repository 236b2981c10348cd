// A panel of weights to the form of the matrix product: [tap][input channel][kPanel].

// Any strides, channels in blocks that stay in L1 for all taps and lanes.
static void pack_strided(const Weights& w, int64_t first, int64_t columns, float* to) {
  constexpr int64_t kChannels = 16, kColumns = 8;
  for (int64_t c0 = 0; c0 < w.C; c0 += kChannels) {
    const int64_t c1 = w.C - c0 < kChannels ? w.C : c0 + kChannels;
    for (int64_t k0 = 0; k0 < columns; k0 += kColumns) {
      const int64_t k1 = columns - k0 < kColumns ? columns : k0 + kColumns;
      for (int64_t tap = 0; tap < w.taps(); ++tap) {
        const float* from = w.at(first, 0) + tap / w.S * w.r + tap % w.S * w.s;
        for (int64_t c = c0; c < c1; ++c) {
          float* row = to + (tap * w.C + c) * kPanel;
          for (int64_t k = k0; k < k1; ++k) row[k] = from[c * w.c + k * w.k];
        }
      }
    }
  }
}

// Columns that there are not and channels up to `depth` become zeros.
static void pack_panel(const Weights& w, int64_t panel, int64_t depth, float* to) {
  const int64_t first = panel * kPanel;
  const int64_t columns = w.K - first < kPanel ? w.K - first : kPanel;
  if (columns < kPanel) std::memset(to, 0, depth * kPanel * sizeof *to);
  std::memset(to + w.taps() * w.C * kPanel, 0, (depth - w.taps() * w.C) * kPanel * sizeof *to);
  if (columns < kPanel || (w.k != 1 && w.c != 1)) return pack_strided(w, first, columns, to);
  for (int64_t r = 0; r < w.R; ++r) {
    for (int64_t s = 0; s < w.S; ++s, to += w.C * kPanel) {
      const float* from = w.at(first, 0) + r * w.r + s * w.s;
      int64_t c = 0;
      if (w.k == 1) {
        for (; c < w.C; ++c) std::memcpy(to + c * kPanel, from + c * w.c, kPanel * sizeof *to);
        continue;
      }
      for (; c + kLanes <= w.C; c += kLanes) {
        for (int64_t k = 0; k < kPanel; k += kLanes) {
          transpose_tile(from + c + k * w.k, w.k, to + c * kPanel + k, kPanel);
        }
      }
      for (; c < w.C; ++c) {
        for (int64_t k = 0; k < kPanel; ++k) to[c * kPanel + k] = from[c + k * w.k];
      }
    }
  }
}
