// Mean field of the dense CRF on CUDA. Beliefs are rows (images, points, width). Each update blurs
// them on every lattice; then one kernel does all that happens to a point: gather from each
// lattice, add the messages to the energies, soft-max. Nothing waits for the host, so the updates
// can be captured in a CUDA graph.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/cuda.h"
#include "permutohedral/lattice_cuda.h"

namespace fastseg {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kImagesTogether = 65535;  // in one launch: all that a grid takes

// What the update reads of one pairwise term, of the first image.
template <typename T, typename V>
struct Message {
  const CudaLatticeHeader* header;
  const int32_t* vertex;
  const T* weight;
  const T* after;
  const V* values;          // blurred rows
  const T* coefficients;    // (width), or (L, L) if full
  int64_t distance;         // of the images' lattices, bytes
  int64_t values_distance;  // and of their values, elements
  T gain;
  int d;
  bool full;
};

template <typename T, typename V>
struct Messages {
  int count = 0;
  Message<T, V> term[kMaxTerms];
};

template <typename P>
__device__ __forceinline__ P* bytes_further(P* pointer, int64_t bytes) {
  return reinterpret_cast<P*>(reinterpret_cast<const char*>(pointer) + bytes);
}

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// beliefs = soft-max(energies + messages), `energies` being negative; NaN where a lattice could not
// be built. `lanes` threads of a warp share a point; each has kPer groups of 4 channels, few lanes
// with several groups each because what is done once per point costs as much as a group. Grid axis
// y counts images. Dynamic shared memory, where a term has a full matrix: for each point of the
// block, a row of `groups` * 4 and one more, which spreads them over the banks. `invalid`, if not
// null, becomes 1 where an energy is NaN or -inf, or all of a point are inf.
template <typename T, typename V, int kPer>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 && kPer < 8 ? resident_blocks(5) : 1)
    update(const __grid_constant__ Messages<T, V> messages, int64_t points, int labels, int groups,
           int lanes, const T* all_energies, T* all_beliefs, int32_t* invalid) {
  constexpr int kCorners = 3;  // gathered at once; simplices of 2 and 5 features have 3 and 6
  FASTSEG_DYNAMIC_SHARED(shared);
  const int width = groups * 4;
  const int64_t image = blockIdx.y;
  const T* energies = all_energies + image * points * width;
  T* beliefs = all_beliefs + image * points * width;
  const int local = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int64_t wanted = int64_t{blockIdx.x} * (kThreads / lanes) + local;
  const int64_t point = wanted < points ? wanted : points - 1;  // whole warps meet in the shuffles
  T logits[kPer][4];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int group = i * lanes + lane;
    if (group < groups) {
      load_vector(energies + point * width + group * 4, logits[i]);
    } else {
      for (int c = 0; c < 4; ++c) logits[i][c] = -kInfinity<T>;
    }
  }
  for (int t = 0; t < messages.count; ++t) {
    const Message<T, V>& m = messages.term[t];
    const int64_t shift = image * m.distance;
    const bool failed = bytes_further(m.header, shift)->status != 0;
    const int32_t* vertex = bytes_further(m.vertex, shift) + point * (m.d + 1);
    const T* weight = bytes_further(m.weight, shift) + point * (m.d + 1);
    const V* values = m.values + image * m.values_distance + lane * 4;
    const T scale = failed ? kNotANumber<T> : bytes_further(m.after, shift)[point] * m.gain;
    T sum[kPer][4] = {};
    for (int first = 0; first <= m.d; first += kCorners) {
      const V* from[kCorners];
      T share[kCorners];
#pragma unroll
      for (int r = 0; r < kCorners; ++r) {  // beyond the last corner: that one, with weight 0
        const int corner = first + r <= m.d ? first + r : m.d;
        const int32_t v = vertex[corner];  // read without waiting for `failed`
        from[r] = row_of(values, failed ? 0 : v, width);
        share[r] = first + r <= m.d ? weight[corner] : T(0);
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (i * lanes + lane >= groups) continue;
        V value[kCorners][4];
#pragma unroll
        for (int r = 0; r < kCorners; ++r) load_vector(from[r] + i * lanes * 4, value[r]);
#pragma unroll
        for (int r = 0; r < kCorners; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[i][c] += share[r] * static_cast<T>(value[r][c]);
        }
      }
    }
    if (!m.full) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const int group = i * lanes + lane;
        if (group >= groups) continue;
        T factor[4];
        load_vector(m.coefficients + group * 4, factor);
#pragma unroll
        for (int c = 0; c < 4; ++c) logits[i][c] += factor[c] * (sum[i][c] * scale);
      }
      continue;
    }
    T* row = reinterpret_cast<T*>(shared) + local * (width + 1);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int group = i * lanes + lane;
      if (group >= groups) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) row[group * 4 + c] = sum[i][c] * scale;
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int label = (i * lanes + lane) * 4 + c;
        if (label >= labels) continue;
        T total = 0;
        for (int other = 0; other < labels; ++other) {
          total += m.coefficients[label * labels + other] * row[other];
        }
        logits[i][c] += total;
      }
    }
    __syncwarp();  // before the next term overwrites the row
  }
  T most = -kInfinity<T>;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) most = logits[i][c] > most ? logits[i][c] : most;
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, most, step);
    most = other > most ? other : most;
  }
  if (invalid != nullptr) {
    bool valid = most > -kInfinity<T>;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) valid = valid && logits[i][c] < kInfinity<T>;
    }
    if (!valid) atomicOr(invalid, 1);
  }
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      logits[i][c] = exp(logits[i][c] - most);
      sum += logits[i][c];
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (wanted >= points) return;
  const T inverse = 1 / sum;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int group = i * lanes + lane;
    if (group >= groups) continue;
