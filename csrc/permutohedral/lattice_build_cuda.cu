// Building permutohedral lattices on CUDA, all images of a batch at once. The vertex keys of all
// points' simplex corners, image on top, are sorted: equal keys become one vertex, whose run in the
// sorted list is what it splats. Nothing waits for the host, which sizes all buffers by a capacity;
// outside graph capture it looks at the outcome at the end, and builds again where that was too
// low.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/cuda.h"
#include "common/cuda_sort.h"
#include "permutohedral/lattice_cuda.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {
namespace {

constexpr int kThreads = kLatticeThreads;
constexpr int kBoundBlocks = 32;

// How keys are laid out, decided on the device. fields.all_units etc. are those of one image; the
// image's number is above them.
template <typename Key>
struct KeyPlan {
  KeyFields<Key> fields;
  int image_shift;
  int64_t status;
};

// Least, largest and a sum of zeros (NaN where a value is not finite) of each feature (images, d,
// points), block by block: bounds (d, gridDim.x, 3).
template <typename T>
__global__ void feature_bounds(const T* features, int64_t images, int64_t points, T* bounds) {
  FASTSEG_SHARED(T, part, 3 * kThreads);
  const int t = threadIdx.x;
  const int64_t d = gridDim.y;
  const T* row = features + blockIdx.y * points;
  T least = row[0], most = row[0], zeros = 0;
  for_each_item(images * points, [&](int64_t i) {
    const int64_t image = i / points;
    const T value = row[image * d * points + (i - image * points)];
    least = value < least ? value : least;
    most = value > most ? value : most;
    zeros += value * 0;
  });
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

// One block of 32: the plan from the bounds, as checked_cell_bounds and make_fields have it.
template <typename T, typename Key>
__global__ void plan_keys(int d, int blocks, int image_bits, const T* bounds, KeyPlan<Key>* plan) {
  FASTSEG_SHARED(T, low, kMaxFeatures);
  FASTSEG_SHARED(T, high, kMaxFeatures);
  FASTSEG_SHARED(double, cell_low, kMaxFeatures + 1);
  FASTSEG_SHARED(double, cell_high, kMaxFeatures + 1);
  const int k = threadIdx.x;
  bool finite = true;
  if (k < d) {
    const T* part = bounds + k * blocks * 3;
    low[k] = part[0];
    high[k] = part[1];
    for (int b = 0; b < blocks; ++b, part += 3) {
      low[k] = part[0] < low[k] ? part[0] : low[k];
      high[k] = part[1] > high[k] ? part[1] : high[k];
      finite = finite && part[2] == 0;
    }
  }
  finite = __all_sync(0xffffffffu, finite);
  __syncwarp();
  if (k != 0) return;
  int64_t status = finite ? 0 : kNotFinite;
  if (finite) {
    cell_bounds(d, low, high, cell_low, cell_high);
    for (int j = 0; j <= d; ++j) {
      if (!(-cell_low[j] < largest_cell<T>() && cell_high[j] < largest_cell<T>())) {
        status = kOutOfRange;
      }
    }
  }
  if (status == 0) {
    plan->image_shift = make_fields(d, cell_low, cell_high, &plan->fields);
    if (plan->image_shift + image_bits > static_cast<int>(8 * sizeof(Key))) status = kKeyTooWide;
  }
  plan->status = status;
}

template <typename T>
struct Scale {
  T value[kMaxFeatures];
};

// The weights and keys of the corners of one point.
template <int kD, typename T, typename Key>
__device__ __forceinline__ void locate_point(const T* features, int64_t points, int runtime_d,
                                             const T* scale, const KeyFields<Key>& fields, Key key,
                                             T* weights, Key* keys) {
  constexpr int kMax = kD > 0 ? kD : kMaxFeatures;
  const int d = kD > 0 ? kD : runtime_d;
  T f[kMax], cell[kMax + 1], rank[kMax + 1], weight[kMax + 1];
  for (int k = 0; k < d; ++k) f[k] = features[k * points];
  locate<kD>(d, f, scale, cell, rank, weight);
  for (int j = 1; j <= d; ++j) {
    key += static_cast<Key>(static_cast<int64_t>(cell[j]) - fields.low[j]) << fields.shift[j];
  }
  for (int r = 0; r <= d; ++r) {
    weights[r] = weight[r];
    keys[r] = key;
    int axis = 0;
    for (int j = 1; j <= d; ++j) axis = rank[j] == T(d - r) ? j : axis;
    key = next_in_simplex(fields, key, axis);
  }
}

// One point per thread. Grid axis y here and below: images.
template <int kD, typename T, typename Key>
__global__ void locate_points(CudaLattice<T> lattices, const T* all_features, Scale<T> scale,
                              const KeyPlan<Key>* plan, Key* all_keys) {
  const CudaLattice<T> lattice = lattices.image(blockIdx.y);
  const int64_t points = lattice.points;
  const int d = lattice.d;
  const T* features = all_features + blockIdx.y * d * points;
  Key* keys = all_keys + blockIdx.y * lattice.splats();
  const Key key = blockIdx.y > 0 ? static_cast<Key>(blockIdx.y) << plan->image_shift : Key(0);
  for_each_item(points, [&](int64_t i) {
    const int64_t at = i * (d + 1);
    if (plan->status != 0) {
      for (int r = 0; r <= d; ++r) lattice.weight[at + r] = 0, keys[at + r] = 0;
      return;
    }
    locate_point<kD>(features + i, points, d, scale.value, plan->fields, key, lattice.weight + at,
                     keys + at);
  });
}

// starts[k] = 1 where a run of equal keys starts, but 0 for the first: the inclusive sum numbers
// the vertices from 0.
template <typename Key>
__global__ void mark_starts(const Key* keys, int64_t splats, int32_t* starts) {
  for_each_item(splats, [&](int64_t k) { starts[k] = k > 0 && keys[k] != keys[k - 1]; });
}

// One image per thread: its header, and outcome (vertices, status) for the host.
template <typename T, typename Key>
__global__ void write_headers(CudaLattice<T> lattices, int64_t images, CudaLatticeHeader header,
                              const int32_t* number, const KeyPlan<Key>* plan, int64_t* outcome) {
  for_each_item(images, [&](int64_t b) {
    const CudaLattice<T> lattice = lattices.image(b);
    const int64_t first = b * lattice.splats();
    CudaLatticeHeader mine = header;
    mine.vertices = number[first + lattice.splats() - 1] - number[first] + 1;
    mine.status = plan->status;
    mine.chunks = 0;
    if (mine.vertices > lattice.capacity) mine.status |= kTooManyVertices;
    *lattice.header = mine;
    outcome[2 * b] = mine.vertices;
    outcome[2 * b + 1] = mine.status;
  });
}

// What the following kernels do not write everywhere.
template <typename T>
__global__ void clear(CudaLattice<T> lattices, int32_t* all_chunks) {
  const CudaLattice<T> lattice = lattices.image(blockIdx.y);
  int32_t* chunks = all_chunks + blockIdx.y * lattice.capacity;
  for_each_item(2 * (lattice.d + 1) * lattice.capacity,
                [&](int64_t i) { lattice.neighbour[i] = -1; });
  for_each_item(lattice.capacity, [&](int64_t i) { chunks[i] = 0; });
  for_each_item(lattice.points, [&](int64_t i) { lattice.before[i] = lattice.after[i] = 1; });
}

// One splat per thread, in sorted order: `number` is its vertex, `corner` where it came from, both
// counted over all images.
template <typename T, typename Key>
__global__ void write_splats(CudaLattice<T> lattices, const Key* keys, const int32_t* number,
                             const int32_t* corner, Key* vertex_keys) {
  const CudaLattice<T> lattice = lattices.image(blockIdx.y);
  const int64_t first = blockIdx.y * lattice.splats();
  for_each_item(lattice.splats(), [&](int64_t k) {
    const int64_t v = number[first + k] - number[first], c = corner[first + k] - first;
    if (v >= lattice.capacity) return;  // then the lattice has failed
    lattice.vertex[c] = static_cast<int32_t>(v);
    lattice.splat_point[k] = static_cast<int32_t>(c / (lattice.d + 1));
    lattice.splat_weight[k] = lattice.weight[c];
    if (k == 0 || number[first + k - 1] != number[first + k]) {
      lattice.vertex_begin[v] = static_cast<int32_t>(k);
      vertex_keys[blockIdx.y * lattice.capacity + v] = keys[first + k];
    }
    if (k == lattice.splats() - 1) lattice.vertex_begin[v + 1] = static_cast<int32_t>(k + 1);
  });
}

// One vertex per thread: its chunks; and along each axis its + neighbour, found in the sorted keys.
template <typename T, typename Key>
__global__ void link_vertices(CudaLattice<T> lattices, const KeyPlan<Key>* plan,
                              const Key* all_keys, int32_t* all_chunks) {
  const CudaLattice<T> lattice = lattices.image(blockIdx.y);
  const Key* keys = all_keys + blockIdx.y * lattice.capacity;
  int32_t* chunks = all_chunks + blockIdx.y * lattice.capacity;
  const KeyFields<Key>& fields = plan->fields;
  const int64_t vertices = lattice.vertices();
  for_each_item(vertices, [&](int64_t v) {
    chunks[v] = ceil_div(lattice.vertex_begin[v + 1] - lattice.vertex_begin[v], kChunk);
    const Key key = keys[v];
    const int remainder = static_cast<int>(key & ((Key{1} << fields.shift[1]) - 1));
    for (int axis = 0; axis <= lattice.d; ++axis) {
      const Key wanted = neighbour(fields, key, remainder, axis);
      int64_t low = 0, high = vertices;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (keys[middle] < wanted) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      if (low == vertices || keys[low] != wanted) continue;
      // Each vertex is the + neighbour of at most one.
      int32_t* plus = lattice.neighbour + 2 * axis * lattice.capacity;
      plus[v] = static_cast<int32_t>(low);
      plus[lattice.capacity + low] = static_cast<int32_t>(v);
    }
  });
}

// `sums` holds the chunks of this and all earlier vertices, over all images: one vertex per thread
// lists its own.
template <typename T>
__global__ void number_chunks(CudaLattice<T> lattices, const int32_t* all_sums) {
  const CudaLattice<T> lattice = lattices.image(blockIdx.y);
  const int32_t* sums = all_sums + blockIdx.y * lattice.capacity;
  const int32_t before = blockIdx.y > 0 ? sums[-1] : 0;
  for_each_item(lattice.vertices(), [&](int64_t v) {
    const int32_t begin = v > 0 ? sums[v - 1] - before : 0, end = sums[v] - before;
    if (v == 0) lattice.chunk_begin[0] = 0;
    lattice.chunk_begin[v + 1] = end;
    if (v == lattice.header->vertices - 1) lattice.header->chunks = end;
    const int32_t last = lattice.vertex_begin[v + 1];
    int32_t chunk[4] = {static_cast<int32_t>(v), lattice.vertex_begin[v], 0, end - begin};
    for (int32_t c = begin; c < end; ++c, chunk[1] = chunk[2]) {
      chunk[2] = chunk[1] + kChunk < last ? chunk[1] + kChunk : last;
      store_vector(lattice.chunk + 4 * int64_t{c}, chunk);
    }
  });
}

template <typename T>
__global__ void fill(T* values, int64_t count, T value) {
  for_each_item(count, [&](int64_t i) { values[i] = value; });
}

// The scales of a point from its row sum, which channel 0 of `sums` (images, points, 4) holds.
template <typename T>
__global__ void write_scales(CudaLattice<T> lattices, const T* sums, int normalization) {
  const CudaLattice<T> lattice = lattices.image(blockIdx.y);
  for_each_item(lattice.points, [&](int64_t i) {
    const T sum = sums[(blockIdx.y * lattice.points + i) * 4] + T(1e-20);
    lattice.before[i] = normalization == 1 ? 1 / sum : normalization == 3 ? 1 / sqrt(sum) : 1;
    lattice.after[i] = normalization == 2 ? 1 / sum : normalization == 3 ? 1 / sqrt(sum) : 1;
  });
}

// One splat per thread: see CudaLattice::splat_weight.
template <typename T>
__global__ void scale_splats(CudaLattice<T> lattices) {
  const CudaLattice<T> lattice = lattices.image(blockIdx.y);
  if (lattice.failed()) return;
  for_each_item(lattice.splats(), [&](int64_t k) {
    lattice.splat_weight[k] *= lattice.before[lattice.splat_point[k]];
  });
}

// ---- host functions -----------------------------------------------------------------------------

// What is built: features (images, d, height * width) of type T.
template <typename T>
struct Request {
  const Tensor& like;
  const T* features;
  int64_t images, height, width;
  int d, normalization;
  Storage storage;
  cudaStream_t stream;

  int64_t points() const { return height * width; }
  int64_t splats() const { return points() * (d + 1); }
  int bound_blocks() const {
    return std::min<int>(kBoundBlocks, lattice_blocks(images * points()));
  }
  int image_bits() const {
    int bits = 0;
    while ((images - 1) >> bits != 0) ++bits;
    return bits;
  }
};

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

// One lattice buffer per image; and outcome (images, 2), the vertices that each has and its status.
template <typename Key, typename T>
std::vector<Tensor> build_with_keys(const Request<T>& r, int64_t capacity, const Tensor& bounds,
                                    Tensor& outcome) {
  const int64_t points = r.points(), splats = r.images * r.splats();
  const cudaStream_t stream = r.stream;
  const auto bytes_of = [&](int64_t count) {
    return torch::stable::new_empty(r.like, {count}, ScalarType::Byte);
  };
  const auto integers = [&](int64_t count) {
    return torch::stable::new_empty(r.like, {count}, ScalarType::Int);
  };
  const auto ints = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  const auto each_image = [&](int64_t items) {
    return dim3(lattice_blocks(items, r.images), static_cast<unsigned>(r.images));
  };
  constexpr int64_t kKeyBytes = sizeof(Key);
  Tensor plan_memory = bytes_of(sizeof(KeyPlan<Key>)),
         key_memory = bytes_of(2 * splats * kKeyBytes);
  Tensor vertex_key_memory = bytes_of(r.images * capacity * kKeyBytes);
  auto* plan = static_cast<KeyPlan<Key>*>(plan_memory.mutable_data_ptr());
  Key *keys = static_cast<Key*>(key_memory.mutable_data_ptr()), *sorted = keys + splats;
  Key* vertex_keys = static_cast<Key*>(vertex_key_memory.mutable_data_ptr());
  Tensor order = integers(splats), starts = integers(splats), number = integers(splats);
  Tensor chunks = integers(r.images * capacity), sums = integers(r.images * capacity);
  outcome = torch::stable::new_empty(r.like, {2 * r.images}, ScalarType::Long);

  const int64_t bytes = CudaLattice<T>::bytes(points, r.d, capacity, r.storage);
  const int64_t distance = ceil_div<int64_t>(bytes, 256) * 256;
  Tensor buffer = bytes_of(r.images * distance);
  CudaLattice<T> lattice(buffer.mutable_data_ptr(), points, r.d, capacity);
  lattice.distance = distance;

  launch(plan_keys<T, Key>, 1, 32, 0, stream, r.d, r.bound_blocks(), r.image_bits(),
         bounds.const_data_ptr<T>(), plan);
  Scale<T> scale;
  lattice_scale(r.d, scale.value);
  launch(locate_kernel<T, Key>(r.d), each_image(points), kThreads, 0, stream, lattice, r.features,
         scale, plan, keys);
  radix_sort(r.like, keys, sorted, ints(order), splats, 8 * sizeof(Key), stream);
  launch(mark_starts<Key>, lattice_blocks(splats), kThreads, 0, stream, sorted, splats,
         ints(starts));
  inclusive_sum(r.like, ints(starts), ints(number), splats, stream);

  launch(write_headers<T, Key>, lattice_blocks(r.images), kThreads, 0, stream, lattice, r.images,
         CudaLatticeHeader{kCudaLatticeMagic, bytes, sizeof(T), r.normalization, points, r.d,
                           r.height, r.width, 0, 0, 0},
         ints(number), plan, static_cast<int64_t*>(outcome.mutable_data_ptr()));
  launch(clear<T>, each_image(2 * (r.d + 1) * capacity), kThreads, 0, stream, lattice,
         ints(chunks));
  launch(write_splats<T, Key>, each_image(r.splats()), kThreads, 0, stream, lattice, sorted,
         ints(number), ints(order), vertex_keys);
  launch(link_vertices<T, Key>, each_image(capacity), kThreads, 0, stream, lattice, plan,
         vertex_keys, ints(chunks));
  inclusive_sum(r.like, ints(chunks), ints(sums), r.images * capacity, stream);
  launch(number_chunks<T>, each_image(capacity), kThreads, 0, stream, lattice, ints(sums));
  if (r.normalization != 0) {  // in the type of T, whatever the values are stored in
    constexpr int kWidth = 4;
    Tensor ones = cuda_workspace<T>(r.like, r.images * points * kWidth);
    std::vector<Tensor> memory;
    std::vector<BlurTerm<T, T>> terms{blur_term<T, T>(r.like, lattice, r.images, kWidth, memory)};
    T* rows = ones.mutable_data_ptr<T>();
    launch(fill<T>, lattice_blocks(ones.numel()), kThreads, 0, stream, rows, ones.numel(), T(1));
    splat_and_blur(terms, r.images, static_cast<const T*>(rows), kWidth, false, stream);
    slice_rows(lattice, r.images, static_cast<const T*>(terms[0].values), kWidth, false, rows,
               stream);
    launch(write_scales<T>, each_image(points), kThreads, 0, stream, lattice, rows,
           r.normalization);
    if (r.normalization == 3) {
      launch(scale_splats<T>, each_image(r.splats()), kThreads, 0, stream, lattice);
    }
  }
  std::vector<Tensor> lattices;
  for (int64_t b = 0; b < r.images; ++b) {
    lattices.push_back(torch::stable::narrow(buffer, 0, b * distance, bytes));
  }
  return lattices;
}

// Throws what is wrong with features whose bounds are these: the CPU's sentences.
template <typename T>
void explain_failure(const Request<T>& r, const Tensor& bounds) {
  const Tensor on_host = copy_to_host(bounds, r.stream);
  const T* part = on_host.const_data_ptr<T>();
  T low[kMaxFeatures], high[kMaxFeatures];
  char finite[kMaxFeatures];
  for (int k = 0; k < r.d; ++k) {
    low[k] = part[0];
    high[k] = part[1];
    finite[k] = 1;
    for (int b = 0; b < r.bound_blocks(); ++b, part += 3) {
      low[k] = std::min(low[k], part[0]);
      high[k] = std::max(high[k], part[1]);
      finite[k] = finite[k] && part[2] == 0;
    }
  }
  double cell_low[kMaxFeatures + 1], cell_high[kMaxFeatures + 1];
  checked_cell_bounds(r.d, low, high, finite, cell_low, cell_high);
  KeyFields<WideKey> wide;
  fail_check("permutohedral lattice: ", r.d, " features over this range need vertex keys of ",
             make_fields(r.d, cell_low, cell_high, &wide) + r.image_bits(),
             " bits, more than 128: divide them by larger standard deviations");
}

// The lattices of as many images as one sort holds.
template <typename T>
std::vector<Tensor> build_lattices(const Request<T>& r) {
  constexpr int64_t kLeastCapacity = 4096;  // vertices; costs little memory
  constexpr int kNarrowFeatures = 8;        // beyond, 64 bits leave few for each
  Tensor bounds = cuda_workspace<T>(r.like, 3 * r.d * r.bound_blocks());
  launch(feature_bounds<T>, dim3(r.bound_blocks(), r.d), kThreads, 0, r.stream, r.features,
         r.images, r.points(), bounds.mutable_data_ptr<T>());
  // Photographs have 0.03 to 1.2 vertices a pixel (sigmas of 80 and 13 to 67 and 3).
  int64_t wanted = std::max<int64_t>(kLeastCapacity, r.points() * 3 / 2);
  bool wide = r.d > kNarrowFeatures;
  while (true) {
    const int64_t capacity = ceil_div<int64_t>(std::min(wanted, r.splats()), 4) * 4;
    Tensor outcome;
    std::vector<Tensor> lattices = wide ? build_with_keys<WideKey>(r, capacity, bounds, outcome)
                                        : build_with_keys<uint64_t>(r, capacity, bounds, outcome);
    if (is_capturing(r.stream)) return lattices;
    const Tensor on_host = copy_to_host(outcome, r.stream);
    const auto* facts = static_cast<const int64_t*>(on_host.const_data_ptr());
    int64_t status = 0;
    for (int64_t b = 0; b < r.images; ++b) {
      wanted = std::max(wanted, facts[2 * b]);
      status |= facts[2 * b + 1];
    }
    if (status == 0) return lattices;
    if ((status & (kNotFinite | kOutOfRange)) || (wide && (status & kKeyTooWide))) {
      explain_failure(r, bounds);
    }
    wide = wide || (status & kKeyTooWide);
  }
}

// features (B, d, height * width) -> one lattice buffer per image, bytes in a 1-D uint8 tensor.
// `normalization` + 4 or + 8: the values of vertices are stored in float16 or bfloat16. While a
// CUDA graph is captured nothing is checked: a lattice that cannot be built then filters to NaN.
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
  FASTSEG_CHECK(normalization >= 0 && normalization <= 11,
                "permutohedral_build: normalization must be in 0..3, plus 4 or 8 for 16-bit "
                "storage, got ",
                normalization);
  FASTSEG_CHECK(points * (d + 1) <= INT32_MAX,
                "permutohedral lattice: points * (features + 1) must be below 2^31, got ", points,
                " * ", d + 1);
  const DeviceGuard guard(features);
  const int64_t at_once = std::min<int64_t>(INT32_MAX / (points * (d + 1)), 65535);
  std::vector<Tensor> lattices;
  dispatch_lattice_cuda(features, "permutohedral_build", [&](auto tag) {
    using T = decltype(tag);
    for (int64_t b = 0; b < batch; b += at_once) {
      const Request<T> request{features,
                               features.const_data_ptr<T>() + b * d * points,
                               std::min(at_once, batch - b),
                               height,
                               width,
                               static_cast<int>(d),
                               static_cast<int>(normalization % 4),
                               static_cast<Storage>(normalization / 4),
                               current_stream(features)};
      for (Tensor& lattice : build_lattices(request)) lattices.push_back(lattice);
    }
  });
  return lattices;
}

}  // namespace

FASTSEG_CUDA_IMPL(m) { m.impl("permutohedral_build", TORCH_BOX(&permutohedral_build_cuda)); }

}  // namespace fastseg
