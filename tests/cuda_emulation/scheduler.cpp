// Runs a CUDA grid on CPU cores: one OS thread per core takes blocks one at a time, and the threads
// of a block are fibers that run in turn until each waits at a barrier or ends. Compiled without
// ThreadSanitizer: what kernels may rely on as ordered is announced with acquire() and release().
#include <sys/mman.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "emulation.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(FASTSEG_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastseg {
namespace emulation {

thread_local Thread* current = nullptr;
Counters counters{};
int multiprocessors = 3;  // few, so that small shapes fill them
int compute_capability_major = 8;
bool capturing = false;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuardBytes = 0;  // the sanitizer watches the end itself
#else
constexpr size_t kGuardBytes = 256;  // NaN after each shared array; a write there is reported
#endif
constexpr size_t kMaxShared = 227 * 1024;  // compute capability 9.0, per block
constexpr int kNamedBarriers = 16;
constexpr int kMaxThreads = 1024;

std::atomic<uint64_t> order_seed{0};
std::atomic<bool> counting_accesses{false};

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// ---- context switch ----

#if defined(__x86_64__)
struct Context {
  void* sp = nullptr;
};
extern "C" void fastseg_switch_context(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden fastseg_switch_context
.globl fastseg_switch_context
.type fastseg_switch_context, @function
fastseg_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastseg_switch_context, .-fastseg_switch_context
)");
void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // return address of entry, which never returns; keeps the stack aligned
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;  // the six registers that the switch pops
  context.sp = top;
}
void switch_context(Context& from, Context& to) { fastseg_switch_context(&from.sp, to.sp); }
#else
struct Context {
  ucontext_t state;
};
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = kStackBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#endif

// ---- what a fiber runs on, kept between launches ----

struct Stack {
  char* memory;
  Stack* next = nullptr;
#if defined(FASTSEG_TSAN)
  void* tsan = __tsan_create_fiber(0);
#endif
  Stack() {
    // One unmapped page below each stack turns an overflow into a fault.
    void* base = mmap(nullptr, kStackBytes + 4096, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    mprotect(base, 4096, PROT_NONE);
    memory = static_cast<char*>(base) + 4096;
  }
};

// A spin lock and no mutex: in a mutex ThreadSanitizer would see an order between blocks.
std::atomic_flag stacks_locked = ATOMIC_FLAG_INIT;
Stack* free_stacks = nullptr;

struct StackLock {
  StackLock() {
    while (stacks_locked.test_and_set(std::memory_order_acquire)) {
    }
  }
  ~StackLock() { stacks_locked.clear(std::memory_order_release); }
};

// The stacks of one OS thread during one launch.
struct Stacks {
  Stack* stack[kMaxThreads] = {};
  int count = 0;

