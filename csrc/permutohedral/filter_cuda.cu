// The permutohedral filter on CUDA: a vertex gathers the rows of its splats, listed by the build,
// so nothing is atomic and every sum has a fixed order. Grid axis y counts the images of the batch,
// z the lattices that one launch serves, since a single image fills few blocks.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cuda.h"
#include "permutohedral/lattice_cuda.h"

namespace fastseg {
namespace {

constexpr int kBlurAxes = 2;  // of a launch
constexpr int kSlots = 4;     // splats of a chunk that are added up side by side

template <typename T, typename V>
struct BlurTerms {
  BlurTerm<T, V> term[kMaxTerms];
};

// Four channels of a row of V as T, and back.
template <typename T, typename V>
__device__ __forceinline__ void load_four(const V* from, T (&to)[4]) {
  V stored[4];
  load_vector(from, stored);
#pragma unroll
  for (int c = 0; c < 4; ++c) to[c] = static_cast<T>(stored[c]);
}

template <typename T, typename V>
__device__ __forceinline__ void store_four(V* to, const T (&from)[4]) {
  if constexpr (std::is_same_v<T, V>) {
    store_vector(to, from);  // a copy would make four stores of it
  } else {
    V stored[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) stored[c] = static_cast<V>(from[c]);
    store_vector(to, stored);
  }
}

// Sums of weight * row over each chunk. `team` lanes of a warp share a chunk: kSlots times the
// row's groups of four channels, eight of them at a time (`team` is kSlots times a power of two).
// Each slot adds up every kSlots-th splat, so that the order does not depend on the number of
// channels, with kUnroll rows on their way at once. A vertex's only chunk goes to its row, the
// others to `partial` (images, max_chunks, width).
template <typename T, typename V>
__global__ void __launch_bounds__(kLatticeThreads, sizeof(T) == 4 ? 3 : 2)
    splat_chunks(const __grid_constant__ BlurTerms<T, V> terms, bool transposed, const T* all_rows,
                 int groups, int team) {
  constexpr int kUnroll = sizeof(T) == 4 ? 4 : 2;
  // The last term first: the bilateral one, whose chunks are longer.
  const BlurTerm<T, V>& term = terms.term[gridDim.z - 1 - blockIdx.z];
  const CudaLattice<T> lattice = term.lattice.image(blockIdx.y);
  const int width = groups * 4;
  const T* rows = all_rows + blockIdx.y * lattice.points * width;
  V* values = term.values + blockIdx.y * lattice.capacity * width;
  T* partial = term.partial + blockIdx.y * lattice.max_chunks() * width;
  const T* scale = lattice.splat_scale(transposed);
  const int64_t chunks = lattice.header->chunks;
  const int at_once = team / kSlots, lane = threadIdx.x % team, slot = lane / at_once;
  const int64_t thread = int64_t{blockIdx.x} * kLatticeThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kLatticeThreads / team;
  // Whole warps stay together for the shuffles.
  for (int64_t i = thread / team, start = thread / 32 * (32 / team); start < chunks;
       i += step, start += step) {
    int32_t chunk[4] = {};
    if (i < chunks) load_vector(lattice.chunk + 4 * i, chunk);
    const int32_t v = chunk[0], begin = chunk[1], end = chunk[2];
    for (int group = lane - slot * at_once, first = 0; first < groups;
         group += at_once, first += at_once) {
      const T* mine = rows + group * 4;
      T sum[4] = {};
      int32_t point[kUnroll];
      T weight[kUnroll];
      const auto fetch = [&](int32_t k) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int32_t at = k + u * kSlots;
          point[u] = at < end ? lattice.splat_point[at] : -1;
          weight[u] = at < end ? lattice.splat_weight[at] : T(0);
        }
      };
      int32_t k = group < groups ? begin + slot : end;
      fetch(k);
      while (k < end) {
        T row[kUnroll][4] = {}, factor[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          factor[u] = weight[u];
          if (point[u] < 0) continue;
          load_vector(row_of(mine, point[u], width), row[u]);
        }
        if (scale != nullptr) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (point[u] >= 0) factor[u] *= scale[point[u]];
          }
        }
        k += kUnroll * kSlots;
        fetch(k);  // while the rows are on their way
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[c] += factor[u] * row[u][c];
        }
      }
      for (int bit = at_once; bit < team; bit *= 2) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], bit);
      }
      if (i >= chunks || group >= groups || slot > 0) continue;
      if (chunk[3] == 1) {
        store_four(values + int64_t{v} * width + group * 4, sum);
      } else {
        store_vector(partial + i * width + group * 4, sum);
      }
    }
  }
}

