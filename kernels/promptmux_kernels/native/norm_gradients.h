// The way back through `gelu_norm`, whose weights are frozen: the gradient of its input.
//
// GELU is computed again: to keep its result as well would double what a layer's feed-forward half keeps.
#pragma once

#include "norms.h"

namespace promptmux {

// GELU's value and slope: x F(x) and F(x) + x F'(x), with F the normal distribution.
struct Gelu {
  Vec value, slope;
};

template <typename T>
Gelu gelu_and_slope(Vec x) {
  const Vec half = splat(0.f) - splat(0.5f) * x * x;
  Vec erf, decay;
  if constexpr (std::is_same_v<T, float>) {
    decay = exp(half);
    const Vec sign = min(splat(1.f), max(splat(-1.f), x * splat(1e30f)));
    erf = sign * erf_of_size(size_of(x * splat(ROOT_HALF)), decay);
  } else {
    decay = rough_exp(half);
    erf = rough_erf(x * splat(ROOT_HALF));
  }
  const Vec share = splat(0.5f) + splat(0.5f) * erf;
  return {x * share, share + splat(0.39894228040143268f) * x * decay};
}

// The gradient of x (M, dim), where `out_gradient` is that of LN(gelu(x)).
template <typename T>
void gelu_norm_gradient(const at::Tensor& x, const T* weight, float eps, const at::Tensor& out_gradient,
                        at::Tensor& x_gradient) {
  const int64_t dim = x.size(1);
  at::parallel_for(0, x.size(0), 8, [&](int64_t begin, int64_t end) {
    std::vector<float> active(dim), slopes(dim);
    for (int64_t i = begin; i < end; ++i) {
      const T* from = x.const_data_ptr<T>() + i * x.stride(0);
      const T* behind = out_gradient.const_data_ptr<T>() + i * dim;
      T* to = x_gradient.data_ptr<T>() + i * dim;
      Vec total = splat(0.f);
      for (int64_t d = 0; d < dim; d += WIDTH) {
        const Gelu gelu = gelu_and_slope<T>(load(from + d));
        store(active.data() + d, gelu.value);
        store(slopes.data() + d, gelu.slope);
        total = total + gelu.value;
      }
      const Vec mean = splat(sum(total) / dim);
      Vec squares = splat(0.f), flat = splat(0.f), along = splat(0.f);
      for (int64_t d = 0; d < dim; d += WIDTH) {
        const Vec a = load(active.data() + d) - mean, g = load(behind + d) * load(weight + d);
        squares = squares + a * a;
        flat = flat + g;
        along = along + g * a;
      }
      const float variance = sum(squares) / dim + eps;
      const Vec scale = splat(1.f / std::sqrt(variance)), level = splat(sum(flat) / dim);
      const Vec tilt = splat(sum(along) / dim / variance);
      for (int64_t d = 0; d < dim; d += WIDTH) {
        const Vec g = load(behind + d) * load(weight + d) - level - tilt * (load(active.data() + d) - mean);
        store(to + d, scale * g * load(slopes.data() + d));
      }
    }
  });
}

}  // namespace promptmux
