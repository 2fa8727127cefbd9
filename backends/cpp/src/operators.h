// Shared by the files that bind kernels to torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

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

// Held while an operator falls back to torch's own: autocast has had its say where the operator was called, and must
// not change the dtype of the result now.
struct WithoutAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// Memory of the calling thread, aligned to 64 bytes, valid until it asks again for the same use; kept between calls.
enum class Scratch { per_thread, per_call };
void* scratch(Scratch use, size_t bytes);

}  // namespace graphopt