  Stack* at(int i) {
    for (; count <= i; ++count) {
      const StackLock lock;
      stack[count] = free_stacks;
      if (free_stacks != nullptr) {
        free_stacks = free_stacks->next;
      } else {
        stack[count] = new Stack;
      }
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack[i]->memory, kStackBytes);
#endif
    return stack[i];
  }
  ~Stacks() {
    const StackLock lock;
    while (count > 0) {
      --count;
      stack[count]->next = free_stacks;
      free_stacks = stack[count];
    }
  }
};

// ---- state of one block ----

struct Fiber {
  Thread thread;
  Context context;
  Stack* stack = nullptr;
  bool done = false;
  const uint32_t* wait_word = nullptr;  // not runnable while *wait_word == wait_value
  uint32_t wait_value = 0;
  const char* wait_what = "";
  bool late = false;      // not runnable while any other fiber is
  uint32_t accesses = 0;  // 128-bit accesses so far, pairs the lanes of one request
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

// Lanes that meet in one warp function. Two slot tables: a fast lane may bring its value for the
// next meeting while a slow one still reads this one's.
struct Meeting {
  uint32_t mask = 0, arrived = 0, generation = 0;
  const char* what = nullptr;
  alignas(64) char slots[2][32 * kSlotBytes];
};

struct Warp {
  uint32_t present = 0;  // lanes that exist in this block
  uint32_t pending = 0;  // meetings somebody waits in, by lowest lane of their mask
  std::unique_ptr<Meeting> meetings[32];
  std::vector<std::vector<uintptr_t>> requests;
};

struct Barrier {
  int arrived = 0, expected = 0;
  uint32_t generation = 0;
  Votes votes[2] = {};
};

struct Shared {
  const void* site;
  char* data;
  size_t bytes;
  std::unique_ptr<char[]> view;  // see asynchronous_view
};

// A barrier in shared memory; its word there only says that it is one.
struct MBarrier {
  uint32_t phase = 0;
  int arrivals = 0, missing = 0;
  int64_t bytes = 0;  // announced and not yet there
  bool fenced = false;
  char order[2] = {};  // what ThreadSanitizer knows each phase by
};
constexpr uint64_t kMBarrierMark = 0x4d42415252494552;  // "MBARRIER"

struct Load {
  char* to;
  TensorMap map;
  MBarrier* barrier;
  int at[4], offset[2];
};

struct Grid {
  dim3 grid, block;
  size_t dynamic_bytes;
  const std::function<void()>* body;
  std::atomic<uint64_t> next_block{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string message;
};

}  // namespace

struct Block {
  Grid* grid;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[kNamedBarriers];
  std::vector<Shared> shared;
  size_t shared_bytes = 0;
  std::map<const void*, MBarrier> mbarriers;
  std::vector<Load> loads;  // oldest first
  int running = 0;          // threads that have not ended
  Context scheduler;
  Fiber* fiber = nullptr;  // the running one
#if defined(__SANITIZE_ADDRESS__)
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
#endif
#if defined(FASTSEG_TSAN)
  void* scheduler_tsan = nullptr;
#endif
};

namespace {

void enter_fiber(Block& block, Fiber& fiber) {
  block.fiber = &fiber;
  current = &fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack->memory, kStackBytes);
#endif
#if defined(FASTSEG_TSAN)
  __tsan_switch_to_fiber(fiber.stack->tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(block.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

// Back to the scheduler. `last`: this fiber will never run again.
void leave_fiber(Block& block, bool last = false) {
  Fiber& fiber = *block.fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_bytes);
#endif
#if defined(FASTSEG_TSAN)
  __tsan_switch_to_fiber(block.scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  static_cast<void>(last);
  switch_context(fiber.context, block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &block.scheduler_stack,
                                  &block.scheduler_stack_bytes);
#endif
}

// What happens inside counts as done by the scheduler, so that no thread of the block is ordered
// before another because it came first.
struct AsScheduler {
#if defined(FASTSEG_TSAN)
  explicit AsScheduler(Block& block) : block(block) {
    __tsan_switch_to_fiber(block.scheduler_tsan, __tsan_switch_to_fiber_no_sync);
  }
  ~AsScheduler() {
    __tsan_switch_to_fiber(block.fiber->stack->tsan, __tsan_switch_to_fiber_no_sync);
  }
  Block& block;
#else
  explicit AsScheduler(Block&) {}
  ~AsScheduler() {}
#endif
};

void copy_unseen(char* to, const void* from, size_t bytes) {
#if defined(FASTSEG_TSAN)  // a memcpy would be intercepted
  const volatile char* source = static_cast<const char*>(from);
  for (size_t i = 0; i < bytes; ++i) to[i] = source[i];
#else
  std::memcpy(to, from, bytes);
#endif
}

void fiber_main() {
  Block& block = *current->block;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
  acquire(&block);
  (*block.grid->body)();
  if (!current->stores.empty()) fail("the thread ended before its bulk stores were waited for");
  if (!current->products.empty()) fail("the thread ended before its products were waited for");
  release(&block);
  release(block.grid);
  block.fiber->done = true;
  --block.running;
  leave_fiber(block, true);
  std::abort();  // not reached
}

void record_failure(Grid& grid, const std::string& message) {
  const std::lock_guard<std::mutex> lock(grid.mutex);
  if (!grid.failed.exchange(true)) grid.message = message;
}

std::string where(const Thread& t) {
  char text[128];
  std::snprintf(text, sizeof text, "block (%u, %u, %u) thread (%u, %u, %u)", t.block_index.x,
                t.block_index.y, t.block_index.z, t.index.x, t.index.y, t.index.z);
  return text;
}

void report_deadlock(Block& block) {
  std::string message = "deadlock: no thread of the block can go on;";
  int shown = 0, ended = 0;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.done) {
      ++ended;
    } else if (shown++ < 4) {
      message += " " + where(fiber.thread) + " waits in " + fiber.wait_what + ";";
    }
  }
  message += " " + std::to_string(ended) + " threads of the block have ended";
  record_failure(*block.grid, message);
}

void* new_shared(Block& block, const void* site, size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 1024, bytes + kGuardBytes) != 0) throw std::bad_alloc();
  std::memset(data, 0xff, bytes + kGuardBytes);  // NaN in every floating type
  block.shared.push_back({site, static_cast<char*>(data), bytes, nullptr});
  block.shared_bytes += bytes;
  return data;
}

char* view_of(Shared& shared) {
  if (shared.view == nullptr) {
    shared.view.reset(new char[shared.bytes]);
    std::memset(shared.view.get(), 0xff, shared.bytes);
    release(shared.view.get());  // the memory; what it holds is ordered by the kernel's barriers
  }
  return shared.view.get();
}

void end_phase_if_complete(MBarrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
}

// Performs the bulk loads whose barrier some thread waits for, or `all`.
bool perform_loads(Block& block, bool all) {
  std::vector<Load> later;
  for (Load& load : block.loads) {
    const bool awaited = std::any_of(block.fibers.begin(), block.fibers.end(), [&](const Fiber& f) {
      return !f.done && f.wait_word == &load.barrier->phase;
    });
    if (!all && !awaited) {
      later.push_back(load);
      continue;
    }
    copy_box(load.map, load.to, load.at, load.offset, true);
    const int bytes = load.map.rows() * load.map.row_bytes();
    for (Shared& s : block.shared) {
      if (load.to < s.data || load.to >= s.data + s.bytes) continue;
      copy_unseen(view_of(s) + (load.to - s.data), load.to, bytes);
    }
    load.barrier->bytes -= bytes;
    end_phase_if_complete(*load.barrier);
  }
  const bool some = later.size() < block.loads.size();
  block.loads = std::move(later);
  return some;
}

bool release_late(Block& block) {
  bool some = false;
  for (Fiber& fiber : block.fibers) {
    some |= fiber.late;
    fiber.late = false;
  }
  return some;
}

void run_block(Grid& grid, Stacks& stacks, uint64_t number) {
  const dim3 dim = grid.block;
  const int threads = static_cast<int>(dim.x * dim.y * dim.z);
  Block block;
  block.grid = &grid;
  block.fibers.resize(threads);
  block.warps.resize((threads + 31) / 32);
  block.running = threads;
  static const char dynamic_site = 0;
  new_shared(block, &dynamic_site, grid.dynamic_bytes);
#if defined(FASTSEG_TSAN)
  block.scheduler_tsan = __tsan_get_current_fiber();
#endif
  const uint3 at = {static_cast<unsigned>(number % grid.grid.x),
                    static_cast<unsigned>(number / grid.grid.x % grid.grid.y),
                    static_cast<unsigned>(number / grid.grid.x / grid.grid.y)};
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    const unsigned u = static_cast<unsigned>(i);
    fiber.thread = {{u % dim.x, u / dim.x % dim.y, u / dim.x / dim.y},
                    i,
                    i % 32,
                    i / 32,
                    &block,
                    grid.grid,
                    dim,
                    at};
    fiber.stack = stacks.at(i);
    prepare(fiber.context, fiber.stack->memory, fiber_main);
    block.warps[i / 32].present |= 1u << (i % 32);
  }

