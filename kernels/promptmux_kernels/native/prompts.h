// A batch's prompts as the ops receive them: one pool of pages (pages, H, PAGE, D) and the pages that each row reads.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace promptmux {

constexpr int64_t PAGE = 32;  // rows.py PAGE

template <typename T>
struct PromptPages {
  const T* key;
  const T* value;
  const int64_t* table;  // (B, columns)
  int64_t columns, heads, dim;

  PromptPages(const at::Tensor& pool_key, const at::Tensor& pool_value, const at::Tensor& pages)
      : key(pool_key.const_data_ptr<T>()),
        value(pool_value.const_data_ptr<T>()),
        table(pages.const_data_ptr<int64_t>()),
        columns(pages.size(1)),
        heads(pool_key.size(1)),
        dim(pool_key.size(3)) {
    TORCH_CHECK(pool_key.size(2) == PAGE && pool_value.sizes() == pool_key.sizes(), "K and V pages must be alike and hold ", PAGE, " keys");
  }

  // Which page holds prompt position j of a row.
  int64_t page(int64_t row, int64_t j) const { return table[row * columns + j / PAGE]; }

  // Where prompt position j of a row begins in either pool, for one head.
  int64_t offset(int64_t row, int64_t head, int64_t j) const {
    return ((page(row, j) * heads + head) * PAGE + j % PAGE) * dim;
  }
};

}  // namespace promptmux
