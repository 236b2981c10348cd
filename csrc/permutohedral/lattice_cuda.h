// How CUDA stores a lattice, one flat buffer per image, and the steps that the filter op and the
// mean-field op share. Values travel as rows: row i holds the channels of point (or vertex) i,
// padded to a multiple of 4. The images of a batch lie at equal distances in one allocation, so one
// launch serves all of them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "common/cuda.h"
#include "common/dispatch.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {

constexpr int64_t kCudaLatticeMagic = 0x4c41545449434534;  // "LATTICE4"
constexpr int kChunk = 128;  // splats of one vertex that one team of threads adds up

// Why a lattice could not be built; 0 if it could.
enum LatticeStatus : int64_t {
  kNotFinite = 1,
  kOutOfRange = 2,
  kKeyTooWide = 4,
  kTooManyVertices = 8
};

// What the blur keeps the values of the vertices in: the type of the lattice or 16 bits. Sums are
// taken in the type of the lattice.
enum class Storage { kSame = 0, kHalf = 1, kBFloat16 = 2 };

// The start of the buffer: the facts that PermutohedralLattice shows, in the order of the CPU's.
// Only the device knows `vertices`, which may exceed the capacity, `status` and `chunks`, 0 of a
// lattice that could not be built.
struct CudaLatticeHeader {
  int64_t magic, bytes, element_bytes, normalization;
  int64_t points, features, height, width;
  int64_t vertices, status, chunks;
};

// The arrays behind the header; d1 = features + 1, M = capacity in vertices.
template <typename T>
struct CudaLattice {
  int d = 0;
  int64_t points = 0, capacity = 0;
  CudaLatticeHeader* header;
  int32_t* vertex;        // [points][d1] the corners of each point's simplex
  T* weight;              // [points][d1]
  int32_t* splat_point;   // [points * d1] the splats, vertex by vertex
  T* splat_weight;        // [points * d1] times `before` where that equals `after`
  T *before, *after;      // [points] scales of what is splatted and of what is sliced
  int32_t* vertex_begin;  // [M + 1] splats of each vertex
  int32_t* chunk_begin;   // [M + 1] chunks of up to kChunk splats
  int32_t* chunk;        // [max_chunks()][4] vertex, its first and last splat, chunks of the vertex
  int32_t* neighbour;    // [d1][2][M] along each blur axis, -1 where there is none
  int64_t distance = 0;  // in bytes, from this image's buffer to the next; 0: one for all images

  CudaLattice() = default;
  CudaLattice(void* buffer, int64_t points, int d, int64_t capacity)
      : d(d), points(points), capacity(capacity) {
    lay_out(static_cast<char*>(buffer));
  }
  FASTSEG_HOST_DEVICE int64_t splats() const { return points * (d + 1); }
  FASTSEG_HOST_DEVICE int64_t max_chunks() const { return capacity + splats() / kChunk; }

  // The lattice of another image.
  __device__ __forceinline__ CudaLattice image(int64_t b) const {
    CudaLattice other = *this;
    const auto move = [&](auto*& pointer) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
          reinterpret_cast<char*>(pointer) + b * distance);
    };
    move(other.header), move(other.vertex), move(other.weight), move(other.splat_point);
    move(other.splat_weight), move(other.before), move(other.after), move(other.vertex_begin);
    move(other.chunk_begin), move(other.chunk), move(other.neighbour);
    return other;
  }
  __device__ __forceinline__ bool failed() const { return header->status != 0; }
  // The number of vertices, 0 if the lattice could not be built.
  __device__ __forceinline__ int64_t vertices() const { return failed() ? 0 : header->vertices; }
  // What splats are scaled by, beyond `splat_weight`; null: nothing.
  __device__ __forceinline__ const T* splat_scale(bool transposed) const {
    return header->normalization != (transposed ? 2 : 1) ? nullptr : transposed ? after : before;
  }

  // Without reading device memory, a buffer's size tells d, M and the storage: a multiple of 64,
  // which grows with every four vertices by the 64 bytes or more of their neighbours, plus d - 1
  // and 16 for each step of the storage. M is a multiple of 4.
  static int64_t bytes(int64_t points, int d, int64_t capacity, Storage storage) {
    return CudaLattice(nullptr, points, d, capacity).lay_out(nullptr) + d - 1 +
           16 * static_cast<int>(storage);
  }

 private:
  int64_t lay_out(char* base) {
    header = reinterpret_cast<CudaLatticeHeader*>(base);
    int64_t at = 256;
    const auto place = [&](auto*& pointer, int64_t count) {
      using Element = std::remove_reference_t<decltype(*pointer)>;
      pointer = reinterpret_cast<Element*>(base + at);
      at = ceil_div<int64_t>(at + count * static_cast<int64_t>(sizeof(Element)), 64) * 64;
    };
    place(vertex, splats());
    place(weight, splats());
    place(splat_point, splats());
    place(splat_weight, splats());
    place(before, points);
    place(after, points);
    place(vertex_begin, capacity + 1);
    place(chunk_begin, capacity + 1);
    place(chunk, 4 * max_chunks());
    place(neighbour, 2 * (d + 1) * capacity);
    return at;
  }
};

