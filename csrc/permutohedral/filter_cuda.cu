// The permutohedral lattice and its filter on CUDA. Building sorts the vertex keys of all points'
// simplex corners: equal keys become one vertex, whose run in the sorted list is what it splats. So
// splatting gathers, nothing is atomic, and every sum has a fixed order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/cuda.h"
#include "common/cuda_sort.h"
#include "permutohedral/lattice_cuda.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {
namespace {

constexpr int kThreads = 256;
constexpr int kBoundBlocks = 32;

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads));
}

__device__ __forceinline__ int64_t thread_number() {
  return int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
}

// ---- building -----------------------------------------------------------------------------------

// Least, largest and a sum of zeros (NaN where a value is not finite) of each feature, block by
// block: bounds (d, kBoundBlocks, 3).
template <typename T>
__global__ void feature_bounds(const T* features, int64_t points, T* bounds) {
  FASTSEG_SHARED(T, part, 3 * kThreads);
  const int t = threadIdx.x;
  const T* row = features + blockIdx.y * points;
  T least = row[0], most = row[0], zeros = 0;
  for (int64_t i = thread_number(); i < points; i += int64_t{gridDim.x} * kThreads) {
    least = row[i] < least ? row[i] : least;
    most = row[i] > most ? row[i] : most;
    zeros += row[i] * 0;
  }
  part[t] = least;
  part[kThreads + t] = most;
  part[2 * kThreads + t] = zeros;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) {
      part[t] = part[t + half] < part[t] ? part[t + half] : part[t];
      const T other = part[kThreads + t + half];
      part[kThreads + t] = other > part[kThreads + t] ? other : part[kThreads + t];
      part[2 * kThreads + t] += part[2 * kThreads + t + half];
    }
    __syncthreads();
  }
  if (t < 3) bounds[(blockIdx.y * gridDim.x + blockIdx.x) * 3 + t] = part[t * kThreads];
}

template <typename T>
struct Scale {
  T value[kMaxFeatures];
};

// One point per thread: the weights and keys of its corners.
template <int kD, typename T, typename Key>
__global__ void locate_points(const T* features, int64_t points, Scale<T> scale,
                              KeyFields<Key> fields, T* weights, Key* keys) {
  const int64_t i = thread_number();
  if (i >= points) return;
  constexpr int kMax = kD > 0 ? kD : kMaxFeatures;
  const int d = kD > 0 ? kD : fields.d;
  T f[kMax], cell[kMax + 1], rank[kMax + 1], weight[kMax + 1];
  for (int k = 0; k < d; ++k) f[k] = features[k * points + i];
  locate<kD>(d, f, scale.value, cell, rank, weight);
  Key key = 0;
  for (int j = 1; j <= d; ++j) {
    key += static_cast<Key>(static_cast<int64_t>(cell[j]) - fields.low[j]) << fields.shift[j];
  }
  for (int r = 0; r <= d; ++r) {
    const int64_t at = i * (d + 1) + r;
    weights[at] = weight[r];
    keys[at] = key;
    int axis = 0;
    for (int j = 1; j <= d; ++j) axis = rank[j] == T(d - r) ? j : axis;
    key = next_in_simplex(fields, key, axis);
  }
}

// starts[k] = 1 where a run of equal keys starts, but 0 for the first: the inclusive sum numbers
// the vertices from 0.
template <typename Key>
__global__ void mark_starts(const Key* keys, int64_t splats, int32_t* starts) {
  const int64_t k = thread_number();
  if (k < splats) starts[k] = k > 0 && keys[k] != keys[k - 1];
}

