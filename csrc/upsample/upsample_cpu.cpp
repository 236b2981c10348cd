// Bilinear resize fused with argmax or softmax on the CPU: one task per tile of columns and band of
// rows; the resized logits exist only in registers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/isa.h"
#include "common/layout.h"
#include "common/parallel.h"
#include "upsample/upsample.h"

#define FASTSEG_INLINE inline __attribute__((always_inline))

namespace fastseg {
namespace upsample {
namespace {

constexpr int kTileVectors = 4;           // vectors of columns reduced together, to hide latency
constexpr int64_t kTileStep = 64;         // columns: kTileVectors of the widest vector
constexpr int64_t kBandRows = 64;         // output rows of a task
constexpr int64_t kRowBytes = 32 * 1024;  // two source rows of a tile: most of L1

// What to write: labels (and the probability of each) or the probabilities of all classes.
template <typename T>
struct Outputs {
  uint8_t* labels8 = nullptr;
  int16_t* labels16 = nullptr;
  typename Accumulate<T>::type* top_prob = nullptr;
  T* probs = nullptr;
};

#define FASTSEG_KERNEL_FILE "upsample/upsample_kernel.inl"
#include "common/foreach_isa.inl"

struct TaskBuffer;  // names the scratch memory of a task

// Whether PyTorch blends four products: its kernels for channels-last tensors of more than 3
// channels and for small results do; else it goes along x, then along y.
bool four_products(const Resize& r) {
  const bool channels_last = r.channels_last || (r.rows.in == 1 && r.cols.in == 1);
  return (channels_last && r.C > 3) || r.rows.out + r.cols.out <= 128;
}

template <typename T>
void run(const Resize& r, const Outputs<T>& out, const T* logits) {
  using acc = typename Accumulate<T>::type;
  const int parts = four_products(r) ? 2 : 1;
  const auto kernel = parts == 2 ? FASTSEG_ISA_CALL(upsample_tile<T, true>)
                                 : FASTSEG_ISA_CALL(upsample_tile<T, false>);
  const int64_t H = r.rows.out, W = r.cols.out;
  const int64_t fitting = kRowBytes / static_cast<int64_t>(2 * parts * r.C * sizeof(acc));
  const int64_t whole = (W + kTileStep - 1) / kTileStep * kTileStep;
  const int64_t tile = std::clamp(fitting / kTileStep * kTileStep, kTileStep, whole);
  const int64_t tiles = (W + tile - 1) / tile, bands = (H + kBandRows - 1) / kBandRows;
  // Columns of a tile's segment: its share of the source, both ends and a vector to read past.
  const int64_t step = W > 1 ? (r.cols.in + W - 2) / (W - 1) : r.cols.in;
  const int64_t segment = std::min(tile * step + 2, r.cols.in) + kTileStep;
  const int64_t floats = ((2 * parts + 1) * r.C * tile + 8 * tile + segment + 16 * 10) *
                         static_cast<int64_t>(sizeof(acc) / sizeof(float));
  parallel_tasks(r.N * bands * tiles, [&](int64_t task) {
    const int64_t n = task / (bands * tiles), band = task / tiles % bands, x = task % tiles * tile;
    kernel(r, out, logits, n, band * kBandRows, std::min((band + 1) * kBandRows, H), x, tile,
           scratch<TaskBuffer>(floats));
  });
}

std::tuple<Tensor, Tensor> upsample_argmax_cpu(const Tensor& logits, int64_t H, int64_t W,
                                               bool align_corners, bool return_prob) {
  const MemoryFormat layout = image_layout(logits);
  const Resize r = make_resize(logits, layout, H, W, align_corners);
  FASTSEG_CHECK(r.C <= 32768, "upsample_argmax: at most 32768 classes fit int16, got ", r.C);
  const auto label_type = r.C <= 256 ? ScalarType::Byte : ScalarType::Short;
  const auto prob_type =
      logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor labels = torch::stable::new_empty(logits, {r.N, H, W}, label_type);
  Tensor prob = return_prob ? torch::stable::new_empty(logits, {r.N, H, W}, prob_type)
                            : torch::stable::new_empty(logits, {0}, prob_type);
  const Tensor x = dense(logits, layout);
  dispatch_floating(x, "upsample_argmax", [&](auto tag) {
    using T = decltype(tag);
    Outputs<T> out;
    if (r.C <= 256) {
      out.labels8 = labels.mutable_data_ptr<uint8_t>();
    } else {
      out.labels16 = labels.mutable_data_ptr<int16_t>();
    }
    if (return_prob) out.top_prob = prob.mutable_data_ptr<typename Accumulate<T>::type>();
    run<T>(r, out, x.const_data_ptr<T>());
  });
  return {labels, prob};
}

Tensor upsample_softmax_cpu(const Tensor& logits, int64_t H, int64_t W, bool align_corners) {
  const MemoryFormat layout = image_layout(logits);
  const Resize r = make_resize(logits, layout, H, W, align_corners);
  Tensor probs =
      empty_image(logits, {r.N, r.C, H, W}, logits.scalar_type(), MemoryFormat::Contiguous);
  const Tensor x = dense(logits, layout);
  dispatch_floating(x, "upsample_softmax", [&](auto tag) {
    using T = decltype(tag);
    Outputs<T> out;
    out.probs = probs.mutable_data_ptr<T>();
    run<T>(r, out, x.const_data_ptr<T>());
  });
  return probs;
}

}  // namespace
}  // namespace upsample

STABLE_TORCH_LIBRARY_FRAGMENT(fastseg, m) {
  // Labels (N, H, W), uint8 up to 256 classes, else int16; the top probability (N, H, W) in the
  // accumulation type, or no elements if not wanted.
  m.def(
      "upsample_argmax(Tensor logits, SymInt H, SymInt W, bool align_corners, bool return_prob) "
      "-> (Tensor, Tensor)");
  m.def("upsample_softmax(Tensor logits, SymInt H, SymInt W, bool align_corners) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastseg, CPU, m) {
  m.impl("upsample_argmax", TORCH_BOX(&upsample::upsample_argmax_cpu));
  m.impl("upsample_softmax", TORCH_BOX(&upsample::upsample_softmax_cpu));
}

}  // namespace fastseg
