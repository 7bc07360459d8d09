// The best next tokens of a search's rows over a vocabulary: two passes over the logits, none of which writes.
//
// Rows are independent; of equal scores the lower place comes first.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "simd.h"

namespace promptmux {

// log(sum(exp(row))) of `count` logits; NaN and +Inf among them give NaN.
inline float log_normaliser(const float* logits, int64_t count) {
  const int64_t whole = count / WIDTH * WIDTH;
  Vec top = splat(-INFINITE);
  for (int64_t i = 0; i < whole; i += WIDTH) top = max(top, load(logits + i));
  float highest_logit = highest(top);
  for (int64_t i = whole; i < count; ++i) highest_logit = std::max(highest_logit, logits[i]);
  Vec total = splat(0.f);
  for (int64_t i = 0; i < whole; i += WIDTH) total = total + exp(load(logits + i) - splat(highest_logit));
  float all = sum(total);
  for (int64_t i = whole; i < count; ++i) all += std::exp(logits[i] - highest_logit);
  return highest_logit + std::log(all);
}

using Found = std::pair<float, int64_t>;  // score, place

inline bool better(const Found& a, const Found& b) { return a.first > b.first || (a.first == b.first && a.second < b.second); }

// The best `wanted` of a row's scores (logit - normaliser) + before, best first; places begin at `place`.
inline std::vector<Found> best_of_row(const float* logits, int64_t count, float normaliser, float before, int64_t wanted,
                                      int64_t place) {
  std::vector<Found> best;
  const auto offer = [&](int64_t i) {
    const Found found{(logits[i] - normaliser) + before, place + i};
    if (static_cast<int64_t>(best.size()) == wanted) {
      if (!better(found, best.back())) return;
      best.pop_back();
    }
    best.insert(std::upper_bound(best.begin(), best.end(), found, better), found);
  };
  int64_t i = 0;
  for (; i < std::min(count, wanted); ++i) offer(i);
  for (; i + WIDTH <= count; i += WIDTH) {
    const Vec score = (load(logits + i) - splat(normaliser)) + splat(before);
    if (any_above(score, splat(best.back().first)))
      for (int64_t j = 0; j < WIDTH; ++j) offer(i + j);
  }
  for (; i < count; ++i) offer(i);
  return best;
}

inline void log_normalisers(const at::Tensor& logits, at::Tensor& out) {
  const int64_t count = logits.size(1);
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      out.data_ptr<float>()[r] = log_normaliser(logits.const_data_ptr<float>() + r * logits.stride(0), count);
  });
}

// The best of all rows together, to scores (wanted) and places (wanted), where place = row * V + token.
inline void top_tokens(const at::Tensor& logits, const at::Tensor& normalisers, const at::Tensor& before,
                       at::Tensor& scores, at::Tensor& places) {
  const int64_t rows = logits.size(0), count = logits.size(1), wanted = scores.size(0);
  std::vector<std::vector<Found>> best(rows);
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      best[r] = best_of_row(logits.const_data_ptr<float>() + r * logits.stride(0), count,
                            normalisers.const_data_ptr<float>()[r], before.const_data_ptr<float>()[r], wanted, r * count);
  });
  std::vector<Found> all;
  for (const auto& row : best) all.insert(all.end(), row.begin(), row.end());
  std::sort(all.begin(), all.end(), better);
  for (int64_t i = 0; i < wanted; ++i) {
    scores.data_ptr<float>()[i] = all[i].first;
    places.data_ptr<int64_t>()[i] = all[i].second;
  }
}

}  // namespace promptmux