// Four channels of one vertex per thread: joins its chunks where there are several.
template <typename T, typename V>
__global__ void merge_chunks(const __grid_constant__ BlurTerms<T, V> terms, int groups) {
  const BlurTerm<T, V>& term = terms.term[blockIdx.z];
  const CudaLattice<T> lattice = term.lattice.image(blockIdx.y);
  const int width = groups * 4;
  const T* partial = term.partial + blockIdx.y * lattice.max_chunks() * width;
  V* values = term.values + blockIdx.y * lattice.capacity * width;
  for_each_row(lattice.vertices(), groups, [&](int64_t v, int group) {
    const int32_t begin = lattice.chunk_begin[v], end = lattice.chunk_begin[v + 1];
    if (end - begin == 1) return;
    T sum[4] = {};
#pragma unroll 4
    for (int32_t chunk = begin; chunk < end; ++chunk) {
      T part[4];
      load_vector(partial + int64_t{chunk} * width + group * 4, part);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] += part[c];
    }
    store_four(values + int64_t{v} * width + group * 4, sum);
  });
}

// Four channels of one vertex per thread: value + (one neighbour + the other) / 2 along the first
// axis; and along the second of what the first gives, which the thread computes for the vertex and
// its neighbours alike.
template <typename T, typename V>
__global__ void __launch_bounds__(kLatticeThreads, sizeof(T) == 4 ? 3 : 2)
    blur(const __grid_constant__ BlurTerms<T, V> terms, int groups) {
  const BlurTerm<T, V>& term = terms.term[blockIdx.z];
  if (term.first < 0) return;
  const CudaLattice<T> lattice = term.lattice.image(blockIdx.y);
  const int width = groups * 4;
  const int64_t image = blockIdx.y * lattice.capacity * width;
  const V* from = term.values + image;
  V* to = term.spare + image;
  const int32_t* along_first = lattice.neighbour + 2 * term.first * lattice.capacity;
  const int32_t* along_second = lattice.neighbour + 2 * term.second * lattice.capacity;
  const bool two = term.second >= 0;
  for_each_row(lattice.vertices(), groups, [&](int64_t v, int group) {
    const int32_t centre[3] = {static_cast<int32_t>(v), two ? along_second[v] : -1,
                               two ? along_second[lattice.capacity + v] : -1};
    int32_t side[3][2];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        side[i][s] = centre[i] < 0 ? -1 : along_first[s * lattice.capacity + centre[i]];
      }
    }
    const V* mine = from + group * 4;
    T sum[3][4];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      T value[4] = {}, sides[2][4] = {};
      if (centre[i] >= 0) load_four(row_of(mine, centre[i], width), value);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (side[i][s] >= 0) load_four(row_of(mine, side[i][s], width), sides[s]);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[i][c] = value[c] + T(0.5) * (sides[0][c] + sides[1][c]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[0][c] += T(0.5) * (sum[1][c] + sum[2][c]);
    store_four(to + v * width + group * 4, sum[0]);
  });
}

// Four channels of one point per thread: gathers from its simplex. NaN from a lattice that could
// not be built.
template <typename T, typename V>
__global__ void slice(CudaLattice<T> lattices, bool transposed, T gain, int groups,
                      const V* all_values, T* all_rows) {
  const CudaLattice<T> lattice = lattices.image(blockIdx.y);
  const int width = groups * 4;
  const V* values = all_values + blockIdx.y * lattice.capacity * width;
  T* rows = all_rows + blockIdx.y * lattice.points * width;
  const bool failed = lattice.failed();
  for_each_row(lattice.points, groups, [&](int64_t point, int group) {
    T sum[4] = {};
    if (failed) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] = kNotANumber<T>;
    } else {
      const T scale = (transposed ? lattice.before : lattice.after)[point] * gain;
      for (int r = 0; r <= lattice.d; ++r) {
        const int64_t corner = point * (lattice.d + 1) + r;
        T row[4];
        load_four(row_of(values, lattice.vertex[corner], width) + group * 4, row);
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[c] += lattice.weight[corner] * row[c];
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] *= scale;
    }
    store_vector(rows + point * width + group * 4, sum);
  });
}