#pragma unroll
    for (int c = 0; c < 4; ++c) logits[i][c] *= inverse;
    store_vector(beliefs + point * width + group * 4, logits[i]);
  }
}

// rows (points, width) -> (points, labels).
template <typename T>
__global__ void drop_padding(const T* rows, int64_t count, int labels, int width, T* out) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) out[i] = rows[i / labels * width + i % labels];
}

template <typename T, typename V>
void launch_update(const Messages<T, V>& messages, int64_t images, int64_t points, int labels,
                   int width, const T* energies, T* beliefs, int32_t* invalid,
                   cudaStream_t stream) {
  const int groups = width / 4;
  const auto lanes_for = [&](int per) {
    int lanes = 1;
    while (lanes < 32 && lanes * per < groups) lanes *= 2;
    return lanes;
  };
  // Two or three groups a thread, whichever leaves fewer idle; many labels fill a warp with eight.
  const int twos = lanes_for(2), threes = lanes_for(3);
  const bool fit_two = twos * 2 >= groups, fit_three = threes * 3 >= groups;
  const bool two = fit_two && (!fit_three || twos * 2 <= threes * 3);
  const int lanes = two ? twos : fit_three ? threes : 32;
  const int per_block = kThreads / lanes;
  bool full = false;
  for (int t = 0; t < messages.count; ++t) full |= messages.term[t].full;
  const size_t shared = full ? sizeof(T) * (width + 1) * per_block : 0;
  auto* kernel = two ? &update<T, V, 2> : fit_three ? &update<T, V, 3> : &update<T, V, 8>;
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(points, per_block)),
                  static_cast<unsigned>(images));
  launch(kernel, grid, kThreads, shared, stream, messages, points, labels, groups, lanes, energies,
         beliefs, invalid);
}

// The pairwise terms of a call: the lattices of term k start at lattices[first[k]].
struct Terms {
  const std::vector<Tensor>& lattices;
  const std::vector<int64_t>& counts;
  const std::vector<Tensor>& coefficients;
  std::vector<size_t> first;
  Storage storage = Storage::kSame;
  bool together = true;  // whether one launch can serve all images
};