// One splat per thread, in sorted order: `number` is its vertex, `corner` where it came from.
template <typename T, typename Key>
__global__ void write_splats(CudaLattice<T> lattice, const T* weights, const Key* keys,
                             const int32_t* number, const int32_t* corner, Key* vertex_keys) {
  const int64_t k = thread_number();
  if (k >= lattice.splats()) return;
  const int32_t v = number[k], c = corner[k];
  lattice.vertex[c] = v;
  lattice.splat_point[k] = c / (lattice.d + 1);
  lattice.weight[c] = lattice.splat_weight[k] = weights[c];
  if (k == 0 || number[k - 1] != v) {
    lattice.vertex_begin[v] = static_cast<int32_t>(k);
    vertex_keys[v] = keys[k];
  }
  if (k == lattice.splats() - 1)
    lattice.vertex_begin[lattice.vertices] = static_cast<int32_t>(k + 1);
}

// One vertex per thread: its chunks; and along each axis its + neighbour, found in the sorted keys.
template <typename T, typename Key>
__global__ void link_vertices(CudaLattice<T> lattice, KeyFields<Key> fields, const Key* keys,
                              int32_t* chunks) {
  const int64_t v = thread_number();
  if (v >= lattice.vertices) return;
  if (v == 0) lattice.chunk_begin[0] = 0;
  chunks[v] = ceil_div(lattice.vertex_begin[v + 1] - lattice.vertex_begin[v], kChunk);
  const Key key = keys[v];
  const int remainder = static_cast<int>(key & ((Key{1} << fields.shift[1]) - 1));
  for (int axis = 0; axis <= lattice.d; ++axis) {
    const Key wanted = neighbour(fields, key, remainder, axis);
    int64_t low = 0, high = lattice.vertices;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys[middle] < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const bool found = low < lattice.vertices && keys[low] == wanted;
    int32_t* plus = lattice.neighbour + 2 * axis * lattice.vertices;
    plus[v] = found ? static_cast<int32_t>(low) : -1;
    // The - neighbours start as -1 (see build); each vertex is the + neighbour of at most one.
    if (found) plus[lattice.vertices + low] = static_cast<int32_t>(v);
  }
}

// chunk_begin[v + 1] holds the chunks of vertices 0 to v: one vertex per thread lists its own.
template <typename T>
__global__ void number_chunks(CudaLattice<T> lattice) {
  const int64_t v = thread_number();
  if (v >= lattice.vertices) return;
  for (int32_t c = lattice.chunk_begin[v]; c < lattice.chunk_begin[v + 1]; ++c) {
    lattice.chunk_vertex[c] = static_cast<int32_t>(v);
  }
}

template <typename T>
__global__ void fill(T* values, int64_t count, T value) {
  const int64_t i = thread_number();
  if (i < count) values[i] = value;
}

// The scales of a point from its row sum, which channel 0 of `sums` (points, 4) holds.
template <typename T>
__global__ void write_scales(CudaLattice<T> lattice, const T* sums, int normalization) {
  const int64_t i = thread_number();
  if (i >= lattice.points) return;
  const T sum = sums[i * 4] + T(1e-20);
  lattice.before[i] = normalization == 1 ? 1 / sum : normalization == 3 ? 1 / sqrt(sum) : 1;
  lattice.after[i] = normalization == 2 ? 1 / sum : normalization == 3 ? 1 / sqrt(sum) : 1;
}

__global__ void write_header(CudaLatticeHeader header, void* buffer) {
  *static_cast<CudaLatticeHeader*>(buffer) = header;
}

// ---- filtering ----------------------------------------------------------------------------------

