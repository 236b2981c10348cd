// How CUDA stores a lattice, one flat buffer per image, and the steps that the filter op and the
// mean-field op share. Values travel as rows: row i holds the channels of point (or vertex) i,
// padded to a multiple of 4.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/check.h"
#include "common/cuda.h"
#include "common/dispatch.h"
#include "permutohedral/permutohedral.h"

namespace fastseg {

constexpr int64_t kCudaLatticeMagic = 0x4c41545449434532;  // "LATTICE2"
constexpr int kChunk = 128;  // splats of one vertex that one thread group adds up

// The start of the buffer: the facts that PermutohedralLattice shows, in the order of the CPU's.
struct CudaLatticeHeader {
  int64_t magic, bytes, element_bytes, normalization;
  int64_t points, features, height, width;
  int64_t vertices;
};

// The arrays behind the header; d1 = features + 1, M = vertices.
template <typename T>
struct CudaLattice {
  int d = 0;
  int64_t points = 0, vertices = 0;
  int32_t* vertex;        // [points][d1] the corners of each point's simplex
  T* weight;              // [points][d1]
  int32_t* splat_point;   // [points * d1] the splats, vertex by vertex
  T* splat_weight;        // [points * d1]
  T *before, *after;      // [points] scales of what is splatted and of what is sliced
  int32_t* vertex_begin;  // [M + 1] splats of each vertex
  int32_t* chunk_begin;   // [M + 1] chunks of up to kChunk splats
  int32_t* chunk_vertex;  // [max_chunks()]
  int32_t* neighbour;     // [d1][2][M] along each blur axis, -1 where there is none

  CudaLattice(void* buffer, int64_t points, int d, int64_t vertices)
      : d(d), points(points), vertices(vertices) {
    lay_out(static_cast<char*>(buffer));
  }
  FASTSEG_HOST_DEVICE int64_t splats() const { return points * (d + 1); }
  int64_t max_chunks() const { return vertices + splats() / kChunk; }

  // Without reading device memory, a buffer's size tells d and M: a multiple of 16, which grows
  // with every vertex by the 16 bytes or more of its neighbours, plus d.
  static int64_t bytes(int64_t points, int d, int64_t vertices) {
    return CudaLattice(nullptr, points, d, vertices).lay_out(nullptr) + d;
  }

 private:
  int64_t lay_out(char* base) {
    int64_t at = 256;
    const auto place = [&](auto*& pointer, int64_t count) {
      using Element = std::remove_reference_t<decltype(*pointer)>;
      pointer = reinterpret_cast<Element*>(base + at);
      at = ceil_div<int64_t>(at + count * static_cast<int64_t>(sizeof(Element)), 16) * 16;
    };
    place(vertex, splats());
    place(weight, splats());
    place(splat_point, splats());
    place(splat_weight, splats());
    place(before, points);
    place(after, points);
    place(vertex_begin, vertices + 1);
    place(chunk_begin, vertices + 1);
    place(chunk_vertex, max_chunks());
    place(neighbour, 2 * (d + 1) * vertices);
    return at;
  }
};

// The lattice in a tensor that permutohedral_build made for this many points of type T.
template <typename T>
CudaLattice<T> cuda_lattice(const char* op, const Tensor& buffer, int64_t points) {
  FASTSEG_CHECK(buffer.scalar_type() == ScalarType::Byte && buffer.is_contiguous(), op,
                ": lattice must be a tensor that permutohedral_build returned");
  const int d = static_cast<int>((buffer.numel() - 1) % 16 + 1);
  int64_t low = 0, high = points * (d + 1);  // bytes() grows with the number of vertices
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (CudaLattice<T>::bytes(points, d, middle) < buffer.numel()) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  FASTSEG_CHECK(CudaLattice<T>::bytes(points, d, low) == buffer.numel(), op,
                ": the lattice must be built on this device for ", points,
                " points of the dtype of the values");
  return CudaLattice<T>(const_cast<void*>(buffer.const_data_ptr()), points, d, low);
}

// Calls fn with float{} or double{}, the types a lattice is built in.
template <typename Fn>
void dispatch_lattice_cuda(const Tensor& x, const char* op, Fn&& fn) {
  if (x.scalar_type() == ScalarType::Float) return fn(float{});
  if (x.scalar_type() == ScalarType::Double) return fn(double{});
  fail_check(op, ": dtype must be float32 or float64, got scalar type ",
             static_cast<int>(x.scalar_type()));
}

inline int64_t cuda_row_width(int64_t channels) { return ceil_div<int64_t>(channels, 4) * 4; }

// A tensor of this many elements of T on like's device.
template <typename T>
Tensor cuda_workspace(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count},
                                  sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
}

// Rows of values for splat_and_blur.
template <typename T>
int64_t blur_rows(const CudaLattice<T>& lattice) {
  return 2 * lattice.vertices + lattice.max_chunks();
}

// Splats the points' rows onto the vertices and blurs along all axes, last axis first and with the
// scales exchanged if `transposed`. Returns the blurred rows, within `work`, blur_rows() rows.
template <typename T>
T* splat_and_blur(const CudaLattice<T>& lattice, const T* rows, int width, bool transposed, T* work,
                  cudaStream_t stream);

// planes (channels, points) -> rows (points, width), times `factor`, padded with `padding`.
template <typename T>
void planes_to_rows(const T* planes, int64_t points, int64_t channels, int width, T factor,
                    T padding, T* rows, cudaStream_t stream);
template <typename T>
void rows_to_planes(const T* rows, int64_t points, int64_t channels, int width, T* planes,
                    cudaStream_t stream);

}  // namespace fastseg
