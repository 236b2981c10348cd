// Every primitive of common/ptx.cuh on random data against plain loops: a test of the emulator and
// the first program to run on a CUDA machine (benchmarks/gpu_check.sh), because only there is the
// PTX itself tested. Data are small whole numbers, so that all sums are exact.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "common/cuda.h"
#include "common/ptx.cuh"

// Code that needs sm_90a; elsewhere such kernels are empty and not launched.
#if defined(FASTSEG_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTSEG_SM90A 1
#else
#define FASTSEG_SM90A 0
#endif

namespace fastseg {
namespace {

std::mt19937 engine;
std::string report;
bool all_right = true;

// Memory that kernels see, filled with `values`.
template <typename T>
struct Buffer {
  explicit Buffer(const std::vector<T>& values) : count(values.size()) {
#if defined(FASTSEG_EMULATE)
    copy = values;
    data = copy.data();
#else
    check_cuda(cudaMalloc(&data, count * sizeof(T)), "malloc");
    check_cuda(cudaMemcpy(data, values.data(), count * sizeof(T), cudaMemcpyHostToDevice), "copy");
#endif
  }
  explicit Buffer(size_t count) : Buffer(std::vector<T>(count, T(-77))) {}
  std::vector<T> values() const {
    std::vector<T> result(count);
#if defined(FASTSEG_EMULATE)
    result = copy;
#else
    check_cuda(cudaMemcpy(result.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "copy");
#endif
    return result;
  }
  size_t count;
  T* data = nullptr;
#if defined(FASTSEG_EMULATE)
  std::vector<T> copy;
#endif
};

template <typename T>
std::vector<T> random_values(size_t count, int most = 4) {
  std::vector<T> values(count);
  std::uniform_int_distribution<int> number(-most, most);
  for (T& v : values) v = static_cast<T>(static_cast<float>(number(engine)));
  return values;
}

template <typename T>
void check(const char* what, const std::vector<T>& got, const std::vector<T>& expected) {
  size_t wrong = 0, first = 0;
  for (size_t i = expected.size(); i-- > 0;) {
    if (static_cast<float>(got[i]) == static_cast<float>(expected[i])) continue;
    ++wrong;
    first = i;
  }
  char line[200];
  if (wrong == 0) {
    std::snprintf(line, sizeof line, "ok     %s\n", what);
  } else {
    std::snprintf(line, sizeof line, "WRONG  %s: %zu of %zu values, the first at %zu: %g for %g\n",
                  what, wrong, expected.size(), first, static_cast<float>(got[first]),
                  static_cast<float>(expected[first]));
    all_right = false;
  }
  report += line;
}

// ---- compute capability 8.0 ---------------------------------------------------------------------

// Lane l copies 8 values if it is even, zeros if it is odd, in two groups.
__global__ void copy_async(const Half* from, Half* to) {
  FASTSEG_DYNAMIC_SHARED(shared);
  Half* stage = reinterpret_cast<Half*>(shared);
  const int lane = threadIdx.x;
  for (int group = 0; group < 2; ++group) {
    const int at = (group * 32 + lane) * 8;
    cp_async_16(stage + at, from + at, lane % 2 == 0);
    cp_async_commit();
  }
  cp_async_wait<1>();
  for (int i = 0; i < 8; ++i) to[lane * 8 + i] = stage[lane * 8 + i];
  cp_async_wait<0>();
  for (int i = 256; i < 264; ++i) to[lane * 8 + i] = stage[lane * 8 + i];
}

// in: 32 rows of 8. out: the four 16-bit pairs of each lane, plain and transposed.
__global__ void load_matrices(const Half* in, Half* out) {
  FASTSEG_DYNAMIC_SHARED(shared);
  Half* rows = reinterpret_cast<Half*>(shared);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) rows[lane * 8 + i] = in[lane * 8 + i];
  __syncwarp();
  uint32_t r[2][4];
  ldmatrix_x4(r[0], rows + lane * 8);
  ldmatrix_x4_transposed(r[1], rows + lane * 8);
  for (int form = 0; form < 2; ++form) {
    for (int m = 0; m < 4; ++m) {
      memcpy(out + (form * 32 + lane) * 8 + m * 2, &r[form][m], sizeof(uint32_t));
    }
  }
}

// a (16, depth), b (8, depth), d (16, 8); T = float is TF32.
template <typename T>
__global__ void multiply(const T* a, const T* b, float* d) {
  constexpr int kDepth = 32 / sizeof(T), kIn = 4 / sizeof(T);
  const int lane = threadIdx.x, column = lane % 4 * kIn;
  uint32_t a_regs[4], b_regs[2];
  const auto load = [&](const T* from) {
    uint32_t word;
    if constexpr (sizeof(T) == 4) {
      word = to_tf32(*from);
    } else {
      memcpy(&word, from, sizeof(word));
    }
    return word;
  };
  for (int i = 0; i < 4; ++i) {
    a_regs[i] = load(a + (lane / 4 + i % 2 * 8) * kDepth + column + i / 2 * (kDepth / 2));
  }
  for (int i = 0; i < 2; ++i) b_regs[i] = load(b + lane / 4 * kDepth + column + i * (kDepth / 2));
  float acc[4] = {1, 2, 3, 4};
  if constexpr (sizeof(T) == 4) {
    mma_m16n8k8_tf32(acc, a_regs, b_regs[0], b_regs[1]);
  } else {
    mma_m16n8k16<T>(acc, a_regs, b_regs[0], b_regs[1]);
  }
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = acc[i];
}

__global__ void round_tf32(const float* x, float* y) {
  y[threadIdx.x] = __uint_as_float(to_tf32(x[threadIdx.x]));
}

// Two halves of a block hand a row over, each at a barrier of its own.
__global__ void halves_meet(const float* in, float* out) {
  FASTSEG_SHARED(float, row, 128);
  const int t = threadIdx.x, half = t / 64;
  row[t] = in[t];
  named_barrier_sync(1 + half, 64);
  out[t] = row[half * 64 + 63 - t % 64];
}

template <typename T>
void check_multiply(const char* name) {
  constexpr int kDepth = 32 / sizeof(T);
  const auto a = random_values<T>(16 * kDepth), b = random_values<T>(8 * kDepth);
  const Buffer<T> a_memory(a), b_memory(b);
  const Buffer<float> d(128);
  launch(multiply<T>, 1, 32, 0, nullptr, static_cast<const T*>(a_memory.data),
         static_cast<const T*>(b_memory.data), d.data);
  std::vector<float> expected(128);
  for (int i = 0; i < 128; ++i) {
    const int row = i / 8, column = i % 8;
    expected[i] = static_cast<float>(1 + row / 8 * 2 + column % 2);
    for (int k = 0; k < kDepth; ++k) {
      expected[i] +=
          static_cast<float>(a[row * kDepth + k]) * static_cast<float>(b[column * kDepth + k]);
    }
  }
  check(name, d.values(), expected);
}

void check_sm80() {
  const auto x = random_values<Half>(512);
  const Buffer<Half> in(x), copied(512), matrices(512);
  launch(copy_async, 1, 32, 1024, nullptr, static_cast<const Half*>(in.data), copied.data);
  std::vector<Half> expected(x);
  for (size_t i = 0; i < 512; ++i) {
    if (i / 8 % 2 == 1) expected[i] = 0;
  }
  check("cp.async with zero fill", copied.values(), expected);

  launch(load_matrices, 1, 32, 512, nullptr, static_cast<const Half*>(in.data), matrices.data);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const int m = i / 2, part = i % 2;
      expected[lane * 8 + i] = x[(m * 8 + lane / 4) * 8 + lane % 4 * 2 + part];
      expected[256 + lane * 8 + i] = x[(m * 8 + lane % 4 * 2 + part) * 8 + lane / 4];
    }
  }
  check("ldmatrix, plain and transposed", matrices.values(), expected);
  check_multiply<Half>("mma m16n8k16 float16");
  check_multiply<BFloat16>("mma m16n8k16 bfloat16");
  check_multiply<float>("mma m16n8k8 tf32");