// Four channels of one chunk of splats per thread: sums of weight * row. A vertex's only chunk goes
// to its row, the others to `partial` (chunks, width).
template <typename T>
__global__ void splat_chunks(CudaLattice<T> lattice, bool transposed, const T* rows, int groups,
                             T* values, T* partial) {
  const int64_t item = thread_number(), chunk = item / groups;
  if (chunk >= lattice.chunk_begin[lattice.vertices]) return;
  const int group = static_cast<int>(item - chunk * groups);
  const int32_t v = lattice.chunk_vertex[chunk], first = lattice.chunk_begin[v];
  const int32_t begin = lattice.vertex_begin[v] + (static_cast<int32_t>(chunk) - first) * kChunk;
  const int32_t last = lattice.vertex_begin[v + 1];
  const int32_t end = begin + kChunk < last ? begin + kChunk : last;
  const T* scale = transposed ? lattice.after : lattice.before;
  T sum[4] = {};
  for (int32_t k = begin; k < end; ++k) {
    const int64_t point = lattice.splat_point[k];
    const T weight = lattice.splat_weight[k] * scale[point];
    T row[4];
    load_vector(rows + (point * groups + group) * 4, row);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] += weight * row[c];
  }
  const bool only = lattice.chunk_begin[v + 1] - first == 1;
  store_vector((only ? values + v * groups * int64_t{4} : partial + chunk * groups * 4) + group * 4,
               sum);
}

// Four channels of one vertex per thread: joins its chunks where there are several.
template <typename T>
__global__ void merge_chunks(CudaLattice<T> lattice, int groups, const T* partial, T* values) {
  const int64_t item = thread_number(), v = item / groups;
  if (v >= lattice.vertices) return;
  const int32_t begin = lattice.chunk_begin[v], end = lattice.chunk_begin[v + 1];
  if (end - begin == 1) return;
  const int64_t group = item - v * groups;
  T sum[4] = {};
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    T part[4];
    load_vector(partial + (chunk * groups + group) * 4, part);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] += part[c];
  }
  store_vector(values + item * 4, sum);
}

// Four channels of one vertex per thread: value + (one neighbour + the other) / 2 along an axis.
template <typename T>
__global__ void blur(CudaLattice<T> lattice, int axis, int groups, const T* from, T* to) {
  const int64_t item = thread_number(), v = item / groups;
  if (v >= lattice.vertices) return;
  const int64_t group = item - v * groups;
  const int32_t* neighbours = lattice.neighbour + 2 * axis * lattice.vertices + v;
  T sides[4] = {}, value[4];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int32_t n = neighbours[side * lattice.vertices];
    if (n < 0) continue;
    T row[4];
    load_vector(from + (int64_t{n} * groups + group) * 4, row);
#pragma unroll
    for (int c = 0; c < 4; ++c) sides[c] += row[c];
  }
  load_vector(from + item * 4, value);
#pragma unroll
  for (int c = 0; c < 4; ++c) value[c] += T(0.5) * sides[c];
  store_vector(to + item * 4, value);
}

// Four channels of one point per thread: gathers from its simplex.
template <typename T>
__global__ void slice(CudaLattice<T> lattice, bool transposed, T gain, int groups, const T* values,
                      T* rows) {
  const int64_t item = thread_number(), point = item / groups;
  if (point >= lattice.points) return;
  const int64_t group = item - point * groups;
  const T scale = (transposed ? lattice.before : lattice.after)[point] * gain;
  T sum[4] = {};
  for (int r = 0; r <= lattice.d; ++r) {
    const int64_t corner = point * (lattice.d + 1) + r;
    T row[4];
    load_vector(values + (int64_t{lattice.vertex[corner]} * groups + group) * 4, row);
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] += lattice.weight[corner] * row[c];
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) sum[c] *= scale;
  store_vector(rows + item * 4, sum);
}