  release(&block);

  const uint64_t seed = order_seed.load();
  const uint64_t random = seed == 0 ? 0 : mix(seed * 0x10001u + number);
  const int start = static_cast<int>((random >> 1) % static_cast<uint64_t>(threads));
  const int step = random & 1 ? threads - 1 : 1;
  while (block.running > 0 && !grid.failed) {
    bool progress = false;
    for (int k = 0, i = start; k < threads && !grid.failed; ++k, i = (i + step) % threads) {
      Fiber& fiber = block.fibers[i];
      if (fiber.done || fiber.late) continue;
      if (fiber.wait_word != nullptr && *fiber.wait_word == fiber.wait_value) continue;
      fiber.wait_word = nullptr;
      progress = true;
      enter_fiber(block, fiber);
    }
    progress |= !grid.failed && perform_loads(block, false);
    if (progress || grid.failed) continue;
    if (!release_late(block) && !perform_loads(block, true)) report_deadlock(block);
  }
  if (!block.loads.empty() && !grid.failed) {
    record_failure(
        grid, where(block.fibers[0].thread) + ": the block ended while a bulk load was on its way");
  }

  for (Warp& warp : block.warps) {
    for (std::vector<uintptr_t>& request : warp.requests) {
      const size_t lanes = request.size();
      std::sort(request.begin(), request.end());
      count(counters.requests);
      count(counters.ideal_sectors, (lanes + 1) / 2);
      count(counters.sectors, std::unique(request.begin(), request.end()) - request.begin());
    }
  }
  acquire(&block);
  for (const Shared& s : block.shared) {
    const char* end = s.data + s.bytes;
    if (std::any_of(end, end + kGuardBytes, [](char c) { return c != '\xff'; })) {
      record_failure(grid, where(block.fibers[0].thread) + ": the block wrote past the end of a " +
                               std::to_string(s.bytes) + "-byte shared array");
    }
    std::free(s.data);
  }
}

}  // namespace

