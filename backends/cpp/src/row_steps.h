// What a chain computes between its linears: one step on whole rows, rounded to the storage type as a tensor would be.
#pragma once

#include "softmax.h"

namespace {

// exp(-|x|) serves functions of both signs without overflow.
INLINE F magnitude(F x) { return reinterpret_cast<F>(reinterpret_cast<U>(x) & 0x7fffffff); }
INLINE F with_sign_of(F x, F from) { return reinterpret_cast<F>(reinterpret_cast<U>(x) | (reinterpret_cast<U>(from) & 0x80000000u)); }

INLINE F silu(F x) {
  const F e = exp_negative(-magnitude(x));
  return x * select(x < F{}, e, splat(1.0f)) / (1.0f + e);
}

// Near zero by its series: the difference of exponentials would keep few digits.
INLINE F tanh_of(F x) {
  const F square = x * x, e = exp_negative(-2.0f * magnitude(x));
  const F series = x + x * square * (-0x1.555556p-2f + square * (0x1.111112p-3f + square * (-0x1.ba1ba2p-5f + square * 0x1.664f48p-6f)));
  return select(square < splat(0x1p-4f), series, with_sign_of((1.0f - e) / (1.0f + e), x));
}

// erf by Abramowitz and Stegun 7.1.26, as torch's own vectors have it: 1.5e-7.
INLINE F erf_of(F x) {
  const F t = 1.0f / (1.0f + 0.3275911f * magnitude(x));
  const F series = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  return with_sign_of(1.0f - series * exp_negative(-x * x), x);
}

// Calls f(first element, count) for the steps of a row.
template <class S, class Call>
INLINE void for_steps(int64_t n, const Call& f) {
  for (int64_t i = 0; i < n; i += S::step) f(i, smaller(n - i, S::step));
}

template <class S>
INLINE typename S::Pair elements(const typename S::T* p, int64_t count) { return count == S::step ? S::pair(p) : pair_tail<S>(p, count); }

template <class S>
INLINE void put_elements(typename S::T* p, typename S::Pair values, int64_t count) {
  if (count == S::step) return S::put(p, values);
  typename S::T buffer[S::step];
  S::put(buffer, values);
  __builtin_memcpy(p, buffer, count * sizeof *p);
}

// out = f(a, b) or, without b, f(a, the number): element by element.
template <class S, class Call>
INLINE void by_element(const RowTask& task, const Call& f) {
  using T = typename S::T;
  for (int64_t m = 0; m < task.m; ++m) {
    const T* a = static_cast<const T*>(task.a) + m * task.lda;
    const T* b = task.b ? static_cast<const T*>(task.b) + m * task.ldb : nullptr;
    T* out = static_cast<T*>(task.out) + m * task.n;
    for_steps<S>(task.n, [&](int64_t i, int64_t count) INLINE_LAMBDA {
      typename S::Pair x = elements<S>(a + i, count), y{{splat(task.number), splat(task.number)}};
      if (b) y = elements<S>(b + i, count);
      for (int h = 0; h < 2; ++h) x.v[h] = f(x.v[h], y.v[h]);
      put_elements<S>(out + i, x, count);
    });
  }
}

// Sum over a row [n] of f(x); f(0) must be 0, which stands behind the row's end.
template <class S, class Call>
INLINE float row_sum(const typename S::T* x, int64_t n, const Call& f) {
  F sums[2] = {};
  for_steps<S>(n, [&](int64_t i, int64_t count) INLINE_LAMBDA {
    const typename S::Pair values = elements<S>(x + i, count);
    for (int h = 0; h < 2; ++h) sums[h] += f(values.v[h]);
  });
  return sum(sums[0] + sums[1]);
}

template <class S>
INLINE F rounded(F x) {
  if constexpr (sizeof(typename S::T) == 4) return x;
  for (int i = 0; i < lanes; ++i) x[i] = S::to_float(S::from_float(x[i]));
  return x;
}
template <>
INLINE F rounded<Bf16>(F x) { return reinterpret_cast<F>(Bf16::round(x) << 16); }

template <class S>
void rms_norm(const RowTask& task) {
  using T = typename S::T;
  const T* weight = static_cast<const T*>(task.b);
  for (int64_t m = 0; m < task.m; ++m) {
    const T* x = static_cast<const T*>(task.a) + m * task.lda;
    T* out = static_cast<T*>(task.out) + m * task.n;
    const float mean = row_sum<S>(x, task.n, [](F v) INLINE_LAMBDA { return v * v; }) / float(task.n);
    const float factor = 1.0f / __builtin_sqrtf(mean + task.number);
    for_steps<S>(task.n, [&](int64_t i, int64_t count) INLINE_LAMBDA {
      typename S::Pair values = elements<S>(x + i, count), scale{};
      if (weight) scale = elements<S>(weight + i, count);
      for (int h = 0; h < 2; ++h) {
        values.v[h] *= factor;
        if (!weight) continue;
        scale.v[h] += task.offset;
        values.v[h] = task.cast_first ? rounded<S>(values.v[h]) * rounded<S>(scale.v[h]) : values.v[h] * scale.v[h];
      }
      put_elements<S>(out + i, values, count);
    });
  }
}

template <class S>
void layer_norm(const RowTask& task) {
  using T = typename S::T;
  const T *weight = static_cast<const T*>(task.b), *bias = static_cast<const T*>(task.c);
  for (int64_t m = 0; m < task.m; ++m) {
    const T* x = static_cast<const T*>(task.a) + m * task.lda;
    T* out = static_cast<T*>(task.out) + m * task.n;
    const float mean = row_sum<S>(x, task.n, [](F v) INLINE_LAMBDA { return v; }) / float(task.n);
    const int64_t whole = task.n / S::step * S::step;
    float spread = row_sum<S>(x, whole, [&](F v) INLINE_LAMBDA { return (v - mean) * (v - mean); });
    for (int64_t i = whole; i < task.n; ++i) spread += (S::to_float(x[i]) - mean) * (S::to_float(x[i]) - mean);
    const float factor = 1.0f / __builtin_sqrtf(spread / float(task.n) + task.number);
    for_steps<S>(task.n, [&](int64_t i, int64_t count) INLINE_LAMBDA {
      typename S::Pair values = elements<S>(x + i, count), scale{}, shift{};
      if (weight) scale = elements<S>(weight + i, count);
      if (bias) shift = elements<S>(bias + i, count);
      for (int h = 0; h < 2; ++h) {
        values.v[h] = (values.v[h] - mean) * factor;
        if (weight) values.v[h] *= scale.v[h];
        if (bias) values.v[h] += shift.v[h];
      }
      put_elements<S>(out + i, values, count);
    });
  }
}

// Rounded behind each product and the sum, as eager's tensors are.
template <class S>
INLINE F turned(F x, F cos, F other, F sin) { return rounded<S>(x * cos) + rounded<S>(other * sin); }

template <class S>
void rope_halves(const typename S::T* x, const typename S::T* cos, const typename S::T* sin, int64_t half, typename S::T* out) {
  for_steps<S>(half, [&](int64_t i, int64_t count) INLINE_LAMBDA {
    const auto a = elements<S>(x + i, count), b = elements<S>(x + half + i, count);
    const auto cos_a = elements<S>(cos + i, count), cos_b = elements<S>(cos + half + i, count);
    const auto sin_a = elements<S>(sin + i, count), sin_b = elements<S>(sin + half + i, count);
    typename S::Pair first, second;
    for (int h = 0; h < 2; ++h) {
      first.v[h] = turned<S>(a.v[h], cos_a.v[h], -b.v[h], sin_a.v[h]);
      second.v[h] = turned<S>(b.v[h], cos_b.v[h], a.v[h], sin_b.v[h]);
    }
    put_elements<S>(out + i, first, count), put_elements<S>(out + half + i, second, count);
  });
}

template <class S>
void rope_pairs(const typename S::T* x, const typename S::T* cos, const typename S::T* sin, int64_t width, typename S::T* out) {
  auto one = [&](int64_t i, int64_t other, float sign) {
    const F sum = turned<S>(splat(S::to_float(x[i])), splat(S::to_float(cos[i])), splat(sign * S::to_float(x[other])), splat(S::to_float(sin[i])));
    out[i] = S::from_float(sum[0]);
  };
  for (int64_t i = 0; i < width; i += 2) one(i, i + 1, -1.0f), one(i + 1, i, 1.0f);
}

template <class S>
void rope(const RowTask& task) {
  using T = typename S::T;
  for (int64_t m = 0; m < task.m; ++m) {
    const T *cos = static_cast<const T*>(task.b) + m % task.period * task.width, *sin = static_cast<const T*>(task.c) + m % task.period * task.width;
    for (int64_t i = 0; i < task.n; i += task.width) {
      const T* x = static_cast<const T*>(task.a) + m * task.lda + i;
      T* out = static_cast<T*>(task.out) + m * task.n + i;
      task.interleaved ? rope_pairs<S>(x, cos, sin, task.width, out) : rope_halves<S>(x, cos, sin, task.width / 2, out);
    }
  }
}

template <class S>
void row_step_as(const RowTask& task) {
  const F half = splat(0.5f);
  switch (task.op) {
    case RowOp::add: return by_element<S>(task, [](F a, F b) INLINE_LAMBDA { return a + b; });
    case RowOp::mul: return by_element<S>(task, [](F a, F b) INLINE_LAMBDA { return a * b; });
    case RowOp::cube: return by_element<S>(task, [](F a, F) INLINE_LAMBDA { return a * a * a; });
    case RowOp::relu: return by_element<S>(task, [](F a, F) INLINE_LAMBDA { return select(a < F{}, F{}, a); });
    case RowOp::tanh: return by_element<S>(task, [](F a, F) INLINE_LAMBDA { return tanh_of(a); });
    case RowOp::silu: return by_element<S>(task, [](F a, F) INLINE_LAMBDA { return silu(a); });
    case RowOp::gelu: return by_element<S>(task, [&](F a, F) INLINE_LAMBDA { return a * half * (1.0f + erf_of(a * 0x1.6a09e6p-1f)); });
    case RowOp::gelu_tanh:
      return by_element<S>(task, [&](F a, F) INLINE_LAMBDA { return half * a * (1.0f + tanh_of(0x1.988454p-1f * (a + 0x1.6e4e26p-5f * a * a * a))); });
    case RowOp::rms_norm: return rms_norm<S>(task);
    case RowOp::layer_norm: return layer_norm<S>(task);
    case RowOp::rope: return rope<S>(task);
  }
}

}  // namespace