// 32 points x 32 channels through shared memory; block (32, 8).
template <typename T>
__global__ void transpose_to_rows(const T* planes, int64_t points, int channels, int width,
                                  T factor, T padding, T* rows) {
  FASTSEG_SHARED(T, tile, 32 * 33);
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
__global__ void transpose_to_planes(const T* rows, int64_t points, int channels, int width,
                                    T* planes) {
  FASTSEG_SHARED(T, tile, 32 * 33);
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

}  // namespace

template <typename T>
T* splat_and_blur(const CudaLattice<T>& lattice, const T* rows, int width, bool transposed, T* work,
                  cudaStream_t stream) {
  const int groups = width / 4;
  T *values = work, *spare = work + lattice.vertices * width,
    *partial = spare + lattice.vertices * width;
  launch(splat_chunks<T>, blocks_for(lattice.max_chunks() * groups), kThreads, 0, stream, lattice,
         transposed, rows, groups, values, partial);
  const unsigned blocks = blocks_for(lattice.vertices * groups);
  launch(merge_chunks<T>, blocks, kThreads, 0, stream, lattice, groups, partial, values);
  for (int a = 0; a <= lattice.d; ++a) {
    launch(blur<T>, blocks, kThreads, 0, stream, lattice, transposed ? lattice.d - a : a, groups,
           values, spare);
    std::swap(values, spare);
  }
  return values;
}

template <typename T>
void planes_to_rows(const T* planes, int64_t points, int64_t channels, int width, T factor,
                    T padding, T* rows, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(points, 32)), ceil_div(width, 32));
  launch(transpose_to_rows<T>, grid, dim3(32, 8), 0, stream, planes, points,
         static_cast<int>(channels), width, factor, padding, rows);
}

template <typename T>
void rows_to_planes(const T* rows, int64_t points, int64_t channels, int width, T* planes,
                    cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(points, 32)), ceil_div(width, 32));
  launch(transpose_to_planes<T>, grid, dim3(32, 8), 0, stream, rows, points,
         static_cast<int>(channels), width, planes);
}

#define FASTSEG_INSTANTIATE(T)                                                              \
  template T* splat_and_blur(const CudaLattice<T>&, const T*, int, bool, T*, cudaStream_t); \
  template void planes_to_rows(const T*, int64_t, int64_t, int, T, T, T*, cudaStream_t);    \
  template void rows_to_planes(const T*, int64_t, int64_t, int, T*, cudaStream_t);
FASTSEG_INSTANTIATE(float)
FASTSEG_INSTANTIATE(double)
#undef FASTSEG_INSTANTIATE