void acquire(const void* object) {
#if defined(FASTSEG_TSAN)
  __tsan_acquire(const_cast<void*>(object));
#else
  static_cast<void>(object);
#endif
}

void release(const void* object) {
#if defined(FASTSEG_TSAN)
  __tsan_release(const_cast<void*>(object));
#else
  static_cast<void>(object);
#endif
}

void count(uint64_t& counter, uint64_t n) { __atomic_fetch_add(&counter, n, __ATOMIC_RELAXED); }

void count_access(const void* address) {
  if (!counting_accesses || is_shared(address, 1)) return;  // shared memory has no sectors
  Block& block = *current->block;
  Warp& warp = block.warps[current->warp];
  const AsScheduler unseen(block);
  const uint32_t number = block.fiber->accesses++;
  if (warp.requests.size() <= number) warp.requests.resize(number + 1);
  warp.requests[number].push_back(reinterpret_cast<uintptr_t>(address) / 32);
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Block& block = *current->block;
  record_failure(*block.grid, where(*current) + ": " + text);
  leave_fiber(block);  // the scheduler stops here and never comes back
  std::abort();
}

void* static_shared(const void* site, size_t bytes) {
  Block& block = *current->block;
  for (const Shared& s : block.shared) {
    if (s.site == site) {
      acquire(s.data);
      return s.data;
    }
  }
  if (block.shared_bytes - block.grid->dynamic_bytes + bytes > 48 * 1024) {
    fail("static shared memory exceeds 48 KB");
  }
  if (block.shared_bytes + bytes > kMaxShared) fail("shared memory exceeds 227 KB per block");
  void* data;
  {
    const AsScheduler unseen(block);
    data = new_shared(block, site, bytes);
    release(data);
  }
  acquire(data);
  return data;
}

void* dynamic_shared() { return current->block->shared.front().data; }

bool is_shared(const void* address, size_t bytes) {
  const char* p = static_cast<const char*>(address);
  for (const Shared& s : current->block->shared) {
    if (p >= s.data && p + bytes <= s.data + s.bytes) return true;
  }
  return false;
}

void wait_while(const uint32_t* word, uint32_t value, const char* what) {
  Block& block = *current->block;
  Fiber& fiber = *block.fiber;
  while (*word == value) {
    fiber.wait_word = word;
    fiber.wait_value = value;
    fiber.wait_what = what;
    leave_fiber(block);
  }
}

void wait_late() {
  Block& block = *current->block;
  block.fiber->late = true;
  leave_fiber(block);
}

// ---- barriers in shared memory, bulk copies ----

namespace {

MBarrier& find_mbarrier(const void* address, const char* what) {
  uint64_t word = 0;
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0 || !is_shared(address, 8)) {
    fail("%s: a barrier is 8 aligned bytes of shared memory, got %p", what, address);
  }
  copy_unseen(reinterpret_cast<char*>(&word), address, 8);
  const auto found = current->block->mbarriers.find(address);
  if (word != kMBarrierMark || found == current->block->mbarriers.end()) {
    fail("%s: the barrier at %p is not initialised, or was overwritten", what, address);
  }
  return found->second;
}

}  // namespace

void mbarrier_init(const void* address, int arrivals) {
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0 || !is_shared(address, 8) || arrivals < 1) {
    fail("mbarrier_init: needs 8 aligned bytes of shared memory and arrivals, got %p, %d", address,
         arrivals);
  }
  const AsScheduler unseen(*current->block);
  MBarrier& barrier = current->block->mbarriers[address];
  barrier = MBarrier{};
  barrier.arrivals = barrier.missing = arrivals;
  copy_unseen(static_cast<char*>(const_cast<void*>(address)), &kMBarrierMark, 8);
}

