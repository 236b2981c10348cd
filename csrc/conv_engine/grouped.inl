// Convolutions in groups of few channels: lanes are output channels, of one or several groups, and
// up to kGroupedPixels pixels of a line of output share the register of a weight. Word j of its own
// group, a channel or for bfloat16 products two, gets to every lane by a broadcast or two or by a
// permutation; each pixel does so once for all taps of a kernel row of three.
// Packed weight: [tap][word of a group][outputs of all groups, whole panels].

// Sums in registers, beside the weights of a kernel row and what they multiply.
constexpr int kGroupedPixels = FASTSEG_ISA_LEVEL >= 2 ? 16 : 8;

// Weights of so many bytes stay in L1 while the pixels of a line pass by.
constexpr int64_t kKeptWeights = 24 * 1024;

// Lane l of the result is lane index[l] of v.
FASTSEG_INLINE Words permute(Words v, Words index) {
#if FASTSEG_ISA_LEVEL >= 2
  return (Words)_mm512_permutexvar_epi32((__m512i)index, (__m512i)v);
#elif FASTSEG_ISA_LEVEL == 1
  return (Words)_mm256_permutevar8x32_epi32((__m256i)v, (__m256i)index);
#else
  Words permuted;
  for (int l = 0; l < kLanes; ++l) permuted[l] = v[index[l]];
  return permuted;
#endif
}

template <class Conv>
struct GroupedKernel {
  using T = typename Conv::Storage;
  using E = typename Conv::Operand;
  using Word = std::conditional_t<std::is_same_v<E, BFloat16>, Words, Vec>;

  static int64_t lanes() { return kLanes; }

  // Lines [begin, end) of output, counted over (image, row), output channels [k_begin, k_end).
  static void run(const Conv& conv, const std::vector<LaneReads>& reads,
                  const std::vector<LineSegment>& segments, int64_t begin, int64_t end,
                  int64_t k_begin, int64_t k_end) {
    const int64_t vectors = kKeptWeights / (conv.R * conv.S * conv.C * kLanes * sizeof(E));
    for_each_block(conv, segments, kGroupedPixels, false, begin, end,
                   std::max<int64_t>(vectors, 1) * kLanes, k_begin, k_end,
                   [&](const Taps<Conv>& taps, const Pixels<T>& to, int64_t k, int64_t last) {
                     block(conv, reads.data(), segments[0].shared, taps, to, k, last);
                   });
    if (conv.stream) stream_fence();
  }

 private:
  static void block(const Conv& conv, const LaneReads* reads, bool shared, const Taps<Conv>& taps,
                    const Pixels<T>& to, int64_t k, int64_t k_end) {
    if (!shared) {
      block_of<0, 1>(conv, reads, taps, to, k, k_end);
    } else if (conv.stride_w == 2) {
      block_of<3, 2>(conv, reads, taps, to, k, k_end);
    } else {
      block_of<3, 1>(conv, reads, taps, to, k, k_end);
    }
  }

  // kTaps: columns of the kernel, all of which each pixel has, or 0 for those that a segment has.
  // kStride: how many of the pixels read lie between two outputs. kPart: some of the pixels are
  // outside of the image or not wanted.
  template <int kTaps, int kStride>
  FASTSEG_INLINE void block_of(const Conv& conv, const LaneReads* reads, const Taps<Conv>& taps,
                               const Pixels<T>& to, int64_t k, int64_t k_end) {
    if (to.count == kGroupedPixels && taps.are_inside(kTaps)) {
      all_channels<kTaps, kStride, false>(conv, reads, taps, to, k, k_end);
    } else {
      all_channels<kTaps, kStride, true>(conv, reads, taps, to, k, k_end);
    }
  }

  template <int kTaps, int kStride, bool kPart>
  static void all_channels(const Conv& conv, const LaneReads* reads, const Taps<Conv>& taps,
                           const Pixels<T>& to, int64_t k, int64_t k_end) {
    for (; k < k_end; k += kLanes) {
      const LaneReads& read = reads[k / kLanes];
      const int64_t lanes = std::min<int64_t>(k_end - k, kLanes);
      if (read.kind == LaneReads::kOne) {
        some_channels<LaneReads::kOne, kTaps, kStride, kPart>(conv, read, taps, to, k, lanes);
      } else if (read.kind == LaneReads::kTwo) {
        some_channels<LaneReads::kTwo, kTaps, kStride, kPart>(conv, read, taps, to, k, lanes);
      } else {
        some_channels<LaneReads::kPermuted, kTaps, kStride, kPart>(conv, read, taps, to, k, lanes);
      }
    }
  }

