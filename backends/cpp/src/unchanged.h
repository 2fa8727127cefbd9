// Whether tensors are the ones they were: the guard on packed weights, one sweep over all of a model's weights a call.
//
// What it looks at lies scattered over the weights, each place on a page of its own and in no cache any more: it is asked
// for two tensors ahead, by all threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstring>
#include <vector>

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
  std::vector<int64_t> begins;  // of each tensor's samples
  begins.reserve(tensors.size());
  int64_t bytes = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::TensorImpl* tensor = tensors[i].unsafeGetTensorImpl();
    if (reinterpret_cast<int64_t>(tensor) != state[i].tensor || reinterpret_cast<int64_t>(tensors[i].const_data_ptr()) != state[i].data) return false;
    if (int64_t(tensor->version_counter().current_version()) != state[i].version) return false;
    begins.push_back(bytes), bytes += state[i].count * state[i].size;
  }
  TORCH_CHECK(samples.is_contiguous() && int64_t(samples.nbytes()) == bytes, "unchanged: ", bytes, " bytes of samples wanted, got ", samples.nbytes());
  auto place = [&](int64_t i, int64_t number) { return reinterpret_cast<const char*>(state[i].data) + number * state[i].step; };
  std::atomic<bool> same{true};
  constexpr int64_t ahead = 2, worth_a_thread = 32;
  at::parallel_for(0, int64_t(tensors.size()), worth_a_thread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end + ahead; ++i) {
      if (i < end)
        for (int64_t j = 0; j < state[i].count; ++j) __builtin_prefetch(place(i, j));
      if (i < begin + ahead) continue;
      const TensorState& at = state[i - ahead];
      const char* was = sample + begins[i - ahead];
      for (int64_t j = 0; j < at.count; ++j, was += at.size)
        if (std::memcmp(place(i - ahead, j), was, at.size)) return same.store(false);
    }
  });
  return same;
}

}  // namespace
}  // namespace graphopt
