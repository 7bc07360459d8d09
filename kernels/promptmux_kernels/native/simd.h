// Vectors of float, eight wide on AVX2 and sixteen on AVX-512, and how 16-bit numbers enter and leave them.
//
// The rest of the code is written once in these terms; + - * are the compiler's own, contracted to FMA. Owns no loops.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

namespace promptmux {

using c10::BFloat16;
using c10::Half;

constexpr float INFINITE = std::numeric_limits<float>::infinity();

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int64_t WIDTH = 16;

inline Vec splat(float x) { return _mm512_set1_ps(x); }
// Return the second operand when one is NaN: pass the value that may be NaN second, to keep it.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
inline float highest(Vec x) { return _mm512_reduce_max_ps(x); }
inline bool any_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
// The first `count` lanes of x, and `other` in the rest.
inline Vec first(int64_t count, Vec x, Vec other) { return _mm512_mask_mov_ps(other, (1u << count) - 1, x); }

// 2^n times x, for whole n.
inline Vec scale_by_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
// Lane j of rows[i] changes places with lane i of rows[j].
inline void transpose(Vec (&rows)[WIDTH]) {
  Vec t[WIDTH];
  for (int64_t i = 0; i < WIDTH; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  const auto low = [](Vec a, Vec b) { return (Vec)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); };
  const auto high = [](Vec a, Vec b) { return (Vec)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); };
  for (int64_t i = 0; i < WIDTH; i += 4) {
    rows[i] = low(t[i], t[i + 2]);
    rows[i + 1] = high(t[i], t[i + 2]);
    rows[i + 2] = low(t[i + 1], t[i + 3]);
    rows[i + 3] = high(t[i + 1], t[i + 3]);
  }
  // Each row now holds four columns of four rows, a column in each quarter.
  for (int64_t i = 0; i < 4; ++i) {
    const Vec a = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88), b = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    const Vec c = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    const Vec d = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
    t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  for (int64_t i = 0; i < WIDTH; ++i) rows[i] = t[i];
}
// Lane i of the result is the sum of rows[i]: a third of the shuffles that as many single sums take.
inline Vec sums(const Vec (&rows)[WIDTH]) {
  Vec four[4];  // of each, quarter q holds parts of the sums of four rows
  for (int64_t i = 0; i < 4; ++i) {
    const Vec* r = rows + 4 * i;
    const Vec a = _mm512_unpacklo_ps(r[0], r[1]) + _mm512_unpackhi_ps(r[0], r[1]);
    const Vec b = _mm512_unpacklo_ps(r[2], r[3]) + _mm512_unpackhi_ps(r[2], r[3]);
    four[i] = (Vec)_mm512_unpacklo_pd((__m512d)a, (__m512d)b) + (Vec)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
  }
  const Vec a = _mm512_shuffle_f32x4(four[0], four[1], 0x88) + _mm512_shuffle_f32x4(four[0], four[1], 0xdd);
  const Vec b = _mm512_shuffle_f32x4(four[2], four[3], 0x88) + _mm512_shuffle_f32x4(four[2], four[3], 0xdd);
  return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
}

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store(BFloat16* p, Vec x) {
#if defined(__AVX512BF16__)
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i wide = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(wide, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(wide, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(rounded, 16);
  const __m256i bits = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7fc0)));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
// Two vectors that came from bfloat16, element beside element.
inline void store_pairs(BFloat16* p, Vec even, Vec odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  _mm512_storeu_si512(p, _mm512_mask_mov_epi16(low, 0xaaaaaaaau, _mm512_castps_si512(odd)));
}
#if defined(__AVX512BF16__)
// As `store_pairs`, of any two vectors, which are rounded.
inline void round_pairs(BFloat16* p, Vec even, Vec odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

#else

using Vec = __m256;
constexpr int64_t WIDTH = 8;

inline Vec splat(float x) { return _mm256_set1_ps(x); }
// Return the second operand when one is NaN: pass the value that may be NaN second, to keep it.
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline float sum(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float highest(Vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline bool any_above(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
inline Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// The first `count` lanes of x, and `other` in the rest.
inline Vec first(int64_t count, Vec x, Vec other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i kept = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(kept));
}

// 2^n times x, for whole n from -126 to 127.
inline Vec scale_by_power(Vec x, Vec n) { return x * power_of_two(n); }
// Lane j of rows[i] changes places with lane i of rows[j].
inline void transpose(Vec (&rows)[WIDTH]) {
  Vec t[WIDTH];
  for (int64_t i = 0; i < WIDTH; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int64_t i = 0; i < WIDTH; i += 4) {
    rows[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    rows[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    rows[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    rows[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int64_t i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
  }
  for (int64_t i = 0; i < WIDTH; ++i) rows[i] = t[i];
}
// Lane i of the result is the sum of rows[i]: a third of the shuffles that as many single sums take.
inline Vec sums(const Vec (&rows)[WIDTH]) {
  Vec four[2];  // of each, either half holds parts of the sums of four rows
  for (int64_t i = 0; i < 2; ++i) {
    const Vec* r = rows + 4 * i;
    const Vec a = _mm256_unpacklo_ps(r[0], r[1]) + _mm256_unpackhi_ps(r[0], r[1]);
    const Vec b = _mm256_unpacklo_ps(r[2], r[3]) + _mm256_unpackhi_ps(r[2], r[3]);
    four[i] = _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xee);
  }
  return _mm256_permute2f128_ps(four[0], four[1], 0x20) + _mm256_permute2f128_ps(four[0], four[1], 0x31);
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline void store(BFloat16* p, Vec x) {
  const __m256i wide = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(wide, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(wide, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m128i bits = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}

#endif

// As `load`, of an array that ends after `count` elements; the other lanes are zero.
template <typename T>
inline Vec load_first(const T* p, int64_t count) {
  alignas(64) T lanes[WIDTH] = {};
  std::memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

// e^x for x <= 88, to 2 ulp (Cephes' polynomial); below -87.3 the smallest normal number; NaN stays NaN.
inline Vec exp(Vec x) {
  x = max(splat(-87.33654f), x);
  const Vec n = nearest(x * splat(1.44269504088896341f));
  const Vec r = x - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  return (p * r * r + r + splat(1.0f)) * power_of_two(n);
}

// e^x for -87 < x <= 88, to 3e-6 of it (a polynomial of 2^f fitted for that): for results that bfloat16 rounds to 4e-3
// anyway, at half the operations. NaN stays NaN; below -87 as `exp`.
inline Vec rough_exp(Vec x) {
  const Vec t = max(splat(-87.33654f), x) * splat(1.44269504088896341f);
  const Vec n = nearest(t), f = t - n;
  Vec p = splat(9.5701e-3f);
  p = p * f + splat(5.591786e-2f);
  p = p * f + splat(0.24024744f);
  p = p * f + splat(0.6931218f);
  return scale_by_power(p * f + splat(0.9999993f), n);
}

}  // namespace promptmux
