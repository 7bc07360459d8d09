// One step of self-attention: one query per beam over its request's prompt and its own ancestors.
//
// Keys are read where they lie, prompts in their pages and tokens in their cache slots: at one query per key a copy into
// packed form would cost as much as the products. Beams of a request follow one another, so their prompt is read from
// memory once and from L1 by the other beams.
#pragma once

#include <ATen/Parallel.h>

#include "attend.h"
#include "prompts.h"

namespace promptmux {

struct DecodeGroup {
  int64_t query, beams;   // flat axis of q and history
  int64_t prompt, steps;  // prompt length; own tokens, the new one included
};

// q . k, where q is float32 and scaled already.
template <typename T>
float score(const float* q, const T* key, int64_t dim) {
  Vec total = splat(0.f);
  for (int64_t d = 0; d < dim; d += WIDTH) total = total + load(q + d) * load(key + d);
  return sum(total);
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
        for (int64_t beam = 0; beam < groups_[task / heads_].beams; ++beam)
          attend_beam(task / heads_, task % heads_, beam, work);
    });
  }

 private:
  void attend_beam(int64_t g, int64_t head, int64_t beam, Workspace<T>& work) const {
    const auto& group = groups_[g];
    const int64_t row = group.query + beam, keys = group.prompt + group.steps;
    const int64_t* slots = history_.const_data_ptr<int64_t>() + row * history_.stride(0);
    const float* bias = bias_.const_data_ptr<float>() + head * bias_.stride(0) + (group.steps - 1) * bias_.stride(1);
    const auto cached = [&](int64_t j) { return slots[j] * cache_key_.stride(0) + head * dim_; };
    float* scores = work.scores.of(filled(keys));
    float* query = work.sums.of(QUERIES * dim_);
    const T* q = q_.const_data_ptr<T>() + row * q_.stride(0) + head * q_.stride(1);
    for (int64_t d = 0; d < dim_; d += WIDTH) store(query + d, load(q + d) * splat(scale_));

    for (int64_t j = 0; j < group.prompt; ++j)
      scores[j] = score(query, prompts_.key + prompts_.offset(g, head, j), dim_);
    for (int64_t j = 0; j < group.steps; ++j)
      scores[group.prompt + j] = score(query, cache_key_.const_data_ptr<T>() + cached(j), dim_) + bias[j];

    float top = -INFINITE;
    for (int64_t j = 0; j < keys; ++j) top = std::max(top, scores[j]);
    const Vec total = weigh(scores, scores, keys, filled(keys), splat(top), splat(0.f));

    const Vec factor = splat(head_scale_[head] / sum(total));
    T* out = out_.data_ptr<T>() + (row * heads_ + head) * dim_;
    for (int64_t d = 0; d < dim_; d += WIDTH) {
      Vec even = splat(0.f), odd = splat(0.f);  // two chains: an FMA takes four cycles, two can start in each
      const auto add = [&](int64_t j, const T* value) {
        Vec& chain = j % 2 ? odd : even;
        chain = chain + splat(scores[j]) * load(value + d);
      };
      for (int64_t j = 0; j < group.prompt; ++j) add(j, prompts_.value + prompts_.offset(g, head, j));
      for (int64_t j = 0; j < group.steps; ++j)
        add(group.prompt + j, cache_value_.const_data_ptr<T>() + cached(j));
      store(out + d, (even + odd) * factor);
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
