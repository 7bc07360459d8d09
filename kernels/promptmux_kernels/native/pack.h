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

// WIDTH vectors' worth of a row as products read it: pairs of bfloat16 travel as one 32-bit lane, the rest as float32.
template <typename T>
Vec load_pairs(const T* p) {
  if constexpr (PAIR<T> == 2) return load(reinterpret_cast<const float*>(p));
  else return load(p);
}

// `row(j)` points at the D elements of key j, D a multiple of 16; `out` holds filled(count) * D elements.
//
// A packed block is the transpose of its keys in units of 32 bits, made WIDTH by WIDTH in registers: element by element it
// took as long as a fifth of the encoder's products.
template <typename T, typename RowOf>
void pack_keys(RowOf row, int64_t count, int64_t dim, Operand<T>* out) {
  const int64_t units = dim / PAIR<T>;  // of a row
  for (int64_t begin = 0; begin < filled(count); begin += BLOCK) {
    const int64_t width = std::min(BLOCK, filled(count) - begin);
    float* block = reinterpret_cast<float*>(out + begin * dim);
    for (int64_t j = 0; j < width; j += WIDTH)
      for (int64_t u = 0; u < units; u += WIDTH) {
        const int64_t used = std::min(WIDTH, units - u);
        Vec lanes[WIDTH];
        for (int64_t i = 0; i < WIDTH; ++i) {
          const int64_t key = begin + j + i;
          if (key >= count) lanes[i] = splat(0.f);
          else if (used == WIDTH) lanes[i] = load_pairs(row(key) + u * PAIR<T>);
          else lanes[i] = load_first(reinterpret_cast<const float*>(row(key)) + u, used);
        }
        transpose(lanes);
        for (int64_t i = 0; i < used; ++i) store(block + (u + i) * width + j, lanes[i]);
      }
  }
}

template <typename T, typename RowOf>
void pack_values(RowOf row, int64_t count, int64_t dim, Operand<T>* out) {
  for (int64_t j = 0; j < filled(count); j += PAIR<T>) {
    Operand<T>* target = out + j * dim;
    for (int64_t d = 0; d < dim; d += WIDTH) {
      const Vec first = j < count ? load(row(j) + d) : splat(0.f);
      if constexpr (PAIR<T> == 2) {
        const Vec second = j + 1 < count ? load(row(j + 1) + d) : splat(0.f);
        store_pairs(target + d * 2, first, second);
      } else {
        store(target + d, first);
      }
    }
  }
}

// c (m, n) = a (m, k) times packed b (k, n), or += where `add`; pitches are elements from row to row.
template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, const Operand<T>* a, int64_t pitch_a, const Operand<T>* b, float* c,
              int64_t pitch_c, bool add) {
  at::native::cpublas::brgemm(m, n, k, pitch_a, n, pitch_c, add, a, b, c, PAIR<T> == 2);
}

}  // namespace promptmux
