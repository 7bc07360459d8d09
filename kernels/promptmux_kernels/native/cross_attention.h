// Cross-attention over keys packed once per request and read at every step by all its beams together.
#pragma once

#include <ATen/Parallel.h>

#include "attend.h"
#include "bias.h"

namespace promptmux {

// Where one group's queries and its packed memory lie.
struct CrossGroup {
  int64_t query, count;       // flat axis of q
  int64_t memory, keys;       // flat axis of the packed memory, which gives each row filled(keys) places
  int64_t table, position;    // bias table, decoder position of the first query
};

// Memory of row r, head h: filled(n) * D elements at (start * H + h * filled(n)) * D.
inline int64_t memory_offset(int64_t start, int64_t keys, int64_t head, int64_t heads, int64_t dim) {
  return (start * heads + head * filled(keys)) * dim;
}

template <typename T>
void pack_memory(const at::Tensor& key, const at::Tensor& value, const std::vector<CrossGroup>& rows, at::Tensor& keys,
                 at::Tensor& values) {
  const int64_t heads = key.size(1), dim = key.size(2), count = static_cast<int64_t>(rows.size());
  at::parallel_for(0, count * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const auto& row = rows[task / heads];
      const int64_t head = task % heads, to = memory_offset(row.memory, row.keys, head, heads, dim);
      const T* k = key.const_data_ptr<T>() + row.query * key.stride(0) + head * key.stride(1);
      const T* v = value.const_data_ptr<T>() + row.query * value.stride(0) + head * value.stride(1);
      const auto key_row = [&](int64_t j) { return k + j * key.stride(0); };
      const auto value_row = [&](int64_t j) { return v + j * value.stride(0); };
      pack_keys<T>(key_row, row.keys, dim, keys.data_ptr<Operand<T>>() + to);
      pack_values<T>(value_row, row.keys, dim, values.data_ptr<Operand<T>>() + to);
    }
  });
}

template <typename T, typename B>
void cross_attention(const at::Tensor& q, const std::vector<CrossGroup>& groups, const at::Tensor& keys,
                     const at::Tensor& values, const std::vector<BiasTable<B>>& tables, bool consecutive, float scale,
                     const float* head_scale, at::Tensor& out, at::Tensor& lse) {
  const int64_t heads = q.size(1), dim = q.size(2), count = static_cast<int64_t>(groups.size());
  at::parallel_for(0, count * heads, 1, [&](int64_t begin, int64_t end) {
    auto& work = Workspace<T>::mine();
    for (int64_t task = begin; task < end; ++task) {
      const auto& group = groups[task / heads];
      const int64_t head = task % heads, from = memory_offset(group.memory, group.keys, head, heads, dim);
      const auto& table = tables[group.table];
      Span<T, B> memory{keys.const_data_ptr<Operand<T>>() + from, values.const_data_ptr<Operand<T>>() + from,
                        group.keys};
      memory.bias_pitch = consecutive ? table.pitch : 0;
      for (int64_t i = 0; i < group.count; i += QUERIES) {
        const int64_t rows = std::min(QUERIES, group.count - i), token = group.query + i;
        memory.bias = table.row(head, group.position + (consecutive ? i : 0));
        const T* query = q.const_data_ptr<T>() + token * q.stride(0) + head * q.stride(1);
        attend<T, B>(take_queries(query, q.stride(0), rows, dim, work), rows, dim, {Span<T, B>{}, memory}, scale,
                     head_scale[head], out.data_ptr<T>() + (token * heads + head) * dim, heads * dim,
                     lse.data_ptr<float>() + token * heads + head, heads, work);
      }
    }
    at::native::cpublas::brgemm_release(PAIR<T> == 2);
  });
}

}  // namespace promptmux
