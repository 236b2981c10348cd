// The memory of CPU tensors while CUDA kernels are emulated. All its bits are set until something
// is written: NaN, -1, the largest code. What is allocated while a graph is captured is never
// freed, so that the graph can be replayed.
#undef TORCH_TARGET_VERSION  // allocators are not part of the stable ABI
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstring>

namespace {

class EmulatedMemory final : public c10::Allocator {
 public:
  std::atomic<bool> keep{false};

  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr data = base_->allocate(bytes);
    if (bytes > 0) std::memset(data.get(), 0xff, bytes);
    if (!keep) return data;
    void* place = data.get();
    data.release_context();
    return {place, place, &c10::detail::deleteNothing, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return base_->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    base_->copy_data(to, from, bytes);
  }

 private:
  c10::Allocator* base_ = c10::GetDefaultCPUAllocator();
};

EmulatedMemory& memory() {
  static auto* const instance = new EmulatedMemory;  // never destroyed: tensors outlive the library
  return *instance;
}

const bool installed = (c10::SetCPUAllocator(&memory(), 1), true);

}  // namespace

extern "C" void fastseg_emulation_keep_memory(bool on) { memory().keep = on; }