// 32 points x 32 channels of an image (grid axis z) through shared memory; block (32, 8).
template <typename T>
__global__ void transpose_to_rows(const T* all_planes, int64_t points, int channels, int width,
                                  T factor, T padding, T* all_rows) {
  FASTSEG_SHARED(T, tile, 32 * 33);
  const T* planes = all_planes + blockIdx.z * channels * points;
  T* rows = all_rows + blockIdx.z * points * width;
  const int64_t point = int64_t{blockIdx.x} * 32;
  const int channel = blockIdx.y * 32;
  for (int y = threadIdx.y; y < 32; y += 8) {
    const int64_t i = point + threadIdx.x;
    T value = padding;
    if (i < points && channel + y < channels) value = planes[(channel + y) * points + i] * factor;
    tile[y * 33 + threadIdx.x] = value;
  }
  __syncthreads();
  for (int y = threadIdx.y; y < 32; y += 8) {
    const int c = channel + threadIdx.x;
    if (point + y < points && c < width) rows[(point + y) * width + c] = tile[threadIdx.x * 33 + y];
  }
}

template <typename T>
__global__ void transpose_to_planes(const T* all_rows, int64_t points, int channels, int width,
                                    T* all_planes) {
  FASTSEG_SHARED(T, tile, 32 * 33);
  const T* rows = all_rows + blockIdx.z * points * width;
  T* planes = all_planes + blockIdx.z * channels * points;
  const int64_t point = int64_t{blockIdx.x} * 32;
  const int channel = blockIdx.y * 32;
  for (int y = threadIdx.y; y < 32; y += 8) {
    const int c = channel + threadIdx.x;
    if (point + y < points && c < channels)
      tile[threadIdx.x * 33 + y] = rows[(point + y) * width + c];
  }
  __syncthreads();
  for (int y = threadIdx.y; y < 32; y += 8) {
    const int64_t i = point + threadIdx.x;
    if (i < points && channel + y < channels) {
      planes[(channel + y) * points + i] = tile[y * 33 + threadIdx.x];
    }
  }
}

dim3 image_grid(unsigned blocks, int64_t images, size_t terms = 1) {
  return dim3(blocks, static_cast<unsigned>(images), static_cast<unsigned>(terms));
}

dim3 transpose_grid(int64_t points, int width, int64_t images) {
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(points, 32)), ceil_div(width, 32),
              static_cast<unsigned>(images));
}

}  // namespace

template <typename T, typename V>
void splat_and_blur(std::vector<BlurTerm<T, V>>& terms, int64_t images, const T* rows, int width,
                    bool transposed, cudaStream_t stream) {
  if (terms.empty()) return;
  const int groups = width / 4;
  int64_t chunks = 0, capacity = 0;
  int d = 0;
  for (const BlurTerm<T, V>& term : terms) {
    chunks = std::max(chunks, term.lattice.max_chunks());
    capacity = std::max(capacity, term.lattice.capacity);
    d = std::max(d, term.lattice.d);
  }
  const auto argument = [&] {
    BlurTerms<T, V> all;
    std::copy(terms.begin(), terms.end(), all.term);
    return all;
  };
  const int64_t each = images * static_cast<int64_t>(terms.size());
  const auto grid = [&](int64_t items, int per_block, int64_t most) {
    return image_grid(lattice_blocks(items, each, per_block, most), images, terms.size());
  };
  int team = kSlots;
  while (team < 32 && team < kSlots * groups) team *= 2;
  // Chunks are of many lengths: more blocks than fit, so that those that end early get another.
  launch(splat_chunks<T, V>, grid(chunks, kLatticeThreads / team, 3 * kMostBlocks), kLatticeThreads,
         0, stream, argument(), transposed, rows, groups, team);
  const dim3 block = row_block(groups);
  launch(merge_chunks<T, V>, grid(capacity, block.y, kMostBlocks), block, 0, stream, argument(),
         groups);
  for (int a = 0; a <= d; a += kBlurAxes) {
    for (BlurTerm<T, V>& term : terms) {
      const auto axis = [&](int i) {
        return i > term.lattice.d || i >= a + kBlurAxes ? -1 : transposed ? term.lattice.d - i : i;
      };
      term.first = axis(a);
      term.second = axis(a + 1);
    }
    launch(blur<T, V>, grid(capacity, block.y, kMostBlocks), block, 0, stream, argument(), groups);
    for (BlurTerm<T, V>& term : terms) {
      if (term.first >= 0) std::swap(term.values, term.spare);
    }
  }
}

template <typename T, typename V>
void slice_rows(const CudaLattice<T>& lattice, int64_t images, const V* values, int width,
                bool transposed, T* rows, cudaStream_t stream) {
  const dim3 block = row_block(width / 4);
  launch(slice<T, V>, image_grid(lattice_blocks(lattice.points, images, block.y), images), block, 0,
         stream, lattice, transposed, static_cast<T>(lattice_gain(lattice.d)), width / 4, values,
         rows);
}

