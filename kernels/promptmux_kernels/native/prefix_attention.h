// Self-attention of ragged rows behind their prompts: the encoder, and the decoder over a whole prefix.
//
// Work is divided by head, and a head's blocks by position before row: all rows of one picture size read the same bias
// rows, which then come from cache for every row but the first.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "attend.h"
#include "bias.h"
#include "prompts.h"

namespace promptmux {

struct RowSpan {
  int64_t start, length, prompt, table;
  int64_t packed_prompt, packed_own;  // first key of each in the packed buffers of one head
};

template <typename T, typename B>
class PrefixAttention {
 public:
  PrefixAttention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, PromptPages<T> prompts,
                  std::vector<RowSpan> rows, std::vector<BiasTable<B>> tables, const float* head_scale, float scale,
                  bool causal, at::Tensor& out, at::Tensor& lse)
      : q_(q), k_(k), v_(v), prompts_(prompts), rows_(std::move(rows)), tables_(std::move(tables)),
        head_scale_(head_scale), scale_(scale), causal_(causal), out_(out), lse_(lse),
        heads_(q.size(1)), dim_(q.size(2)) {
    for (auto& row : rows_) {
      row.packed_prompt = packed_;
      row.packed_own = packed_ + filled(row.prompt);
      packed_ = row.packed_own + filled(row.length);
      blocks_ = std::max(blocks_, (row.length + QUERIES - 1) / QUERIES);
    }
  }

  // Every head once; with more threads than heads, each head's blocks in several parts, which pack its keys again.
  void run() const {
    const int64_t threads = at::get_num_threads();
    const int64_t parts = std::clamp<int64_t>((2 * threads + heads_ - 1) / heads_, 1, std::max<int64_t>(blocks_, 1));
    at::parallel_for(0, heads_ * parts, 1, [&](int64_t begin, int64_t end) {
      auto& work = Workspace<T>::mine();
      int64_t packed_head = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / parts;
        if (head != packed_head) pack_head(head, work);
        packed_head = head;
        for (int64_t block = task % parts; block < blocks_; block += parts)
          for (size_t row = 0; row < rows_.size(); ++row)
            if (block * QUERIES < rows_[row].length) attend_block(row, head, block * QUERIES, work);
      }
      at::native::cpublas::brgemm_release(PAIR<T> == 2);
    });
  }

 private:
  void pack_head(int64_t head, Workspace<T>& work) const {
    Operand<T>* keys = work.keys.of(packed_ * dim_);
    Operand<T>* values = work.values.of(packed_ * dim_);
    const T* k = k_.const_data_ptr<T>() + head * k_.stride(1);
    const T* v = v_.const_data_ptr<T>() + head * v_.stride(1);
    for (size_t r = 0; r < rows_.size(); ++r) {
      const auto& row = rows_[r];
      const auto prompt_key = [&](int64_t j) { return prompts_.key + prompts_.offset(r, head, j); };
      const auto prompt_value = [&](int64_t j) { return prompts_.value + prompts_.offset(r, head, j); };
      const auto own_key = [&](int64_t j) { return k + (row.start + j) * k_.stride(0); };
      const auto own_value = [&](int64_t j) { return v + (row.start + j) * v_.stride(0); };
      pack_keys<T>(prompt_key, row.prompt, dim_, keys + row.packed_prompt * dim_);
      pack_values<T>(prompt_value, row.prompt, dim_, values + row.packed_prompt * dim_);
      pack_keys<T>(own_key, row.length, dim_, keys + row.packed_own * dim_);
      pack_values<T>(own_value, row.length, dim_, values + row.packed_own * dim_);
    }
  }

  void attend_block(size_t r, int64_t head, int64_t begin, Workspace<T>& work) const {
    const auto& row = rows_[r];
    const auto& table = tables_[row.table];
    const Operand<T>* keys = work.keys.of(0);
    const Operand<T>* values = work.values.of(0);
    const auto packed = [&](int64_t key) { return key * dim_; };
    Span<T, B> prompt{keys + packed(row.packed_prompt), values + packed(row.packed_prompt), row.prompt};
    Span<T, B> own{keys + packed(row.packed_own), values + packed(row.packed_own), row.length};
    own.bias = table.row(head, begin);
    own.bias_pitch = table.pitch;
    own.causal_from = causal_ ? begin : -1;
    const int64_t count = std::min(QUERIES, row.length - begin), token = row.start + begin;
    const T* q = q_.const_data_ptr<T>() + token * q_.stride(0) + head * q_.stride(1);
    attend<T, B>(take_queries(q, q_.stride(0), count, dim_, work), count, dim_, {prompt, own}, scale_,
                 head_scale_[head], out_.data_ptr<T>() + (token * heads_ + head) * dim_, heads_ * dim_,
                 lse_.data_ptr<float>() + token * heads_ + head, heads_, work);
  }

  const at::Tensor &q_, &k_, &v_;  // (T, H, D), any token and head strides
  PromptPages<T> prompts_;
  std::vector<RowSpan> rows_;
  std::vector<BiasTable<B>> tables_;
  const float* head_scale_;
  float scale_;
  bool causal_;
  at::Tensor &out_, &lse_;  // (T, H, D) and (T, H), contiguous
  int64_t heads_, dim_, packed_ = 0, blocks_ = 0;
};

}  // namespace promptmux
