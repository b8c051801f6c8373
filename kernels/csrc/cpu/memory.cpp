#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace mlomae {

using torch::stable::Tensor;

namespace {

// glibc never keeps larger blocks for reuse: each is mapped anew, and its first touch costs a page fault
// per 4 KiB, several times the work of the operators here.
constexpr int64_t kMappedAnewBytes = int64_t{32} << 20;

// Asks for 2 MiB pages where the kernel gives them on request. Only speed depends on it.
void request_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  if (bytes < kMappedAnewBytes) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first_page = (begin + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first_page), begin + bytes - first_page, MADV_HUGEPAGE);
#endif
}

}  // namespace

Tensor new_output(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                  std::optional<torch::headeronly::ScalarType> dtype) {
  Tensor output = torch::stable::new_empty(like, size, dtype);
  request_huge_pages(output);
  return output;
}

}  // namespace mlomae