template <typename T>
void planes_to_rows(const T* planes, int64_t images, int64_t points, int64_t channels, int width,
                    T factor, T padding, T* rows, cudaStream_t stream) {
  launch(transpose_to_rows<T>, transpose_grid(points, width, images), dim3(32, 8), 0, stream,
         planes, points, static_cast<int>(channels), width, factor, padding, rows);
}

template <typename T>
void rows_to_planes(const T* rows, int64_t images, int64_t points, int64_t channels, int width,
                    T* planes, cudaStream_t stream) {
  launch(transpose_to_planes<T>, transpose_grid(points, width, images), dim3(32, 8), 0, stream,
         rows, points, static_cast<int>(channels), width, planes);
}

#define FASTSEG_INSTANTIATE(T, V)                                                          \
  template void splat_and_blur(std::vector<BlurTerm<T, V>>&, int64_t, const T*, int, bool, \
                               cudaStream_t);                                              \
  template void slice_rows(const CudaLattice<T>&, int64_t, const V*, int, bool, T*, cudaStream_t);
FASTSEG_INSTANTIATE(float, float)
FASTSEG_INSTANTIATE(float, Half)
FASTSEG_INSTANTIATE(float, BFloat16)
FASTSEG_INSTANTIATE(double, double)
#undef FASTSEG_INSTANTIATE
#define FASTSEG_INSTANTIATE(T)                                                                    \
  template void planes_to_rows(const T*, int64_t, int64_t, int64_t, int, T, T, T*, cudaStream_t); \
  template void rows_to_planes(const T*, int64_t, int64_t, int64_t, int, T*, cudaStream_t);
FASTSEG_INSTANTIATE(float)
FASTSEG_INSTANTIATE(double)
#undef FASTSEG_INSTANTIATE

namespace {

// values (B, C, N) -> K values, the adjoint filter if `transposed`. One lattice per image, or one
// for all.
Tensor permutohedral_filter_cuda(const Tensor& values, std::vector<Tensor> lattices,
                                 bool transposed) {
  FASTSEG_CHECK(values.dim() == 3 && values.is_contiguous(),
                "permutohedral_filter: values must be contiguous with shape (B, C, N)");
  const int64_t batch = values.size(0), channels = values.size(1), points = values.size(2);
  FASTSEG_CHECK(static_cast<int64_t>(lattices.size()) == batch || lattices.size() == 1,
                "permutohedral_filter: needs 1 or B = ", batch, " lattices, got ", lattices.size());
  const DeviceGuard guard(values);
  Tensor out = torch::stable::empty_like(values);
  if (out.numel() == 0) return out;
  const int width = static_cast<int>(cuda_row_width(channels));
  const bool shared = lattices.size() == 1;
  const int64_t images = evenly_spaced(lattices, 0, lattices.size()) ? batch : 1;  // at a time
  dispatch_lattice_cuda(values, "permutohedral_filter", [&](auto tag) {
    using T = decltype(tag);
    const cudaStream_t stream = current_stream(values);
    Tensor row_memory = cuda_workspace<T>(values, images * points * width);
    T* rows = row_memory.mutable_data_ptr<T>();
    for (int64_t b = 0; b < batch; b += images) {
      Storage storage;
      const CudaLattice<T> lattice =
          cuda_lattices<T>("permutohedral_filter", lattices, shared ? 0 : static_cast<size_t>(b),
                           shared ? 1 : static_cast<size_t>(images), points, &storage);
      const int64_t at = b * channels * points;
      planes_to_rows(values.const_data_ptr<T>() + at, images, points, channels, width, T(1), T(0),
                     rows, stream);
      dispatch_storage<T>(storage, [&](auto value) {
        using V = decltype(value);
        std::vector<Tensor> memory;
        std::vector<BlurTerm<T, V>> terms{blur_term<T, V>(values, lattice, images, width, memory)};
        splat_and_blur(terms, images, static_cast<const T*>(rows), width, transposed, stream);
        slice_rows(lattice, images, static_cast<const V*>(terms[0].values), width, transposed, rows,
                   stream);
      });
      rows_to_planes(static_cast<const T*>(rows), images, points, channels, width,
                     out.mutable_data_ptr<T>() + at, stream);
    }
  });
  return out;
}

}  // namespace

FASTSEG_CUDA_IMPL(m) { m.impl("permutohedral_filter", TORCH_BOX(&permutohedral_filter_cuda)); }

}  // namespace fastseg