  // The word at x for every lane.
  FASTSEG_INLINE Word broadcast_from(const T* x) {
    if constexpr (std::is_same_v<T, E>) {
      return broadcast(load_word(x));
    } else {
      float value;
      copy_run(x, &value, 1);
      return broadcast(value);
    }
  }

  // A word of each lane's group of the pixel at x.
  template <LaneReads::Kind kKind>
  FASTSEG_INLINE Word operand(const T* x, const LaneReads& read, Words index) {
    if constexpr (kKind == LaneReads::kOne) {
      return broadcast_from(x);
    } else if constexpr (kKind == LaneReads::kTwo) {
      return (Word)(index ? (Words)broadcast_from(x + read.second) : (Words)broadcast_from(x));
    } else if constexpr (std::is_same_v<E, BFloat16>) {
      return permute(load_words(x), index);
    } else {
      return (Word)permute((Words)load(x), index);
    }
  }

  // The pixels of a block, `lanes` output channels from k on.
  template <LaneReads::Kind kKind, int kTaps, int kStride, bool kPart>
  FASTSEG_INLINE void some_channels(const Conv& conv, const LaneReads& read, const Taps<Conv>& taps,
                                    const Pixels<T>& to, int64_t k, int64_t lanes) {
    constexpr int P = kGroupedPixels;
    Vec acc[P];
    const Vec bias = load(conv.bias + k);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) acc[p] = bias;
    const int64_t inside_end = std::min(taps.inside_end, taps.reads), step = taps.step;
    const int64_t words = conv.C / kPerWord<E>, word_weights = taps.weight_column / words;
    const T* line = taps.x + read.first;
    const E* row_weights = taps.weight + k * kPerWord<E>;
    const Words offset = *reinterpret_cast<const UnalignedWords*>(read.offset);
    for (int64_t r = 0; r < taps.rows; ++r) {
      for (int64_t j = 0; j < words; ++j) {
        const T* x = kKind == LaneReads::kPermuted ? line : line + j * kPerWord<E>;
        const Words index =
            kKind == LaneReads::kPermuted ? offset + static_cast<uint32_t>(j) : offset;
        const E* w = row_weights + j * word_weights;
        if constexpr (kTaps > 0) {
          constexpr int kReads = (P - 1) * kStride + kTaps;
          Word weight[kTaps];
#pragma GCC unroll 3
          for (int s = 0; s < kTaps; ++s) weight[s] = load_words(w + s * taps.weight_column);
#pragma GCC unroll 40
          for (int i = 0; i < kReads; ++i, x += step) {
            if (kPart && (i < taps.inside_begin || i >= inside_end)) continue;
            const Word v = operand<kKind>(x, read, index);
#pragma GCC unroll 3
            for (int s = 0; s < kTaps; ++s) {
              if (i >= s && (i - s) % kStride == 0 && (i - s) / kStride < P) {
                Vec& sum = acc[(i - s) / kStride];
                sum = multiply_add(sum, v, weight[s]);
              }
            }
          }
        } else {
          for (int64_t s = 0; s < taps.columns; ++s) {
            const Word weight = load_words(w);
#pragma GCC unroll 16
            for (int p = 0; p < P; ++p) {
              if (kPart && p >= to.count) break;
              acc[p] = multiply_add(acc[p], operand<kKind>(x + p * step, read, index), weight);
            }
            x += conv.dilation_w * conv.x.pixel;
            w += taps.weight_column;
          }
        }
      }
      line += conv.dilation_h * conv.x.row;
      row_weights += taps.weight_row;
    }
    if (lanes == kLanes) {
      finish_pixels<kPart>(conv, acc, 0, to, k, kLanes);
    } else {
      finish_pixels<true>(conv, acc, 0, to, k, lanes);
    }
  }
};
