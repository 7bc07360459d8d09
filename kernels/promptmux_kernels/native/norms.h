// LayerNorm fused with the GELU before it, one pass over memory: at 7000 tokens this is memory, not arithmetic.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <cmath>

#include "simd.h"

namespace promptmux {

// out = (row - mean) / sqrt(var + eps) * weight + bias, where `total` holds the sum of the row; dim is a multiple of 16.
template <typename T>
void normalise(const float* row, Vec total, int64_t dim, const T* weight, const T* bias, float eps, T* out) {
  Vec squares = splat(0.f);
  const Vec mean = splat(sum(total) / dim);
  for (int64_t d = 0; d < dim; d += WIDTH) {
    const Vec x = load(row + d) - mean;
    squares = squares + x * x;
  }
  const Vec scale = splat(1.f / std::sqrt(sum(squares) / dim + eps));
  for (int64_t d = 0; d < dim; d += WIDTH)
    store(out + d, (load(row + d) - mean) * scale * load(weight + d) + load(bias + d));
}

// erf(size) for size >= 0, where `decay` is e^(-size^2): Abramowitz and Stegun 7.1.26, |error| < 1.5e-7, a rounding of
// float32.
inline Vec erf_of_size(Vec size, Vec decay) {
  const Vec t = splat(1.f) / (splat(0.3275911f) * size + splat(1.f));
  Vec p = splat(1.061405429f);
  p = p * t + splat(-1.453152027f);
  p = p * t + splat(1.421413741f);
  p = p * t + splat(-0.284496736f);
  p = p * t + splat(0.254829592f);
  return splat(1.f) - p * t * decay;
}

// erf(x), |error| < 3e-5 (a polynomial fitted to |x| <= 3; flat beyond): for numbers of which bfloat16 keeps 4e-3, and
// neither a division nor an exponential.
inline Vec rough_erf(Vec x) {
  const Vec near = min(splat(3.f), max(splat(-3.f), x));
  const Vec u = near * near;
  Vec p = splat(4.074205151e-8f);
  p = p * u + splat(-1.9448205e-6f);
  p = p * u + splat(4.1060488e-5f);
  p = p * u + splat(-5.1103655e-4f);
  p = p * u + splat(4.2354260e-3f);
  p = p * u + splat(-2.5102856e-2f);
  p = p * u + splat(0.11107933f);
  p = p * u + splat(-0.37531486f);
  p = p * u + splat(1.1282685f);
  return p * near;
}

constexpr float ROOT_HALF = 0.70710678118654752f;

inline Vec size_of(Vec x) { return max(x, splat(0.f) - x); }

// x * (1 + erf(x / sqrt 2)) / 2.
inline Vec gelu(Vec x) {
  const Vec size = size_of(x * splat(ROOT_HALF));
  const Vec erf = erf_of_size(size, exp(splat(0.f) - size * size));
  return splat(0.5f) * x + splat(0.5f) * size_of(x) * erf;
}
inline Vec rough_gelu(Vec x) {
  const Vec half = splat(0.5f) * x;
  return half + half * rough_erf(x * splat(ROOT_HALF));
}

template <typename T>
void gelu_norm(const at::Tensor& x, const T* weight, const T* bias, float eps, at::Tensor& out) {
  const int64_t dim = x.size(1);
  at::parallel_for(0, x.size(0), 8, [&](int64_t begin, int64_t end) {
    std::vector<float> row(dim);
    for (int64_t i = begin; i < end; ++i) {
      const T* from = x.const_data_ptr<T>() + i * x.stride(0);
      Vec total = splat(0.f);
      for (int64_t d = 0; d < dim; d += WIDTH) {
        Vec active;
        if constexpr (std::is_same_v<T, float>) active = gelu(load(from + d));
        else active = rough_gelu(load(from + d));
        store(row.data() + d, active);
        total = total + active;
      }
      normalise(row.data(), total, dim, weight, bias, eps, out.data_ptr<T>() + i * dim);
    }
  });
}

}  // namespace promptmux