// The lattice in a tensor that permutohedral_build made for this many points of type T.
template <typename T>
CudaLattice<T> cuda_lattice(const char* op, const Tensor& buffer, int64_t points,
                            Storage* storage) {
  FASTSEG_CHECK(buffer.scalar_type() == ScalarType::Byte && buffer.is_contiguous(), op,
                ": lattice must be a tensor that permutohedral_build returned");
  const int tail = static_cast<int>(buffer.numel() % 64), d = tail % 16 + 1;
  *storage = static_cast<Storage>(tail / 16);
  const auto bytes = [&](int64_t fours) {
    return CudaLattice<T>::bytes(points, d, 4 * fours, *storage);
  };
  int64_t low = 0, high = points * (d + 1) / 4 + 1;  // bytes() grows with the capacity
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (bytes(middle) < buffer.numel()) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  FASTSEG_CHECK(bytes(low) == buffer.numel() && *storage <= Storage::kBFloat16, op,
                ": the lattice must be built on this device for ", points,
                " points of the dtype of the values");
  return CudaLattice<T>(const_cast<void*>(buffer.const_data_ptr()), points, d, 4 * low);
}

// Whether one launch can serve these lattices of a batch: they are of one kind, at equal distances.
inline bool evenly_spaced(const std::vector<Tensor>& lattices, size_t first, size_t count) {
  const auto address = [&](size_t i) {
    return reinterpret_cast<intptr_t>(lattices[first + i].const_data_ptr());
  };
  for (size_t i = 1; i < count; ++i) {
    if (lattices[first + i].numel() != lattices[first].numel() ||
        address(i) - address(i - 1) != address(1) - address(0)) {
      return false;
    }
  }
  return true;
}

// The lattices from lattices[first] on, `count` of them as `evenly_spaced` found them; 1 serves all
// images.
template <typename T>
CudaLattice<T> cuda_lattices(const char* op, const std::vector<Tensor>& lattices, size_t first,
                             size_t count, int64_t points, Storage* storage) {
  CudaLattice<T> lattice = cuda_lattice<T>(op, lattices[first], points, storage);
  const auto address = [&](size_t i) {
    return reinterpret_cast<intptr_t>(lattices[i].const_data_ptr());
  };
  if (count > 1) lattice.distance = address(first + 1) - address(first);
  return lattice;
}

// Calls fn with float{} or double{}, the types a lattice is built in.
template <typename Fn>
void dispatch_lattice_cuda(const Tensor& x, const char* op, Fn&& fn) {
  if (x.scalar_type() == ScalarType::Float) return fn(float{});
  if (x.scalar_type() == ScalarType::Double) return fn(double{});
  fail_check(op, ": dtype must be float32 or float64, got scalar type ",
             static_cast<int>(x.scalar_type()));
}

// Calls fn with T{}, Half{} or BFloat16{}, what the values of vertices are stored in.
template <typename T, typename Fn>
void dispatch_storage(Storage storage, Fn&& fn) {
  if (storage == Storage::kSame) return fn(T{});
  if constexpr (std::is_same_v<T, float>) {
    return storage == Storage::kHalf ? fn(Half{}) : fn(BFloat16{});
  }
  fail_check("permutohedral lattice: values are stored in 16 bits for float32 only");
}

// What a lattice that could not be built filters to.
template <typename T>
constexpr T kNotANumber = std::numeric_limits<T>::quiet_NaN();

inline int64_t cuda_row_width(int64_t channels) { return ceil_div<int64_t>(channels, 4) * 4; }

