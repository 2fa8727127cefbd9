// Whether tensors are the ones they were: the guard on packed weights, one sweep over all of a model's weights a call.
//
// What it looks at lies scattered over the weights, each place on a page of its own: it is asked for two tensors ahead.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>

namespace graphopt {
namespace {

// A row of the table of states: graphopt/runtime/packs.py writes it.
struct TensorState {
  int64_t tensor, data, version;  // addresses of the tensor and of its memory; its version counter
  int64_t count, step, size;      // so many samples of `size` bytes, `step` bytes apart, from the first element on
};

// states: int64 [tensors, 6]; samples: the bytes of all samples as they were, one behind the other.
bool unchanged(at::TensorList tensors, const at::Tensor& states, const at::Tensor& samples) {
  TORCH_CHECK(states.is_contiguous() && states.scalar_type() == at::kLong && states.numel() == int64_t(tensors.size()) * 6,
              "unchanged: one row of six numbers for each tensor wanted, got ", states.sizes());
  const auto* state = reinterpret_cast<const TensorState*>(states.const_data_ptr<int64_t>());
  const auto* sample = static_cast<const char*>(samples.const_data_ptr());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::TensorImpl* tensor = tensors[i].unsafeGetTensorImpl();
    if (reinterpret_cast<int64_t>(tensor) != state[i].tensor || reinterpret_cast<int64_t>(tensors[i].const_data_ptr()) != state[i].data) return false;
    if (int64_t(tensor->version_counter().current_version()) != state[i].version) return false;
  }
  auto place = [&](size_t i, int64_t number) { return reinterpret_cast<const char*>(state[i].data) + number * state[i].step; };
  constexpr size_t ahead = 2;
  for (size_t i = 0; i < tensors.size() + ahead; ++i) {
    if (i < tensors.size())
      for (int64_t j = 0; j < state[i].count; ++j) __builtin_prefetch(place(i, j));
    if (i < ahead) continue;
    const TensorState& at = state[i - ahead];
    for (int64_t j = 0; j < at.count; ++j, sample += at.size)
      if (std::memcmp(place(i - ahead, j), sample, at.size)) return false;
  }
  return true;
}

}  // namespace
}  // namespace graphopt
