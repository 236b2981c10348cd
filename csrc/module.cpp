// The Python module fastseg._C: build facts, CPU instruction sets and counters. Loading it
// registers the ops with torch. No torch header here: pybind11 and torch's headers together cost 27
// s to compile.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "common/counters.h"
#include "common/isa.h"

namespace py = pybind11;

namespace fastseg {
namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cpp_standard"] = __cplusplus / 100 % 100;
  info["torch_target"] = std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
                         std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
  info["cuda_archs"] = FASTSEG_CUDA_ARCHS;  // "" where the CUDA kernels were not built
#if defined(NDEBUG)
  info["debug"] = false;
#else
  info["debug"] = true;
#endif
  return info;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int level = 0; level <= static_cast<int>(detect_isa()); ++level) {
    names.emplace_back(isa_name(static_cast<Isa>(level)));
  }
  return names;
}

void set_cpu_isa(const std::string& name) {
  const auto names = supported_isas();
  for (size_t level = 0; level < names.size(); ++level) {
    if (names[level] == name) {
      current_isa() = static_cast<Isa>(level);
      return;
    }
  }
  std::string known;
  for (const auto& one : names) known += (known.empty() ? "" : ", ") + one;
  throw std::invalid_argument("set_cpu_isa: must be one of this CPU's instruction sets (" + known +
                              "), got " + name);
}

std::map<std::string, int64_t> kernel_counts() {
  std::map<std::string, int64_t> counts;
  for (const Counter* c = Counter::head(); c != nullptr; c = c->next) counts[c->name] += c->count;
  return counts;
}

// Hands on the memory of another object; MatrixXf of fastseg.compat.pydensecrf is one of these.
struct BufferView {
  py::buffer source;
};

void reset_kernel_counts() {
  for (Counter* c = Counter::head(); c != nullptr; c = c->next) c->count = 0;
}

}  // namespace
}  // namespace fastseg

PYBIND11_MODULE(_C, m) {
  using namespace fastseg;
  m.def("build_info", &build_info, "Compiler, targets and options this library was built with.");
  m.def("supported_cpu_isas", &supported_isas, "Instruction sets this CPU can run, weakest first.");
  m.def("cpu_isa", [] { return isa_name(current_isa()); }, "The instruction set the kernels use.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"), "Use another instruction set, for tests.");
  m.def(
      "bf16_products", [] { return bf16_products().load(); },
      "Whether bfloat16 convolutions multiply in bfloat16 where they may.");
  m.def(
      "set_bf16_products", [](bool on) { bf16_products() = on; }, py::arg("on"),
      "Make that choice another way, for tests; what is packed already stays.");
  m.def("kernel_counts", &kernel_counts, "How often each kernel variant ran since the last reset.");
  m.def("reset_kernel_counts", &reset_kernel_counts);
  py::class_<BufferView>(m, "BufferView", py::buffer_protocol(),
                         "Exports the buffer of `source` as its own.")
      .def(py::init<py::buffer>(), py::arg("source"))
      .def_readwrite("source", &BufferView::source)
      .def_buffer([](const BufferView& view) { return view.source.request(true); });
}
