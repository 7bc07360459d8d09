// One step of self-attention: one query per beam over its request's prompt and its own ancestors.
//
// Keys are read where they lie, prompts in their pages and tokens in their cache slots: at one query per key a copy into
// packed form would cost as much as the products. Beams of a request meet each prompt key while it is in registers.
#pragma once

#include <ATen/Parallel.h>

#include "attend.h"
#include "prompts.h"

namespace promptmux {

constexpr int64_t BEAMS = 5;  // queries at once: OFA's searches keep five beams, and their sums just fit the registers

struct DecodeGroup {
  int64_t query, beams;   // flat axis of q and history
  int64_t prompt, steps;  // prompt length; own tokens, the new one included
};

// scores[b * pitch + j] = query b . key j for COUNT queries (float32, `dim` apart); filled(keys) scores are written.
template <int64_t COUNT, typename KeyOf>
void score_keys(const float* queries, int64_t dim, int64_t keys, KeyOf key, float* scores, int64_t pitch) {
  for (int64_t first = 0; first < keys; first += WIDTH) {
    Vec products[COUNT][WIDTH];
    for (int64_t j = 0; j < WIDTH; ++j) {
      Vec totals[COUNT];
      for (Vec& total : totals) total = splat(0.f);
      if (first + j < keys) {
        const auto* source = key(first + j);
        for (int64_t d = 0; d < dim; d += WIDTH) {
          const Vec part = load(source + d);
          for (int64_t b = 0; b < COUNT; ++b) totals[b] = totals[b] + load(queries + b * dim + d) * part;
        }
      }
      for (int64_t b = 0; b < COUNT; ++b) products[b][j] = totals[b];
    }
    for (int64_t b = 0; b < COUNT; ++b) store(scores + b * pitch + first, sums(products[b]));
  }
}

// out[b * dim + d] += weights[b * pitch + j] * value j [d] over all keys, for COUNT queries.
template <int64_t COUNT, typename ValueOf>
void add_values(const float* weights, int64_t pitch, int64_t keys, ValueOf value, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += WIDTH) {
    Vec totals[COUNT];
    for (int64_t b = 0; b < COUNT; ++b) totals[b] = load(out + b * dim + d);
    for (int64_t j = 0; j < keys; ++j) {
      const Vec part = load(value(j) + d);
      for (int64_t b = 0; b < COUNT; ++b) totals[b] = totals[b] + splat(weights[b * pitch + j]) * part;
    }
    for (int64_t b = 0; b < COUNT; ++b) store(out + b * dim + d, totals[b]);
  }
}

template <typename T>
class DecodeAttention {
 public:
  DecodeAttention(const at::Tensor& q, PromptPages<T> prompts, const at::Tensor& cache_key,
                  const at::Tensor& cache_value, const at::Tensor& history, std::vector<DecodeGroup> groups,
                  const at::Tensor& bias, float scale, const float* head_scale, at::Tensor& out)
      : q_(q), prompts_(prompts), cache_key_(cache_key), cache_value_(cache_value), history_(history),
        groups_(std::move(groups)), bias_(bias), scale_(scale), head_scale_(head_scale), out_(out),
        heads_(q.size(1)), dim_(q.size(2)) {}

  void run() const {
    const int64_t count = static_cast<int64_t>(groups_.size());
    at::parallel_for(0, count * heads_, 1, [&](int64_t begin, int64_t end) {
      auto& work = Workspace<T>::mine();
      for (int64_t task = begin; task < end; ++task)
        for (int64_t beam = 0; beam < groups_[task / heads_].beams; beam += BEAMS)
          attend_beams(task / heads_, task % heads_, beam, work);
    });
  }

 private:
  void attend_beams(int64_t g, int64_t head, int64_t beam, Workspace<T>& work) const {
    switch (std::min(BEAMS, groups_[g].beams - beam)) {
      case 1: return attend_some<1>(g, head, beam, work);
      case 2: return attend_some<2>(g, head, beam, work);
      case 3: return attend_some<3>(g, head, beam, work);
      case 4: return attend_some<4>(g, head, beam, work);
      case BEAMS: return attend_some<BEAMS>(g, head, beam, work);
    }
  }

  template <int64_t COUNT>
  void attend_some(int64_t g, int64_t head, int64_t beam, Workspace<T>& work) const {
    const auto& group = groups_[g];
    const int64_t row = group.query + beam, own = filled(group.prompt), pitch = own + filled(group.steps);
    float* queries = work.scores.of(BEAMS * (dim_ + pitch));
    float* scores = queries + BEAMS * dim_;
    float* out = work.sums.of(QUERIES * dim_);
    const float* bias = bias_.const_data_ptr<float>() + head * bias_.stride(0) + (group.steps - 1) * bias_.stride(1);
    const auto prompt_key = [&](int64_t j) { return prompts_.key + prompts_.offset(g, head, j); };
    const auto prompt_value = [&](int64_t j) { return prompts_.value + prompts_.offset(g, head, j); };
    const auto cached = [&](const at::Tensor& cache, int64_t b) {
      const int64_t* slots = history_.const_data_ptr<int64_t>() + (row + b) * history_.stride(0);
      return [=, from = cache.const_data_ptr<T>() + head * dim_, stride = cache.stride(0)](int64_t j) {
        return from + slots[j] * stride;
      };
    };

    for (int64_t b = 0; b < COUNT; ++b) {
      const T* q = q_.const_data_ptr<T>() + (row + b) * q_.stride(0) + head * q_.stride(1);
      for (int64_t d = 0; d < dim_; d += WIDTH) {
        store(queries + b * dim_ + d, load(q + d));
        store(out + b * dim_ + d, splat(0.f));
      }
    }
    score_keys<COUNT>(queries, dim_, group.prompt, prompt_key, scores, pitch);
    float totals[COUNT];
    for (int64_t b = 0; b < COUNT; ++b) {
      float* mine = scores + b * pitch;
      score_keys<1>(queries + b * dim_, dim_, group.steps, cached(cache_key_, b), mine + own, pitch);
      const Vec from_prompt = finish_scores<float>(mine, nullptr, group.prompt, scale_, splat(-INFINITE));
      const Vec top = splat(highest(finish_scores(mine + own, bias, group.steps, scale_, from_prompt)));
      const Vec total = weigh(mine, mine, group.prompt, own, top, splat(0.f));
      totals[b] = sum(weigh(mine + own, mine + own, group.steps, filled(group.steps), top, total));
    }
    add_values<COUNT>(scores, pitch, group.prompt, prompt_value, dim_, out);
    for (int64_t b = 0; b < COUNT; ++b) {
      add_values<1>(scores + b * pitch + own, pitch, group.steps, cached(cache_value_, b), dim_, out + b * dim_);
      const Vec factor = splat(head_scale_[head] / totals[b]);
      T* to = out_.data_ptr<T>() + ((row + b) * heads_ + head) * dim_;
      for (int64_t d = 0; d < dim_; d += WIDTH) store(to + d, load(out + b * dim_ + d) * factor);
    }
  }

  const at::Tensor& q_;  // (R, H, D)
  PromptPages<T> prompts_;
  const at::Tensor &cache_key_, &cache_value_;  // (slots, H, D), equal strides
  const at::Tensor& history_;                   // (R, T)
  std::vector<DecodeGroup> groups_;
  const at::Tensor& bias_;  // (H, T, T) float32
  float scale_;
  const float* head_scale_;
  at::Tensor& out_;  // (R, H, D), contiguous
  int64_t heads_, dim_;
};

}  // namespace promptmux
