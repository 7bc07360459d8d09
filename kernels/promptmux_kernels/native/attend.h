// Exact attention of a block of queries over packed keys: scores, softmax and weighted sum while they lie in cache.
//
// Two passes over a row of scores, no running maximum: a block's scores (64 x 1100 float32 at OFA's longest rows, 280 kB)
// fit a core's L2, and rescaling would cost more than it saves. Knows nothing of batches, pages or heads.
#pragma once

#include <array>
#include <cmath>
#include <memory>

#include "pack.h"

namespace promptmux {

constexpr int64_t QUERIES = 64;  // queries per block; 32 to 128 differ by less than 10 %

// Keys that a block of queries sees, and their bias. Query i of the block reads bias row i * bias_pitch: a pitch of 0
// gives all queries (beams at one position) the same row.
template <typename T, typename B>
struct Span {
  const Operand<T>* keys = nullptr;
  const Operand<T>* values = nullptr;
  int64_t count = 0;
  const B* bias = nullptr;
  int64_t bias_pitch = 0;
  // Where the block's first query stands among these keys, if later keys are hidden from it; else -1.
  int64_t causal_from = -1;

  int64_t visible(int64_t query) const {
    return causal_from < 0 ? count : std::min(count, causal_from + query + 1);
  }
};

// The spans of a block: prompt, then own keys; cross-attention has only the second.
template <typename T, typename B>
using Spans = std::array<Span<T, B>, 2>;

// Memory that a thread keeps between calls: fresh pages would cost a fault each.
template <typename E>
class Buffer {
 public:
  E* of(int64_t size) {
    if (size > size_) {
      data_.reset(new E[size]);
      size_ = size;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<E[]> data_;
  int64_t size_ = 0;
};

template <typename T>
struct Workspace {
  Buffer<float> scores, sums;
  Buffer<Operand<T>> queries, weights, keys, values;

  // One per thread and element type, kept for the thread's life.
  static Workspace& mine() {
    static thread_local Workspace workspace;
    return workspace;
  }
};

// brgemm generates code per shape: few row counts and pitches keep that code small whatever lengths callers send.
inline int64_t block_rows(int64_t queries) { return queries <= 8 ? queries : round_up(queries, 8); }
inline int64_t block_pitch(int64_t keys) { return round_up(keys, 512) + 16; }

// Copy `count` queries (elements `pitch` apart) into the workspace, as products read them, rows filled up with zeros.
template <typename T>
const Operand<T>* take_queries(const T* q, int64_t pitch, int64_t count, int64_t dim, Workspace<T>& work) {
  Operand<T>* out = work.queries.of(QUERIES * dim);
  for (int64_t i = 0; i < block_rows(count); ++i)
    for (int64_t d = 0; d < dim; d += WIDTH)
      store(out + i * dim + d, i < count ? load(q + i * pitch + d) : splat(0.f));
  return out;
}

// scores = scale * scores + bias over a row's visible keys; returns the running maximum.
template <typename B>
Vec finish_scores(float* scores, const B* bias, int64_t visible, float scale, Vec top) {
  const Vec factor = splat(scale);
  int64_t j = 0;
  for (; j + WIDTH <= visible; j += WIDTH) {
    Vec x = load(scores + j) * factor;
    if (bias) x = x + load(bias + j);
    store(scores + j, x);
    top = max(top, x);
  }
  if (const int64_t rest = visible - j; rest > 0) {
    Vec x = load(scores + j) * factor;
    if (bias) x = x + load_first(bias + j, rest);
    store(scores + j, x);
    top = max(top, first(rest, x, splat(-INFINITE)));
  }
  return top;
}

// weights = exp(scores - top) of the visible keys and exactly zero behind them; returns the running sum.
template <typename E>
Vec weigh(const float* scores, E* weights, int64_t visible, int64_t padded, Vec top, Vec total) {
  for (int64_t j = 0; j < padded; j += WIDTH) {
    Vec weight = splat(0.f);
    if (j < visible) {
      const Vec below = load(scores + j) - top;
      if constexpr (std::is_same_v<E, float>) weight = exp(below);
      else weight = rough_exp(below);
      if (j + WIDTH > visible) weight = first(visible - j, weight, splat(0.f));
      total = total + weight;
    }
    store(weights + j, weight);
  }
  return total;
}

// out[i] = head_scale * softmax(scale * q K^T + bias) V for `count` queries; out is `out_pitch` elements from query to
// query. lse[i * lse_pitch] = log of the sum of exponentials, if lse is given.
template <typename T, typename B>
void attend(const Operand<T>* q, int64_t count, int64_t dim, const Spans<T, B>& spans, float scale, float head_scale,
            T* out, int64_t out_pitch, float* lse, int64_t lse_pitch, Workspace<T>& work) {
  const int64_t rows = block_rows(count);
  const int64_t pitch = block_pitch(filled(spans[0].count) + filled(spans[1].count));
  float* scores = work.scores.of(QUERIES * pitch);
  Operand<T>* weights;  // float32 weights replace their scores in place
  if constexpr (std::is_same_v<Operand<T>, float>) weights = scores;
  else weights = work.weights.of(QUERIES * pitch);
  float* sums = work.sums.of(QUERIES * dim);

  int64_t offset = 0;
  for (const auto& span : spans) {
    for (int64_t j = 0; j < filled(span.count); j += BLOCK) {
      const int64_t width = std::min(BLOCK, filled(span.count) - j);
      multiply<T>(rows, width, dim, q, dim, span.keys + j * dim, scores + offset + j, pitch, false);
    }
    offset += filled(span.count);
  }

  float totals[QUERIES];
  for (int64_t i = 0; i < count; ++i) {
    float* row = scores + i * pitch;
    Vec highest_score = splat(-INFINITE);
    int64_t at = 0;
    for (const auto& span : spans) {
      const B* bias = span.bias ? span.bias + i * span.bias_pitch : nullptr;
      highest_score = finish_scores(row + at, bias, span.visible(i), scale, highest_score);
      at += filled(span.count);
    }
    const float top = highest(highest_score);
    Vec total = splat(0.f);
    at = 0;
    for (const auto& span : spans) {
      total = weigh(row + at, weights + i * pitch + at, span.visible(i), filled(span.count), splat(top), total);
      at += filled(span.count);
    }
    totals[i] = sum(total);
    if (lse) lse[i * lse_pitch] = top + std::log(totals[i]);
  }

  constexpr int64_t step = 4 * BLOCK;
  bool add = false;
  offset = 0;
  for (const auto& span : spans) {
    for (int64_t j = 0; j < filled(span.count); j += step) {
      const int64_t depth = std::min(step, filled(span.count) - j);
      multiply<T>(rows, dim, depth, weights + offset + j, pitch, span.values + j * dim, sums, dim, add);
      add = true;
    }
    offset += filled(span.count);
  }

  for (int64_t i = 0; i < count; ++i) {
    const Vec factor = splat(head_scale / totals[i]);
    for (int64_t d = 0; d < dim; d += WIDTH) store(out + i * out_pitch + d, load(sums + i * dim + d) * factor);
  }
}

}  // namespace promptmux