namespace {

torch::stable::Device cpu() { return torch::stable::Device(torch::headeronly::DeviceType::CPU); }

// The least and largest cell along each lifted axis. Waits for a small copy to the host.
template <typename T>
void feature_cells(const Tensor& like, const T* features, int d, int64_t points, double* cell_low,
                   double* cell_high, cudaStream_t stream) {
  const int blocks = static_cast<int>(std::min<int64_t>(kBoundBlocks, blocks_for(points)));
  Tensor bounds = cuda_workspace<T>(like, 3 * d * blocks);
  launch(feature_bounds<T>, dim3(blocks, d), kThreads, 0, stream, features, points,
         bounds.mutable_data_ptr<T>());
  const Tensor on_host = torch::stable::to(bounds, cpu());
  const T* part = on_host.const_data_ptr<T>();
  T low[kMaxFeatures], high[kMaxFeatures];
  char finite[kMaxFeatures];
  for (int k = 0; k < d; ++k) {
    low[k] = part[0];
    high[k] = part[1];
    finite[k] = 1;
    for (int b = 0; b < blocks; ++b, part += 3) {
      low[k] = std::min(low[k], part[0]);
      high[k] = std::max(high[k], part[1]);
      finite[k] = finite[k] && part[2] == 0;
    }
  }
  checked_cell_bounds(d, low, high, finite, cell_low, cell_high);
}

// The function that locates points of d features.
template <typename T, typename Key>
auto locate_kernel(int d) {
  if constexpr (sizeof(Key) == 8) {
    if (d == 2) return &locate_points<2, T, Key>;
    if (d == 3) return &locate_points<3, T, Key>;
    if (d == 5) return &locate_points<5, T, Key>;
  }
  return &locate_points<0, T, Key>;
}

// Waits for a small copy to the host, the number of vertices.
template <typename T, typename Key>
Tensor build_with_keys(const Tensor& like, const T* features, int64_t height, int64_t width,
                       const KeyFields<Key>& fields, int bits, int normalization,
                       cudaStream_t stream) {
  const int d = fields.d;
  const int64_t points = height * width, splats = points * (d + 1);
  const auto integers = [&](int64_t count) {
    return torch::stable::new_empty(like, {count}, ScalarType::Int);
  };
  const auto ints = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  const int64_t key_bytes = splats * static_cast<int64_t>(sizeof(Key));
  Tensor key_memory = torch::stable::new_empty(like, {2 * key_bytes}, ScalarType::Byte);
  Key *keys = static_cast<Key*>(key_memory.mutable_data_ptr()), *sorted = keys + splats;
  Tensor order = integers(splats), starts = integers(splats), number = integers(splats);
  Tensor weights = cuda_workspace<T>(like, splats);
  Scale<T> scale;
  lattice_scale(d, scale.value);
  launch(locate_kernel<T, Key>(d), blocks_for(points), kThreads, 0, stream, features, points, scale,
         fields, weights.mutable_data_ptr<T>(), keys);
  radix_sort(like, keys, sorted, ints(order), splats, bits, stream);
  launch(mark_starts<Key>, blocks_for(splats), kThreads, 0, stream, sorted, splats, ints(starts));
  inclusive_sum(like, ints(starts), ints(number), splats, stream);
  const Tensor last = torch::stable::to(torch::stable::narrow(number, 0, splats - 1, 1), cpu());
  const int64_t vertices = *static_cast<const int32_t*>(last.const_data_ptr()) + 1;

  const int64_t bytes = CudaLattice<T>::bytes(points, d, vertices);
  Tensor buffer = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  const CudaLattice<T> lattice(buffer.mutable_data_ptr(), points, d, vertices);
  launch(write_header, 1, 1, 0, stream,
         CudaLatticeHeader{kCudaLatticeMagic, bytes, sizeof(T), normalization, points, d, height,
                           width, vertices},
         buffer.mutable_data_ptr());
  Key* const vertex_keys = keys;  // those of the splats are no longer needed
  launch(write_splats<T, Key>, blocks_for(splats), kThreads, 0, stream, lattice,
         weights.const_data_ptr<T>(), sorted, ints(number), ints(order), vertex_keys);
  const int64_t neighbours = 2 * (d + 1) * vertices;
  launch(fill<int32_t>, blocks_for(neighbours), kThreads, 0, stream, lattice.neighbour, neighbours,
         -1);
  launch(link_vertices<T, Key>, blocks_for(vertices), kThreads, 0, stream, lattice, fields,
         vertex_keys, ints(starts));  // the chunks of each vertex, in memory that serves again
  inclusive_sum(like, ints(starts), lattice.chunk_begin + 1, vertices, stream);
  launch(number_chunks<T>, blocks_for(vertices), kThreads, 0, stream, lattice);
  launch(fill<T>, blocks_for(points), kThreads, 0, stream, lattice.before, points, T(1));
  launch(fill<T>, blocks_for(points), kThreads, 0, stream, lattice.after, points, T(1));
  if (normalization == 0) return buffer;
  Tensor ones = cuda_workspace<T>(like, points * 4);
  Tensor work = cuda_workspace<T>(like, blur_rows(lattice) * 4);
  T* rows = ones.mutable_data_ptr<T>();
  launch(fill<T>, blocks_for(points * 4), kThreads, 0, stream, rows, points * 4, T(1));
  const T* blurred = splat_and_blur<T>(lattice, rows, 4, false, work.mutable_data_ptr<T>(), stream);
  launch(slice<T>, blocks_for(points), kThreads, 0, stream, lattice, false,
         static_cast<T>(lattice_gain(d)), 1, blurred, rows);
  launch(write_scales<T>, blocks_for(points), kThreads, 0, stream, lattice, rows, normalization);
  return buffer;
}

template <typename T>
Tensor build_lattice_cuda(const Tensor& like, const T* features, int d, int64_t height,
                          int64_t width, int normalization, cudaStream_t stream) {
  const int64_t points = height * width;
  FASTSEG_CHECK(points * (d + 1) <= INT32_MAX,
                "permutohedral lattice: points * (features + 1) must be below 2^31, got ", points,
                " * ", d + 1);
  double low[kMaxFeatures + 1], high[kMaxFeatures + 1];
  feature_cells(like, features, d, points, low, high, stream);
  KeyFields<uint64_t> fields;
  int bits = make_fields(d, low, high, &fields);
  if (bits <= 64) {
    return build_with_keys(like, features, height, width, fields, bits, normalization, stream);
  }
  KeyFields<WideKey> wide;
  bits = make_fields(d, low, high, &wide);
  FASTSEG_CHECK(bits <= 128, "permutohedral lattice: ", d,
                " features over this range need vertex keys of ", bits,
                " bits, more than 128: divide them by larger standard deviations");
  return build_with_keys(like, features, height, width, wide, bits, normalization, stream);
}

// features (B, d, height * width) -> one lattice buffer per image, bytes in a 1-D uint8 tensor.
std::vector<Tensor> permutohedral_build_cuda(const Tensor& features, int64_t height, int64_t width,
                                             int64_t normalization) {
  FASTSEG_CHECK(features.dim() == 3 && features.is_contiguous(),
                "permutohedral_build: features must be contiguous with shape (B, d, N)");
  const int64_t batch = features.size(0), d = features.size(1), points = features.size(2);
  FASTSEG_CHECK(d >= 1 && d <= kMaxFeatures, "permutohedral_build: d must be in 1..", kMaxFeatures,
                ", got ", d);
  FASTSEG_CHECK(points >= 1 && height >= 1 && height * width == points,
                "permutohedral_build: needs height * width = N >= 1 points, got ", height, " * ",
                width, " and N = ", points);
  FASTSEG_CHECK(normalization >= 0 && normalization <= 3,
                "permutohedral_build: normalization must be in 0..3, got ", normalization);
  const DeviceGuard guard(features);
  std::vector<Tensor> lattices;
  dispatch_lattice_cuda(features, "permutohedral_build", [&](auto tag) {
    using T = decltype(tag);
    for (int64_t b = 0; b < batch; ++b) {
      lattices.push_back(build_lattice_cuda(
          features, features.const_data_ptr<T>() + b * d * points, static_cast<int>(d), height,
          width, static_cast<int>(normalization), current_stream(features)));
    }
  });
  return lattices;
}

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
  const int width = static_cast<int>(cuda_row_width(channels)), groups = width / 4;
  dispatch_lattice_cuda(values, "permutohedral_filter", [&](auto tag) {
    using T = decltype(tag);
    const cudaStream_t stream = current_stream(values);
    Tensor row_memory = cuda_workspace<T>(values, points * width);
    T* rows = row_memory.mutable_data_ptr<T>();
    for (int64_t b = 0; b < batch; ++b) {
      const auto lattice =
          cuda_lattice<T>("permutohedral_filter",
                          lattices[lattices.size() == 1 ? 0 : static_cast<size_t>(b)], points);
      Tensor work = cuda_workspace<T>(values, blur_rows(lattice) * width);
      const int64_t at = b * channels * points;
      planes_to_rows(values.const_data_ptr<T>() + at, points, channels, width, T(1), T(0), rows,
                     stream);
      const T* blurred =
          splat_and_blur(lattice, rows, width, transposed, work.mutable_data_ptr<T>(), stream);
      launch(slice<T>, blocks_for(points * groups), kThreads, 0, stream, lattice, transposed,
             static_cast<T>(lattice_gain(lattice.d)), groups, blurred, rows);
      rows_to_planes(rows, points, channels, width, out.mutable_data_ptr<T>() + at, stream);
    }
  });
  return out;
}

}  // namespace

FASTSEG_CUDA_IMPL(m) {
  m.impl("permutohedral_build", TORCH_BOX(&permutohedral_build_cuda));
  m.impl("permutohedral_filter", TORCH_BOX(&permutohedral_filter_cuda));
}

}  // namespace fastseg