// A tensor of this many elements of T on like's device.
template <typename T>
Tensor cuda_workspace(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count},
                                  sizeof(T) == 8   ? ScalarType::Double
                                  : sizeof(T) == 4 ? ScalarType::Float
                                                   : ScalarType::Short);
}

constexpr int kMaxTerms = 8;  // lattices that one launch splats onto

// One lattice (per image) that rows are splatted onto and blurred on, and the memory for it: two
// rows of V for each vertex of all images, one of T for each chunk.
template <typename T, typename V>
struct BlurTerm {
  CudaLattice<T> lattice;
  V *values, *spare;          // (images, capacity, width) each
  T* partial;                 // (images, max_chunks, width)
  int first = 0, second = 0;  // axes that a launch blurs along, -1: along none
};

template <typename T, typename V>
BlurTerm<T, V> blur_term(const Tensor& like, const CudaLattice<T>& lattice, int64_t images,
                         int width, std::vector<Tensor>& keep) {
  const int64_t values = images * lattice.capacity * width;
  keep.push_back(cuda_workspace<V>(like, 2 * values));
  V* memory = static_cast<V*>(keep.back().mutable_data_ptr());
  keep.push_back(cuda_workspace<T>(like, images * lattice.max_chunks() * width));
  return {lattice, memory, memory + values, static_cast<T*>(keep.back().mutable_data_ptr())};
}

// Splats the points' rows (images, points, width) onto the vertices of each lattice and blurs along
// all its axes, last axis first and with the scales exchanged if `transposed`. The blurred rows
// are the terms' `values`.
template <typename T, typename V>
void splat_and_blur(std::vector<BlurTerm<T, V>>& terms, int64_t images, const T* rows, int width,
                    bool transposed, cudaStream_t stream);

// rows (images, points, width) = filtered values, gathered from blurred vertices.
template <typename T, typename V>
void slice_rows(const CudaLattice<T>& lattice, int64_t images, const V* values, int width,
                bool transposed, T* rows, cudaStream_t stream);

// planes (images, channels, points) -> rows (images, points, width), times `factor`, padded with
// `padding`.
template <typename T>
void planes_to_rows(const T* planes, int64_t images, int64_t points, int64_t channels, int width,
                    T factor, T padding, T* rows, cudaStream_t stream);
template <typename T>
void rows_to_planes(const T* rows, int64_t images, int64_t points, int64_t channels, int width,
                    T* planes, cudaStream_t stream);

// ---- threads over counts that only the device knows ----

constexpr int kLatticeThreads = 256;
// What the device holds at a time; threads take several items each beyond it. More blocks, most of
// them with nothing to do, cost more than the work of one image (1.5 us for 4224 blocks).
constexpr int64_t kMostBlocks = 132 * 8;

// Blocks of one image, of about `most` in all.
inline unsigned lattice_blocks(int64_t items, int64_t images = 1, int per_block = kLatticeThreads,
                               int64_t most = kMostBlocks) {
  const int64_t share = std::max(ceil_div<int64_t>(most, images), most / 8);
  return static_cast<unsigned>(
      std::max<int64_t>(1, std::min(share, ceil_div<int64_t>(items, per_block))));
}

// fn(i) for each i < count, the threads of grid axis x one after another.
template <typename Fn>
__device__ __forceinline__ void for_each_item(int64_t count, const Fn& fn) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    fn(i);
  }
}

// Row i >= 0 of rows of `width` values. Unsigned, it is one instruction; in int64_t the compiler
// joins the product with that of the image's offset, which takes ten.
template <typename V>
__device__ __forceinline__ const V* row_of(const V* rows, int32_t i, int width) {
  const auto bytes = static_cast<uint32_t>(width) * static_cast<uint32_t>(sizeof(V));
  return reinterpret_cast<const V*>(reinterpret_cast<const char*>(rows) +
                                    uint64_t{static_cast<uint32_t>(i)} * bytes);
}

// fn(row, group) for `rows` rows of `groups` times four channels, without a division: the launch's
// block is row_block(groups).
inline dim3 row_block(int groups) {
  const int x = std::min(groups, kLatticeThreads);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(kLatticeThreads / x));
}

template <typename Fn>
__device__ __forceinline__ void for_each_row(int64_t rows, int groups, const Fn& fn) {
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    for (int group = threadIdx.x; group < groups; group += blockDim.x) fn(row, group);
  }
}

}  // namespace fastseg
