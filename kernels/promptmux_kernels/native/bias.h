// Bias tables shared by many rows, (H, Q, K) each; rows of a table may be padded, their elements may not.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace promptmux {

template <typename B>
struct BiasTable {
  const B* data;
  int64_t head_stride, pitch;

  const B* row(int64_t head, int64_t query) const { return data + head * head_stride + query * pitch; }
};

template <typename B>
std::vector<BiasTable<B>> bias_tables(const std::vector<at::Tensor>& tables) {
  std::vector<BiasTable<B>> out;
  for (const auto& table : tables) {
    TORCH_CHECK(table.stride(2) == 1, "a bias row's elements must be adjacent");
    out.push_back({table.const_data_ptr<B>(), table.stride(0), table.stride(1)});
  }
  return out;
}

}  // namespace promptmux