void fence_mbarriers() {
  for (auto& [address, barrier] : current->block->mbarriers) barrier.fenced = true;
  fence_proxy();
}

void mbarrier_arrive(const void* address, int64_t bytes) {
  MBarrier& barrier = find_mbarrier(address, "mbarrier_arrive");
  if (barrier.missing == 0) fail("mbarrier_arrive: more arrivals than the barrier awaits");
  release(&barrier.order[barrier.phase & 1]);
  barrier.bytes += bytes;
  --barrier.missing;
  if (barrier.bytes >= 1 << 20) fail("mbarrier_arrive: more than 2^20 bytes are announced");
  end_phase_if_complete(barrier);
}

void mbarrier_wait(const void* address, int parity) {
  MBarrier& barrier = find_mbarrier(address, "mbarrier_wait");
  const uint32_t phase = barrier.phase;
  if (static_cast<int>(phase & 1) == parity) wait_while(&barrier.phase, phase, "mbarrier_wait");
  acquire(&barrier.order[parity]);
}

void start_load(char* to, const TensorMap& map, const void* address, const int (&at)[4],
                const int (&offset)[2]) {
  MBarrier& barrier = find_mbarrier(address, "bulk load");
  if (!barrier.fenced) fail("bulk load: its barrier was initialised without fence_mbarrier_init");
  release(&barrier.order[barrier.phase & 1]);
  const AsScheduler unseen(*current->block);
  Load load{to, map, &barrier, {}, {offset[0], offset[1]}};
  std::copy(at, at + 4, load.at);
  current->block->loads.push_back(load);
}

const char* asynchronous_view(const void* address, size_t bytes) {
  const char* p = static_cast<const char*>(address);
  for (Shared& s : current->block->shared) {
    if (p < s.data || p + bytes > s.data + s.bytes) continue;
    if (s.view == nullptr) {
      const AsScheduler unseen(*current->block);
      view_of(s);
    }
    acquire(s.view.get());
    return s.view.get() + (p - s.data);
  }
  fail("an asynchronous access of %d bytes at %p leaves shared memory", static_cast<int>(bytes), p);
}

void fence_proxy() {
  const AsScheduler unseen(*current->block);
  for (Shared& s : current->block->shared) copy_unseen(view_of(s), s.data, s.bytes);
}

namespace {

void check_map(bool ok, const char* rule) {
  if (!ok) throw std::runtime_error(std::string("tensor map: ") + rule);
}

TensorMap make_map(const void* data, size_t element_bytes, int rank, const int64_t* sizes,
                   const int64_t* strides) {
  TensorMap map{};
  map.data = static_cast<char*>(const_cast<void*>(data));
  map.element_bytes = static_cast<int>(element_bytes);
  map.rank = rank;
  check_map(reinterpret_cast<uintptr_t>(data) % 16 == 0, "the data must be 16-byte aligned");
  map.strides[0] = map.element_bytes;
  for (int i = 0; i < rank; ++i) {
    map.sizes[i] = sizes[i];
    check_map(sizes[i] > 0 && sizes[i] <= int64_t{1} << 32, "sizes are 1 to 2^32");
    if (i == 0) continue;
    map.strides[i] = strides[i - 1] * map.element_bytes;
    check_map(map.strides[i] % 16 == 0 && map.strides[i] < int64_t{1} << 40,
              "strides are multiples of 16 bytes below 2^40");
  }
  return map;
}

void check_row(const TensorMap& map) {
  check_map(map.row_bytes() % 16 == 0 && (!map.swizzle || map.row_bytes() <= 128),
            "rows are multiples of 16 bytes, 128 at most if swizzled");
}

}  // namespace

TensorMap tiled_map(const void* data, size_t element_bytes, const int64_t* sizes,
                    const int64_t* strides, const int* box, bool swizzle) {
  TensorMap map = make_map(data, element_bytes, 3, sizes, strides);
  map.swizzle = swizzle;
  for (int i = 0; i < 3; ++i) {
    map.box[i] = box[i];
    check_map(box[i] >= 1 && box[i] <= 256, "a box has 1 to 256 elements an axis");
  }
  check_row(map);
  return map;
}