Terms checked_terms(const Tensor& unary, const std::vector<Tensor>& lattices,
                    const std::vector<int64_t>& counts, const std::vector<Tensor>& coefficients) {
  const int64_t batch = unary.size(0), labels = unary.size(1);
  FASTSEG_CHECK(counts.size() == coefficients.size() && coefficients.size() <= kMaxTerms,
                "dense_crf: needs one coefficient tensor per term, and on CUDA at most ", kMaxTerms,
                " terms, got ", coefficients.size());
  Terms terms{lattices, counts, coefficients, {}};
  size_t at = 0;
  for (size_t k = 0; k < counts.size(); ++k) {
    const Tensor& c = coefficients[k];
    FASTSEG_CHECK(counts[k] == 1 || counts[k] == batch,
                  "dense_crf: a term needs 1 or B lattices, got ", counts[k]);
    FASTSEG_CHECK(c.is_contiguous() && c.scalar_type() == unary.scalar_type() &&
                      (c.dim() == 1 || c.dim() == 2) && c.size(0) == labels &&
                      c.size(c.dim() - 1) == labels,
                  "dense_crf: coefficients must have shape (L) or (L, L) and the dtype of unary");
    const size_t count = static_cast<size_t>(counts[k]);
    FASTSEG_CHECK(at + count <= lattices.size(), "dense_crf: lattice_counts must add up to ",
                  lattices.size());
    terms.first.push_back(at);
    terms.together = terms.together && evenly_spaced(lattices, at, count);
    at += count;
  }
  return terms;
}

// The updates of `images` images from image b on.
template <typename T, typename V>
void run_updates(const Terms& terms, const Tensor& unary, int64_t b, int64_t images, int width,
                 int64_t iterations, const T* energies, T* beliefs, cudaStream_t stream) {
  const int64_t points = unary.size(2);
  std::vector<BlurTerm<T, V>> blurred;
  std::vector<Tensor> memory;
  Messages<T, V> messages;
  for (size_t k = 0; k < terms.counts.size(); ++k) {
    const bool shared = terms.counts[k] == 1;
    Storage storage;
    const CudaLattice<T> lattice = cuda_lattices<T>(
        "dense_crf", terms.lattices, terms.first[k] + (shared ? 0 : static_cast<size_t>(b)),
        shared ? 1 : static_cast<size_t>(images), points, &storage);
    FASTSEG_CHECK(storage == terms.storage, "dense_crf: all lattices must have one storage");
    blurred.push_back(blur_term<T, V>(unary, lattice, images, width, memory));
    const Tensor& c = terms.coefficients[k];
    const T* coefficients = c.const_data_ptr<T>();
    if (c.dim() == 1) {
      memory.push_back(cuda_workspace<T>(unary, width));
      T* padded = memory.back().mutable_data_ptr<T>();
      planes_to_rows(coefficients, 1, 1, unary.size(1), width, T(1), T(0), padded, stream);
      coefficients = padded;
    }
    messages.term[messages.count++] = {lattice.header,
                                       lattice.vertex,
                                       lattice.weight,
                                       lattice.after,
                                       nullptr,
                                       coefficients,
                                       lattice.distance,
                                       lattice.capacity * width,
                                       static_cast<T>(lattice_gain(lattice.d)),
                                       lattice.d,
                                       c.dim() == 2};
  }
  for (int64_t step = 0; step < iterations; ++step) {
    splat_and_blur(blurred, images, static_cast<const T*>(beliefs), width, false, stream);
    for (size_t k = 0; k < blurred.size(); ++k) messages.term[k].values = blurred[k].values;
    launch_update(messages, images, points, static_cast<int>(unary.size(1)), width, energies,
                  beliefs, nullptr, stream);
  }
}

