// Errors of the operators. torch's own STD_TORCH_CHECK puts the path of the source file before the message,
// which tells a user nothing.

#pragma once

#include <sstream>
#include <stdexcept>
#include <utility>

namespace mlomae {

// Throws "op: argument: got ..., expected ...", whose end is made of `parts`.
template <typename... Parts>
[[noreturn]] void refuse(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": " << argument << ": got ";
  (text << ... << parts);
  throw std::runtime_error(std::move(text).str());
}

}  // namespace mlomae
