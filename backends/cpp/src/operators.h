// Shared by the files that bind kernels to torch.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels.h"

namespace graphopt {

inline std::optional<Dtype> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Dtype::fp32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::fp16;
    default: return std::nullopt;
  }
}

// Memory of the calling thread, aligned to 64 bytes, valid until it asks again for the same use; kept between calls.
enum class Scratch { per_thread, per_call };
void* scratch(Scratch use, size_t bytes);

}  // namespace graphopt
