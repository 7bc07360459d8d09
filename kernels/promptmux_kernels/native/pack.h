// How keys and values lie in memory while a product reads them.
//
// The product is oneDNN's brgemm as PyTorch exports it. It wants its second operand in rows over the reduced dimension
// and, in bfloat16, pairs of such rows interleaved (VNNI): keys (n, D) become blocks of 64 keys, each [D / p][64][p];
// values (n, D) become [n / p][D][p], with p = 2 in bfloat16 and 1 in float32. Rows are filled up with zeros to a
// multiple of 16, so that what lies behind a row's last key never enters a product: zero times NaN is NaN.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace promptmux {

constexpr int64_t BLOCK = 64;  // keys per packed block: 16 kB of float32 at D = 64, half of L1
constexpr int64_t FILL = 16;   // packed rows are a multiple of this

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
inline int64_t filled(int64_t keys) { return round_up(keys, FILL); }

// What products multiply: the tensors' own type where the CPU multiplies it, else float32, converted while packing.
#if defined(__AVX512BF16__)
template <typename T>
using Operand = T;
#else
template <typename T>
using Operand = float;
#endif

template <typename T>
constexpr int64_t PAIR = std::is_same_v<Operand<T>, float> ? 1 : 2;

// `row(j)` points at the D elements of key j; `out` holds filled(count) * D elements.
template <typename T, typename RowOf>
void pack_keys(RowOf row, int64_t count, int64_t dim, Operand<T>* out) {
  constexpr int64_t pair = PAIR<T>;
  for (int64_t begin = 0; begin < filled(count); begin += BLOCK) {
    const int64_t width = std::min(BLOCK, filled(count) - begin);
    Operand<T>* block = out + begin * dim;
    for (int64_t j = 0; j < width; ++j) {
      const T* source = begin + j < count ? row(begin + j) : nullptr;
      for (int64_t d = 0; d < dim; d += pair)
        for (int64_t i = 0; i < pair; ++i)
          block[(d / pair * width + j) * pair + i] = source ? static_cast<Operand<T>>(source[d + i]) : Operand<T>(0.f);
    }
  }
}

template <typename T, typename RowOf>
void pack_values(RowOf row, int64_t count, int64_t dim, Operand<T>* out) {
  constexpr int64_t pair = PAIR<T>;
  for (int64_t j = 0; j < filled(count); ++j) {
    const T* source = j < count ? row(j) : nullptr;
    Operand<T>* target = out + j / pair * pair * dim + j % pair;
    for (int64_t d = 0; d < dim; ++d)
      target[d * pair] = source ? static_cast<Operand<T>>(source[d]) : Operand<T>(0.f);
  }
}

// c (m, n) = a (m, k) times packed b (k, n), or += where `add`; pitches are elements from row to row.
template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, const Operand<T>* a, int64_t pitch_a, const Operand<T>* b, float* c,
              int64_t pitch_c, bool add) {
  at::native::cpublas::brgemm(m, n, k, pitch_a, n, pitch_c, add, a, b, c, PAIR<T> == 2);
}

}  // namespace promptmux