TensorMap im2col_map(const void* data, size_t element_bytes, const int64_t* sizes, int64_t stride,
                     const int* low, const int* high, const int* step, int channels, int pixels) {
  const int64_t strides[] = {stride, stride * sizes[1], stride * sizes[1] * sizes[2]};
  TensorMap map = make_map(data, element_bytes, 4, sizes, strides);
  map.im2col = map.swizzle = true;
  map.channels = channels;
  map.pixels = pixels;
  for (int i = 0; i < 2; ++i) {
    map.low[i] = low[i];
    map.high[i] = high[i];
    map.step[i] = step[i];
    check_map(low[i] >= -128 && low[i] <= 127 && high[i] >= -128 && high[i] <= 127,
              "the corners of base pixels are -128 to 127");
    check_map(sizes[1 + i] - 1 + high[i] >= low[i], "there must be base pixels");
    check_map(step[i] >= 1 && step[i] <= 8, "steps are 1 to 8");
  }
  check_map(channels >= 1 && channels <= 256 && pixels >= 1 && pixels <= 1024,
            "a copy takes 1 to 256 channels and 1 to 1024 pixels");
  check_row(map);
  return map;
}

void copy_box(const TensorMap& map, char* shared, const int* at, const int* offset,
              bool to_shared) {
  const int row_bytes = map.row_bytes();
  int64_t where[4] = {at[0], at[1], at[2], map.rank > 3 ? at[3] : 0};
  for (int row = 0; row < map.rows(); ++row) {
    int64_t read[4];
    std::copy(where, where + 4, read);
    if (map.im2col) {
      for (int i = 0; i < 2; ++i) read[1 + i] += offset[i];
    } else {
      read[1] += row % map.box[1];
      read[2] += row / map.box[1];
    }
    bool inside = true;
    char* global = map.data;
    for (int i = 1; i < map.rank; ++i) {
      inside = inside && read[i] >= 0 && read[i] < map.sizes[i];
      global += read[i] * map.strides[i];
    }
    for (int byte = 0; byte < row_bytes; byte += map.element_bytes) {
      char* p = shared + row * row_bytes + byte;
      if (map.swizzle) {  // by address: shared arrays start at multiples of 1024
        const uintptr_t bits = reinterpret_cast<uintptr_t>(p);
        p = reinterpret_cast<char*>(bits ^ (bits >> 7 & 7) << 4);
      }
      const int64_t column = read[0] + byte / map.element_bytes;
      const bool exists = inside && column >= 0 && column < map.sizes[0];
      char* element = global + column * map.element_bytes;
      const char zero[8] = {};
      if (to_shared) {
        copy_unseen(p, exists ? element : zero, map.element_bytes);
      } else if (exists) {
        copy_unseen(element, p, map.element_bytes);
      }
    }
    if (!map.im2col) continue;
    for (int i = 0; i < 2; ++i) {  // the next base pixel
      where[1 + i] += map.step[i];
      if (where[1 + i] <= map.sizes[1 + i] - 1 + map.high[i]) break;
      where[1 + i] = map.low[i];
      if (i == 1) ++where[3];
    }
  }
}

Votes block_barrier(int id, int expected, bool predicate, bool wait) {
  if (id < 0 || id >= kNamedBarriers) fail("barrier %d does not exist", id);
  Barrier& barrier = current->block->barriers[id];
  Votes& votes = barrier.votes[barrier.generation & 1];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    votes = {0, 1, 0};
  } else if (barrier.expected != expected) {
    fail("barrier %d awaits %d threads, this one says %d", id, barrier.expected, expected);
  }
  votes.any |= predicate;
  votes.all &= predicate;
  votes.count += predicate;
  release(&votes);  // one object per phase: a late acquire must not see the next phase's releases
  const uint32_t generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  if (!wait) return {};
  wait_while(&barrier.generation, generation, id == 0 ? "__syncthreads" : "a named barrier");
  acquire(&votes);
  return votes;
}

