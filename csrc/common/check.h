// FASTSEG_CHECK(condition, message parts...): a failed check becomes a Python ValueError.
// Never use it inside parallel_for: libtorch loses type and text there. Set a flag and check it
// after.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastseg {

template <typename... Parts>
[[noreturn]] void fail_check(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace fastseg

#define FASTSEG_CHECK(condition, ...)                     \
  do {                                                    \
    if (!(condition)) ::fastseg::fail_check(__VA_ARGS__); \
  } while (false)
