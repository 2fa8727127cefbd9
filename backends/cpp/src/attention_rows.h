// Rows of scores, for every kernel of attention: what hides keys, and softmax block by block.
#pragma once

#include "attention_values.h"
#include "softmax.h"

namespace {

constexpr int64_t key_block = 64;

// The mask's row of a query at keys [begin, begin + count) as floats to add.
template <class S>
INLINE void load_mask_row(const AttentionTask& task, int64_t batch, int64_t head, int64_t query, int64_t begin, int64_t count, float* out) {
  const int64_t step = task.mask_stride[3];
  const int64_t at = batch * task.mask_stride[0] + head * task.mask_stride[1] + query * task.mask_stride[2] + begin * step;
  if (task.mask_kind == AttentionTask::boolean)
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<const uint8_t*>(task.mask)[at + i * step] ? 0.0f : minus_infinity;
  else if (task.mask_kind == AttentionTask::additive)
    for (int64_t i = 0; i < count; ++i) out[i] = S::to_float(static_cast<const typename S::T*>(task.mask)[at + i * step]);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<const float*>(task.mask)[at + i * step];
}

// A row's scores of keys [begin, begin + count), in s[key_block], to weights; rescales what was summed under an older
// maximum: `size` elements of sums. mask: the row to add, or null.
template <class S>
INLINE void weigh_row(const AttentionTask& task, int64_t query, int64_t begin, int64_t count, const float* mask, float* s,
                      typename Values<S>::X* weights, int64_t size, float* sums, float& maximum, float& total) {
  for (int64_t i = count; i < key_block; ++i) s[i] = minus_infinity;
  if (task.softcap != 0.0f)
    for (int64_t i = 0; i < count; i += lanes) store(s + i, softcapped(load(s + i), task.softcap));
  for (int64_t i = count; i < round_up(count, lanes); ++i) s[i] = minus_infinity;
  if (mask)
    for (int64_t i = 0; i < count; ++i) s[i] += mask[i];
  const int64_t from = task.window ? query - task.window + 1 - begin : 0;  // keys outside [from, to) are hidden
  const int64_t to = task.causal ? query + 1 - begin : count;
  for (int64_t i = 0; i < smaller(from, count); ++i) s[i] = minus_infinity;
  for (int64_t i = larger(to, 0); i < count; ++i) s[i] = minus_infinity;

  F best = load(s);
  for (int64_t i = lanes; i < key_block; i += lanes) best = larger_or_nan(load(s + i), best);
  const float now = larger_or_nan(largest(best), maximum);
  if (now == minus_infinity) {  // nothing visible yet
    for (int64_t i = 0; i < key_block; i += lanes) store(s + i, F{});
    return;
  }
  F added{};
  for (int64_t i = 0; i < key_block; i += 2 * lanes) {
    const F one = exp_negative(load(s + i) - now), other = exp_negative(load(s + i + lanes) - now);
    Values<S>::put_weights(weights + i, one, other);
    added += one + other;
  }
  const float before = maximum == minus_infinity ? 0.0f : exp_negative(maximum - now);
  if (before != 1.0f)
    for (int64_t i = 0; i < size; i += lanes) store(sums + i, load(sums + i) * before);
  total = total * before + sum(added);
  maximum = now;
}

}  // namespace