char* warp_exchange(uint32_t mask, const char* what, const void* mine, size_t bytes,
                    bool synchronise, Finish finish) {
  Warp& warp = current->block->warps[current->warp];
  const uint32_t me = 1u << current->lane;
  if (!(mask & me)) fail("%s: lane %d is not in its own mask 0x%08x", what, current->lane, mask);
  if (mask & ~warp.present) fail("%s: mask 0x%08x names lanes beyond the block", what, mask);
  const int key = __builtin_ctz(mask);
  std::unique_ptr<Meeting>& held = warp.meetings[key];
  if (held == nullptr) {
    const AsScheduler unseen(*current->block);
    held.reset(new Meeting);
  }
  Meeting& meeting = *held;
  for (uint32_t rest = warp.pending; rest != 0; rest &= rest - 1) {
    const Meeting& other = *warp.meetings[__builtin_ctz(rest)];
    if ((other.mask & mask) && (other.mask != mask || std::strcmp(other.what, what) != 0)) {
      fail("%s with mask 0x%08x, while other lanes of it wait in %s with mask 0x%08x", what, mask,
           other.what, other.mask);
    }
  }
  meeting.mask = mask;
  meeting.what = what;
  const uint32_t generation = meeting.generation;
  char* slots = meeting.slots[generation & 1];
  copy_unseen(slots + current->lane * kSlotBytes, mine, bytes);
  if (synchronise) release(slots);
  warp.pending |= 1u << key;
  meeting.arrived |= me;
  if (meeting.arrived == mask) {
    if (finish != nullptr) finish(slots);
    meeting.arrived = 0;
    warp.pending &= ~(1u << key);
    ++meeting.generation;
  } else {
    wait_while(&meeting.generation, generation, what);
  }
  if (synchronise) acquire(slots);
  return slots;
}

namespace {
std::vector<std::function<void()>> graph;  // what was submitted during the last capture
}

void submit(std::function<void()> work) {
  work();
  if (capturing) graph.push_back(std::move(work));
}

void run_grid(dim3 grid_dim, dim3 block_dim, size_t dynamic_shared_bytes,
              const std::function<void()>& body) {
  const uint64_t blocks = uint64_t{grid_dim.x} * grid_dim.y * grid_dim.z;
  const uint64_t threads = uint64_t{block_dim.x} * block_dim.y * block_dim.z;
  if (blocks == 0 || grid_dim.x > 0x7fffffffu || grid_dim.y > 65535 || grid_dim.z > 65535) {
    throw std::runtime_error("invalid grid: (" + std::to_string(grid_dim.x) + ", " +
                             std::to_string(grid_dim.y) + ", " + std::to_string(grid_dim.z) + ")");
  }
  if (threads == 0 || threads > kMaxThreads || block_dim.z > 64) {
    throw std::runtime_error("invalid block of " + std::to_string(threads) + " threads");
  }
  if (dynamic_shared_bytes > kMaxShared) {
    throw std::runtime_error("more than 227 KB of dynamic shared memory");
  }
  Grid grid;
  grid.grid = grid_dim;
  grid.block = block_dim;
  grid.dynamic_bytes = dynamic_shared_bytes;
  grid.body = &body;
  count(counters.launches);
  const auto work = [&] {
    Stacks stacks;
    for (uint64_t b; !grid.failed && (b = grid.next_block.fetch_add(1)) < blocks;) {
      run_block(grid, stacks, b);
    }
  };
  // Two at least: blocks that follow one another on one OS thread look ordered.
  const uint64_t cores = std::max(2u, std::thread::hardware_concurrency());
  std::vector<std::thread> workers;
  for (uint64_t i = 1; i < std::min(cores, blocks); ++i) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
  acquire(&grid);
  if (grid.failed) throw std::runtime_error("emulated kernel: " + grid.message);
}

}  // namespace emulation
}  // namespace fastseg

// What the tests call through ctypes.
extern "C" void fastseg_emulation_seed(uint64_t seed) { fastseg::emulation::order_seed = seed; }
extern "C" void fastseg_emulation_count_accesses(bool on) {
  fastseg::emulation::counting_accesses = on;
}
extern "C" void fastseg_emulation_compute_capability(int major) {
  fastseg::emulation::compute_capability_major = major;
}
extern "C" void fastseg_emulation_capturing(bool on) {
  if (on) fastseg::emulation::graph.clear();
  fastseg::emulation::capturing = on;
}
// Runs the last graph that was captured; returns what failed.
extern "C" const char* fastseg_emulation_replay() {
  static std::string error;
  try {
    for (const auto& work : fastseg::emulation::graph) work();
    return "";
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}
extern "C" void fastseg_emulation_counters(uint64_t* values, bool reset) {
  std::memcpy(values, &fastseg::emulation::counters, sizeof(fastseg::emulation::Counters));
  if (reset) fastseg::emulation::counters = {};
}