// See dense_crf_cpu. Energies are only checked, which waits for the stream, outside graph capture.
Tensor dense_crf_cuda(const Tensor& unary, std::optional<Tensor> start,
                      std::vector<Tensor> lattices, std::vector<int64_t> lattice_counts,
                      std::vector<Tensor> coefficients, int64_t height, int64_t width,
                      int64_t iterations, bool point_major, bool logits) {
  FASTSEG_CHECK(unary.dim() == 3 && unary.is_contiguous(),
                "dense_crf: unary must be contiguous with shape (B, L, N)");
  const int64_t batch = unary.size(0), labels = unary.size(1), points = unary.size(2);
  FASTSEG_CHECK(labels >= 1 && labels <= 1024 && iterations >= 0,
                "dense_crf: on CUDA, needs 1 to 1024 labels and iterations >= 0, got ", labels,
                " labels");
  FASTSEG_CHECK(height * width == points, "dense_crf: height * width must be N = ", points);
  FASTSEG_CHECK(!start || (start->is_contiguous() && start->numel() == unary.numel() &&
                           start->scalar_type() == unary.scalar_type()),
                "dense_crf: start must have the shape and dtype of unary");
  Terms terms = checked_terms(unary, lattices, lattice_counts, coefficients);
  const DeviceGuard guard(unary);
  Tensor out = point_major ? torch::stable::new_empty(unary, {batch, points, labels})
                           : torch::stable::empty_like(unary);
  if (out.numel() == 0) return out;
  const int row = static_cast<int>(cuda_row_width(labels));
  const int64_t together = terms.together ? std::min(batch, kImagesTogether) : 1;
  const Tensor invalid = torch::stable::new_zeros(unary, {1}, ScalarType::Int);
  const cudaStream_t stream = current_stream(unary);
  dispatch_lattice_cuda(unary, "dense_crf", [&](auto tag) {
    using T = decltype(tag);
    if (!lattices.empty()) cuda_lattice<T>("dense_crf", lattices[0], points, &terms.storage);
    Tensor energy_memory = cuda_workspace<T>(unary, together * points * row);
    Tensor belief_memory = cuda_workspace<T>(unary, together * points * row);
    T* energies = energy_memory.mutable_data_ptr<T>();
    T* beliefs = belief_memory.mutable_data_ptr<T>();
    for (int64_t b = 0; b < batch; b += together) {
      const int64_t images = std::min(together, batch - b);
      const int64_t offset = b * labels * points;
      planes_to_rows(unary.const_data_ptr<T>() + offset, images, points, labels, row,
                     logits ? T(1) : T(-1), -kInfinity<T>, energies, stream);
      launch_update(Messages<T, T>{}, images, points, static_cast<int>(labels), row,
                    static_cast<const T*>(energies), beliefs,
                    static_cast<int32_t*>(invalid.mutable_data_ptr()), stream);
      if (start) {
        planes_to_rows(start->const_data_ptr<T>() + offset, images, points, labels, row, T(1), T(0),
                       beliefs, stream);
      }
      dispatch_storage<T>(terms.storage, [&](auto value) {
        run_updates<T, decltype(value)>(terms, unary, b, images, row, iterations, energies, beliefs,
                                        stream);
      });
      T* result = out.mutable_data_ptr<T>() + offset;
      if (point_major) {
        const int64_t count = images * points * labels;
        launch(drop_padding<T>, static_cast<unsigned>(ceil_div<int64_t>(count, kThreads)), kThreads,
               0, stream, beliefs, count, static_cast<int>(labels), row, result);
      } else {
        rows_to_planes(static_cast<const T*>(beliefs), images, points, labels, row, result, stream);
      }
    }
  });
  if (is_capturing(stream)) return out;
  const Tensor found = copy_to_host(invalid, stream);
  FASTSEG_CHECK(*static_cast<const int32_t*>(found.const_data_ptr()) == 0,
                "dense_crf: unary must hold no NaN or ", logits ? "+inf" : "-inf",
                ", and a finite ", logits ? "logit" : "energy", " for some label of every point");
  return out;
}

}  // namespace

FASTSEG_CUDA_IMPL(m) { m.impl("dense_crf", TORCH_BOX(&dense_crf_cuda)); }

}  // namespace fastseg
