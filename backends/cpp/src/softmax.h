// Functions of scores: exponentials, the largest score, soft capping.
#pragma once

#include "vec.h"

namespace {

constexpr float minus_infinity = -__builtin_inff();

// exp(x) for x <= 0, about 1 ulp; NaN stays, minus infinity gives 0, subnormal results are flushed to 0.
INLINE F exp_negative(F x) {
  F clamped = select(x < splat(-87.0f), splat(-87.0f), x);
  constexpr float rounding = 0x1.8p23f;  // adding it leaves the integer nearest to the argument in the low bits
  F shifted = clamped * 0x1.715476p0f + rounding;
  F n = shifted - rounding;
  F r = clamped - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts
  F p = r * 0x1.6850e4p-10f + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  F power = reinterpret_cast<F>((reinterpret_cast<I>(shifted) << 23) + 0x3f800000);
  return select(x < splat(-87.0f), F{}, p * power);
}

INLINE float exp_negative(float x) { return exp_negative(splat(x))[0]; }

// The largest element. NaN counts as larger than anything: a row whose scores are all NaN must not look like one that
// is masked.
template <class V>
INLINE V larger_or_nan(V a, V b) { return a <= b ? b : a; }

INLINE float largest(F a) {
  F4 part[lanes / 4];
  __builtin_memcpy(part, &a, sizeof part);
  for (int width = lanes / 8; width; width /= 2)
    for (int i = 0; i < width; ++i) part[i] = larger_or_nan(part[i], part[i + width]);
  F4 two = larger_or_nan(part[0], __builtin_shufflevector(part[0], part[0], 2, 3, 0, 1));
  return larger_or_nan(two[0], two[1]);
}

INLINE F softcapped(F s, float cap) {
  F y = s / cap;
  F magnitude = reinterpret_cast<F>(reinterpret_cast<U>(y) & 0x7fffffff);
  F e = exp_negative(-2.0f * magnitude);
  F tanh = (1.0f - e) / (1.0f + e);
  return cap * reinterpret_cast<F>(reinterpret_cast<U>(tanh) | (reinterpret_cast<U>(y) & 0x80000000u));
}

}  // namespace
