// x W^T for the few rows of a decoding step, where reading W once is the whole cost.
//
// W stays as it is, (N, K): each core walks a contiguous part of it, and every vector of W that arrives meets up to
// `TOGETHER` rows of x before the next is read. A sum's order depends on K alone, so a row's result is the same bits
// whatever rows are beside it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "simd.h"

namespace promptmux {

constexpr int64_t TOGETHER = 6;  // rows of x at once: 2 x 6 sums fill the sixteen registers of AVX2
constexpr int64_t LINE = 16;   // floats of a cache line
constexpr int64_t STRIP = 16;  // rows of W that stay in cache while all blocks of x pass: 48 KiB at K = 768

constexpr int64_t AHEAD = 4;   // rows of W fetched before their turn: 1.2 to 1.4 times faster than the CPU's own guesses

// Sums of ROWS rows of x (K apart) with NEURONS rows of W, to out[row * n + neuron].
template <int64_t ROWS, int64_t NEURONS>
void dot_block(const float* x, int64_t stride, const float* w, int64_t k, const float* bias, const float* residual,
               float* out, int64_t n) {
  Vec sums[ROWS][NEURONS];
  for (auto& row : sums)
    for (Vec& s : row) s = splat(0.f);
  for (int64_t i = 0; i < k; i += WIDTH) {
    Vec weights[NEURONS];
    for (int64_t j = 0; j < NEURONS; ++j) {
      weights[j] = load(w + j * k + i);
      if (i % LINE == 0) _mm_prefetch(reinterpret_cast<const char*>(w + (j + AHEAD) * k + i), _MM_HINT_T0);
    }
    for (int64_t r = 0; r < ROWS; ++r) {
      const Vec value = load(x + r * stride + i);
      for (int64_t j = 0; j < NEURONS; ++j) sums[r][j] = sums[r][j] + value * weights[j];
    }
  }
  for (int64_t r = 0; r < ROWS; ++r)
    for (int64_t j = 0; j < NEURONS; ++j)
      out[r * n + j] = sum(sums[r][j]) + (bias ? bias[j] : 0.f) + (residual ? residual[r * n + j] : 0.f);
}

// As `dot_block`, for up to TOGETHER rows.
template <int64_t NEURONS>
void dot_rows(int64_t rows, const float* x, int64_t stride, const float* w, int64_t k, const float* bias,
              const float* residual, float* out, int64_t n) {
  const auto block = [&](auto count) {
    dot_block<decltype(count)::value, NEURONS>(x, stride, w, k, bias, residual, out, n);
  };
  switch (rows) {
    case 1: return block(std::integral_constant<int64_t, 1>{});
    case 2: return block(std::integral_constant<int64_t, 2>{});
    case 3: return block(std::integral_constant<int64_t, 3>{});
    case 4: return block(std::integral_constant<int64_t, 4>{});
    case 5: return block(std::integral_constant<int64_t, 5>{});
    case TOGETHER: return block(std::integral_constant<int64_t, TOGETHER>{});
  }
}

// out (M, N) = x (M, K) W^T + bias + residual; K is a multiple of 16, all but x are contiguous.
inline void few_rows(const at::Tensor& x, const at::Tensor& weight, const float* bias, const float* residual,
                     at::Tensor& out) {
  const int64_t rows = x.size(0), stride = x.stride(0), k = weight.size(1), n = weight.size(0);
  const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, (n + STRIP - 1) / STRIP, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(n, end * STRIP);
    for (int64_t strip = begin * STRIP; strip < last; strip += STRIP) {
      const int64_t stop = std::min(last, strip + STRIP);
      for (int64_t first = 0; first < rows; first += TOGETHER) {
        const int64_t count = std::min(TOGETHER, rows - first);
        const float* part = from + first * stride;
        const float* rest = residual ? residual + first * n : nullptr;
        int64_t j = strip;
        for (; j + 2 <= stop; j += 2)
          dot_rows<2>(count, part, stride, w + j * k, k, bias ? bias + j : nullptr, rest ? rest + j : nullptr,
                      to + first * n + j, n);
        if (j < stop)
          dot_rows<1>(count, part, stride, w + j * k, k, bias ? bias + j : nullptr, rest ? rest + j : nullptr,
                      to + first * n + j, n);
      }
    }
  });
}

}  // namespace promptmux
