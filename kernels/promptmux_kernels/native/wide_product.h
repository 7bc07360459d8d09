// x W^T in float32 from operands of 16 bits: a vocabulary's logits, which rounded to bfloat16 would tie and swap places.
//
// W is packed once, 64 of its rows to a block, as attention's keys are; each core walks a contiguous part of it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "attend.h"

namespace promptmux {

// W (N, K) to filled(N) * K elements.
template <typename T>
void pack_weight(const at::Tensor& weight, at::Tensor& packed) {
  const int64_t n = weight.size(0), k = weight.size(1);
  const T* from = weight.const_data_ptr<T>();
  at::parallel_for(0, (n + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * BLOCK, count = std::min(n, end * BLOCK) - first;
    const auto row = [&](int64_t j) { return from + (first + j) * k; };
    pack_keys<T>(row, count, k, packed.data_ptr<Operand<T>>() + first * k);
  });
}

// out (round_up(M, 8), N) = x (M, K) W^T, QUERIES rows of x at a time; rows behind M hold zeros.
template <typename T>
void wide_product(const at::Tensor& x, const at::Tensor& packed, at::Tensor& out) {
  const int64_t m = x.size(0), k = x.size(1), n = out.size(1);
  const Operand<T>* w = packed.const_data_ptr<Operand<T>>();
  at::parallel_for(0, (n + BLOCK - 1) / BLOCK, 1, [&](int64_t begin, int64_t end) {
    auto& work = Workspace<T>::mine();
    for (int64_t first = 0; first < m; first += QUERIES) {
      const int64_t rows = block_rows(std::min(QUERIES, m - first));
      const Operand<T>* queries =
          take_queries(x.const_data_ptr<T>() + first * x.stride(0), x.stride(0), std::min(QUERIES, m - first), k, work);
      for (int64_t j = begin * BLOCK; j < std::min(n, end * BLOCK); j += BLOCK) {
        const int64_t width = std::min(BLOCK, n - j);
        float* to = out.data_ptr<float>() + first * n + j;
        if (width == filled(width)) {
          multiply<T>(rows, width, k, queries, k, w + j * k, to, n, false);
        } else {  // a product writes whole sixteens, which here would run into the next row
          float* wide = work.scores.of(QUERIES * BLOCK);
          multiply<T>(rows, filled(width), k, queries, k, w + j * k, wide, filled(width), false);
          for (int64_t i = 0; i < rows; ++i) std::copy_n(wide + i * filled(width), width, to + i * n);
        }
      }
    }
    at::native::cpublas::brgemm_release(PAIR<T> == 2);
  });
}

}  // namespace promptmux