  std::vector<float> numbers(256), rounded(256);
  std::uniform_real_distribution<float> number(-1e3f, 1e3f);
  for (int i = 0; i < 256; ++i) {
    numbers[i] = number(engine);
    uint32_t bits;
    memcpy(&bits, &numbers[i], 4);
    bits = (bits + 0x1000u) & 0xffffe000u;
    memcpy(&rounded[i], &bits, 4);
  }
  const Buffer<float> numbers_memory(numbers), rounded_memory(256), met(128);
  launch(round_tf32, 1, 256, 0, nullptr, static_cast<const float*>(numbers_memory.data),
         rounded_memory.data);
  check("rounding to tf32", rounded_memory.values(), rounded);
  launch(halves_meet, 1, 128, 0, nullptr, static_cast<const float*>(numbers_memory.data), met.data);
  std::vector<float> reversed(128);
  for (int i = 0; i < 128; ++i) reversed[i] = numbers[i / 64 * 64 + 63 - i % 64];
  check("named barriers", met.values(), reversed);
}

// ---- compute capability 9.0 ---------------------------------------------------------------------

// a (64, 64), b (kN, 64) -> d (64, kN), twice a * b, by plain stores to shared memory.
template <typename T, int kN>
__global__ void __launch_bounds__(128) warpgroup_product(const T* a, const T* b, float* d) {
#if FASTSEG_SM90A
  FASTSEG_DYNAMIC_SHARED(shared);
  const int t = threadIdx.x, lane = t % 32;
  for (int item = t; item < (64 + kN) * 8; item += 128) {
    const int row = item / 8, chunk = item % 8;
    const T* from = row < 64 ? a + row * 64 : b + (row - 64) * 64;
    T values[8];
    load_vector(from + chunk * 8, values);
    store_vector(reinterpret_cast<T*>(shared + row * 128 + (chunk ^ row % 8) * 16), values);
  }
  fence_proxy_async();
  __syncthreads();
  float acc[kN / 2];
  for (int round = 0; round < 2; ++round) {
    wgmma_fence(acc);
    for (int k = 0; k < 4; ++k) {
      wgmma_m64k16<T, kN>(acc, wgmma_operand(shared + k * 32),
                          wgmma_operand(shared + 64 * 128 + k * 32), round + k > 0);
    }
    wgmma_commit();
    round == 0 ? wgmma_wait<1>(acc) : wgmma_wait<0>(acc);
  }
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const int row = t / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
    d[row * kN + i / 4 * 8 + lane % 4 * 2 + i % 2] = acc[i];
  }
#endif
}

struct Boxes {
  int count;
  int at[4][4], offset[2];  // where each starts
  int rows;                 // of 64 values
};

// Boxes of a map to out (count, rows, 64), all through one stage and one barrier.
__global__ void __launch_bounds__(128)
    load_boxes(const __grid_constant__ TensorMap map, Boxes boxes, bool im2col, Half* out) {
#if FASTSEG_SM90A
  FASTSEG_DYNAMIC_SHARED(shared);
  FASTSEG_SHARED(uint64_t, barrier, 1);
  const int t = threadIdx.x;
  if (t == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  for (int box = 0; box < boxes.count; ++box) {
    if (t == 0) {
      const int* at = boxes.at[box];
      mbarrier_arrive_expect_tx(barrier, boxes.rows * 128);
      if (im2col) {
        tma_load_im2col(shared, map, barrier, at[0], at[1], at[2], at[3], boxes.offset[0],
                        boxes.offset[1]);
      } else {
        tma_load_3d(shared, map, barrier, at[0], at[1], at[2]);
      }
    }
    mbarrier_wait(barrier, box % 2);
    for (int item = t; item < boxes.rows * 8; item += 128) {
      const int row = item / 8, chunk = item % 8;
      Half values[8];
      load_vector(reinterpret_cast<const Half*>(shared + row * 128 + (chunk ^ row % 8) * 16),
                  values);
      store_vector(out + ((box * boxes.rows + row) * 8 + chunk) * 8, values);
    }
    __syncthreads();
  }
#endif
}

// in (8, 64) to the box at (c0, c1, c2); and registers change hands on the way.
__global__ void __launch_bounds__(256, 1)
    store_box(const __grid_constant__ TensorMap map, const float* in, int c0, int c1, int c2) {
#if FASTSEG_SM90A
  FASTSEG_DYNAMIC_SHARED(shared);
  float* box = reinterpret_cast<float*>(shared);
  const int t = threadIdx.x;
  if (t < 128) {
    release_registers<24>();
  } else {
    take_registers<240>();
  }
  for (int i = t; i < 512; i += 256) box[i] = in[i];
  fence_proxy_async();
  __syncthreads();
  if (t == 0) {
    tma_store_3d(map, box, c0, c1, c2);
    tma_store_commit();
    tma_store_wait<0>();
  }
#endif
}

template <typename T, int kN>
void check_warpgroup_product(const char* name) {
  const auto a = random_values<T>(64 * 64), b = random_values<T>(kN * 64);
  const Buffer<T> a_memory(a), b_memory(b);
  const Buffer<float> d(64 * kN);
  launch(warpgroup_product<T, kN>, 1, 128, (64 + kN) * 128, nullptr,
         static_cast<const T*>(a_memory.data), static_cast<const T*>(b_memory.data), d.data);
  std::vector<float> expected(64 * kN);
  for (int i = 0; i < 64 * kN; ++i) {
    for (int k = 0; k < 64; ++k) {
      expected[i] +=
          2 * static_cast<float>(a[i / kN * 64 + k]) * static_cast<float>(b[i % kN * 64 + k]);
    }
  }
  check(name, d.values(), expected);
}

void check_tiled() {
  constexpr int kC = 72, kTaps = 3, kK = 13, kRows = 8;
  const auto x = random_values<Half>(kC * kTaps * kK, 100);
  const Buffer<Half> in(x);
  const TensorMap map =
      tensor_map(in.data, TiledBox{{kC, kTaps, kK}, {kC, kC * kTaps}, {64, 1, kRows}, true});
  const Boxes boxes{3, {{0, 0, 0}, {64, 2, 8}, {8, 1, -3}}, {}, kRows};  // the last two hang over
  const Buffer<Half> out(3 * kRows * 64);
  launch(load_boxes, 1, 128, kRows * 128, nullptr, map, boxes, false, out.data);
  std::vector<Half> expected(3 * kRows * 64);
  for (int i = 0; i < 3 * kRows * 64; ++i) {
    const int* at = boxes.at[i / 64 / kRows];
    const int c = at[0] + i % 64, k = at[2] + i / 64 % kRows;
    if (c < kC && k >= 0 && k < kK) expected[i] = x[(k * kTaps + at[1]) * kC + c];
  }
  check("bulk load of tiles, with zero fill, four phases of an mbarrier", out.values(), expected);
}

void check_im2col() {
  constexpr int kN = 2, kH = 6, kW = 9, kC = 72, kPixels = 40;
  const auto x = random_values<Half>(kN * kH * kW * kC, 100);
  const Buffer<Half> in(x);
  // All that could be confused differs between width and height.
  const Im2colBox box{kN, kH, kW, kC, kC, {-3, -1}, {-2, 1}, {2, 1}, 64, kPixels};
  const TensorMap map = tensor_map(in.data, box);
  std::vector<std::array<int, 3>> bases;  // n, h, w
  for (int n = 0; n < kN; ++n) {
    for (int h = box.low[1]; h <= kH - 1 + box.high[1]; h += box.step[1]) {
      for (int w = box.low[0]; w <= kW - 1 + box.high[0]; w += box.step[0])
        bases.push_back({n, h, w});
    }
  }
  Boxes boxes{4, {}, {4, 2}, kPixels};
  const int first[] = {0, 7, kPixels, 60}, channel[] = {0, 8, 64, 0};
  for (int i = 0; i < 4; ++i) {
    const auto [n, h, w] = bases[first[i]];
    const int at[] = {channel[i], w, h, n};
    std::copy(at, at + 4, boxes.at[i]);
  }
  const Buffer<Half> out(4 * kPixels * 64);
  launch(load_boxes, 1, 128, kPixels * 128, nullptr, map, boxes, true, out.data);
  std::vector<Half> expected(4 * kPixels * 64);
  for (int i = 0; i < 4 * kPixels * 64; ++i) {
    const int which = i / 64 / kPixels, c = channel[which] + i % 64;
    const size_t pixel = first[which] + i / 64 % kPixels;
    if (pixel >= bases.size() || c >= kC) continue;
    const int n = bases[pixel][0], h = bases[pixel][1] + 2, w = bases[pixel][2] + 4;
    if (h < 0 || h >= kH || w < 0 || w >= kW) continue;
    expected[i] = x[((n * kH + h) * kW + w) * kC + c];
  }
  check("bulk load of im2col pixels, with zero fill", out.values(), expected);
}

void check_store() {
  const auto x = random_values<float>(512, 100);
  std::vector<float> expected(100 * 12, -77.0f);
  const Buffer<float> in(x), out(expected);
  const TensorMap map =
      tensor_map(out.data, TiledBox{{100, 12, 1}, {100, 1200}, {64, 8, 1}, false});
  launch(store_box, 1, 256, 2048, nullptr, map, static_cast<const float*>(in.data), 60, 7, 0);
  for (int row = 0; row < 5; ++row) {
    for (int c = 0; c < 40; ++c) expected[(7 + row) * 100 + 60 + c] = x[row * 64 + c];
  }
  check("bulk store, proxy fence, setmaxnreg", out.values(), expected);
}

void check_sm90() {
  check_warpgroup_product<Half, 64>("wgmma m64n64k16 float16");
  check_warpgroup_product<BFloat16, 64>("wgmma m64n64k16 bfloat16");
  check_warpgroup_product<Half, 128>("wgmma m64n128k16 float16");
  check_warpgroup_product<BFloat16, 128>("wgmma m64n128k16 bfloat16");
  check_warpgroup_product<Half, 256>("wgmma m64n256k16 float16");
  check_warpgroup_product<BFloat16, 256>("wgmma m64n256k16 bfloat16");
  check_tiled();
  check_im2col();
  check_store();
}

}  // namespace
}  // namespace fastseg

// Returns a line for each primitive, "ok" or "WRONG".
extern "C" const char* test_primitives(unsigned seed, bool sm90a) {
  using namespace fastseg;
  engine.seed(seed);
  report.clear();
  all_right = true;
  try {
    check_sm80();
    if (sm90a) check_sm90();
  } catch (const std::exception& e) {
    report += std::string("WRONG  ") + e.what() + "\n";
    all_right = false;
  }
  return report.c_str();
}

#if !defined(FASTSEG_EMULATE)
int main() {
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    std::puts("no CUDA device");
    return 2;
  }
  const bool sm90a = device.major == 9 && device.minor == 0;
  bool right = true;
  for (unsigned seed = 0; seed < 3; ++seed) {
    std::printf("%s, seed %u\n%s", device.name, seed, test_primitives(seed, sm90a));
    right &= fastseg::all_right;
  }
  if (!sm90a) std::puts("skipped: what needs compute capability 9.0");
  return right ? 0 : 1;
}
#endif
