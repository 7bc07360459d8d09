// The ops of `promptmux_kernels.dispatch` as PyTorch operators of the library `promptmux_cpu`.
//
// Owns how tensors and lists become the structures of the headers, and the choice of element types; cpu.py checks
// shapes and sends here only what the headers can do.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "attention_backward.h"
#include "cross_attention.h"
#include "decode_attention.h"
#include "few_rows.h"
#include "norm_gradients.h"
#include "norms.h"
#include "prefix_attention.h"
#include "top_tokens.h"
#include "wide_product.h"

namespace promptmux {
namespace {

using at::IntArrayRef;
using at::Tensor;

// Call f with a value of the element type of `tensor`: float32 or one 16-bit type.
template <typename Sixteen, typename F>
auto by_type(const Tensor& tensor, F f) {
  return tensor.scalar_type() == at::kFloat ? f(float{}) : f(Sixteen{});
}

std::tuple<Tensor, Tensor> prefix_attention_op(const Tensor& q, const Tensor& k, const Tensor& v, IntArrayRef starts,
                                               IntArrayRef lengths, const Tensor& prompt_key,
                                               const Tensor& prompt_value, const Tensor& prompt_table,
                                               IntArrayRef prompt_lengths, const std::vector<Tensor>& tables,
                                               IntArrayRef table_of_row, double scale, const Tensor& head_scale,
                                               bool causal) {
  Tensor out = at::zeros(q.sizes(), q.options());
  Tensor lse = at::zeros({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
  std::vector<RowSpan> rows;
  for (size_t r = 0; r < starts.size(); ++r)
    rows.push_back({starts[r], lengths[r], prompt_lengths[r], table_of_row[r], 0, 0});
  by_type<BFloat16>(q, [&](auto element) {
    using T = decltype(element);
    by_type<Half>(tables[0], [&](auto number) {
      using B = decltype(number);
      PrefixAttention<T, B>(q, k, v, {prompt_key, prompt_value, prompt_table}, rows, bias_tables<B>(tables),
                            head_scale.const_data_ptr<float>(), static_cast<float>(scale), causal, out, lse)
          .run();
    });
  });
  return {out, lse};
}

Tensor prefix_decode_attention_op(const Tensor& q, IntArrayRef starts, IntArrayRef beams, const Tensor& prompt_key,
                                  const Tensor& prompt_value, const Tensor& prompt_table, IntArrayRef prompt_lengths,
                                  const Tensor& cache_key, const Tensor& cache_value, const Tensor& history,
                                  IntArrayRef steps, const Tensor& bias, double scale, const Tensor& head_scale) {
  Tensor out = at::zeros(q.sizes(), q.options());
  std::vector<DecodeGroup> groups;
  for (size_t g = 0; g < starts.size(); ++g) groups.push_back({starts[g], beams[g], prompt_lengths[g], steps[g]});
  by_type<BFloat16>(q, [&](auto element) {
    using T = decltype(element);
    DecodeAttention<T>(q, {prompt_key, prompt_value, prompt_table}, cache_key, cache_value, history, groups, bias,
                       static_cast<float>(scale), head_scale.const_data_ptr<float>(), out)
        .run();
  });
  return out;
}

std::tuple<Tensor, Tensor> pack_memory_op(const Tensor& key, const Tensor& value, IntArrayRef starts,
                                          IntArrayRef lengths, IntArrayRef packed_starts) {
  std::vector<CrossGroup> rows;
  int64_t total = 0;
  for (size_t r = 0; r < starts.size(); ++r) {
    rows.push_back({starts[r], 0, packed_starts[r], lengths[r], 0, 0});
    total = std::max(total, packed_starts[r] + filled(lengths[r]));
  }
  return by_type<BFloat16>(key, [&](auto element) {
    using T = decltype(element);
    const auto options = key.options().dtype(c10::CppTypeToScalarType<Operand<T>>::value);
    Tensor keys = at::empty({total, key.size(1), key.size(2)}, options), values = at::empty_like(keys);
    pack_memory<T>(key, value, rows, keys, values);
    return std::make_tuple(keys, values);
  });
}

std::tuple<Tensor, Tensor> cross_attention_op(const Tensor& q, IntArrayRef starts, IntArrayRef counts,
                                              const Tensor& keys, const Tensor& values, IntArrayRef memory_starts,
                                              IntArrayRef memory_lengths, const std::vector<Tensor>& tables,
                                              IntArrayRef table_of_row, IntArrayRef first_positions, bool consecutive,
                                              double scale, const Tensor& head_scale) {
  Tensor out = at::zeros(q.sizes(), q.options());
  Tensor lse = at::zeros({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
  std::vector<CrossGroup> groups;
  for (size_t g = 0; g < starts.size(); ++g)
    groups.push_back(
        {starts[g], counts[g], memory_starts[g], memory_lengths[g], table_of_row[g], first_positions[g]});
  by_type<BFloat16>(q, [&](auto element) {
    using T = decltype(element);
    by_type<Half>(tables[0], [&](auto number) {
      using B = decltype(number);
      cross_attention<T, B>(q, groups, keys, values, bias_tables<B>(tables), consecutive, static_cast<float>(scale),
                            head_scale.const_data_ptr<float>(), out, lse);
    });
  });
  return {out, lse};
}

std::vector<Tensor> attention_backward_op(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& out, const Tensor& lse, IntArrayRef starts,
                                          IntArrayRef lengths, IntArrayRef key_starts, IntArrayRef key_lengths,
                                          const Tensor& prompt_key, const Tensor& prompt_value,
                                          const Tensor& prompt_table, IntArrayRef prompt_lengths,
                                          const std::vector<Tensor>& tables, IntArrayRef table_of_row,
                                          IntArrayRef first_positions, double scale, const Tensor& head_scale,
                                          bool causal, bool queries, bool keys, bool prompts) {
  std::vector<GradientRow> rows;
  for (size_t r = 0; r < starts.size(); ++r)
    rows.push_back({starts[r], lengths[r], key_starts[r], key_lengths[r], table_of_row[r], first_positions[r],
                    prompt_lengths[r], 0});
  return by_type<BFloat16>(q, [&](auto element) {
    using T = decltype(element);
    return by_type<Half>(tables[0], [&](auto number) {
      using B = decltype(number);
      return AttentionBackward<T, B>(grad, q, k, v, out, lse, {prompt_key, prompt_value, prompt_table},
                                     prompt_key.size(0), rows, bias_tables<B>(tables),
                                     head_scale.const_data_ptr<float>(), static_cast<float>(scale), causal,
                                     {queries, keys, prompts})
          .run();
    });
  });
}

void write_cache_op(Tensor cache_key, Tensor cache_value, const Tensor& slots, const Tensor& key,
                    const Tensor& value) {
  const int64_t bytes = key.size(1) * key.size(2) * key.element_size();
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const auto copy = [&](Tensor& cache, const Tensor& rows) {
    auto* to = static_cast<char*>(cache.data_ptr());
    const auto* from = static_cast<const char*>(rows.const_data_ptr());
    for (int64_t i = 0; i < slots.numel(); ++i) {
      TORCH_CHECK_INDEX(slot[i] >= 0 && slot[i] < cache.size(0), "cache slot out of range");
      std::memcpy(to + slot[i] * bytes, from + i * rows.stride(0) * rows.element_size(), bytes);
    }
  };
  copy(cache_key, key);
  copy(cache_value, value);
}

Tensor gelu_norm_op(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  Tensor out = at::empty(x.sizes(), x.options());
  by_type<BFloat16>(x, [&](auto element) {
    using T = decltype(element);
    gelu_norm<T>(x, weight.const_data_ptr<T>(), bias.const_data_ptr<T>(), static_cast<float>(eps), out);
  });
  return out;
}

Tensor gelu_norm_gradient_op(const Tensor& x, const Tensor& weight, double eps, const Tensor& out_gradient) {
  Tensor x_gradient = at::empty(x.sizes(), x.options());
  by_type<BFloat16>(x, [&](auto element) {
    using T = decltype(element);
    gelu_norm_gradient<T>(x, weight.const_data_ptr<T>(), static_cast<float>(eps), out_gradient, x_gradient);
  });
  return x_gradient;
}

Tensor few_rows_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual) {
  Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  const auto start = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; };
  few_rows(x, weight, start(bias), start(residual), out);
  return out;
}

Tensor pack_weight_op(const Tensor& weight) {
  return by_type<BFloat16>(weight, [&](auto element) {
    using T = decltype(element);
    Tensor packed = at::empty({filled(weight.size(0)), weight.size(1)},
                              weight.options().dtype(c10::CppTypeToScalarType<Operand<T>>::value));
    pack_weight<T>(weight, packed);
    return packed;
  });
}

Tensor wide_product_op(const Tensor& x, const Tensor& packed, int64_t neurons) {
  Tensor out = at::empty({round_up(x.size(0), 8), neurons}, x.options().dtype(at::kFloat));
  by_type<BFloat16>(x, [&](auto element) { wide_product<decltype(element)>(x, packed, out); });
  return out.slice(0, 0, x.size(0));
}

Tensor log_normalisers_op(const Tensor& logits) {
  Tensor out = at::empty({logits.size(0)}, logits.options());
  log_normalisers(logits, out);
  return out;
}

std::tuple<Tensor, Tensor> top_tokens_op(const Tensor& logits, const Tensor& normalisers, const Tensor& before,
                                         int64_t count) {
  TORCH_CHECK(count <= logits.numel(), "there are fewer logits than wanted");
  Tensor scores = at::empty({count}, logits.options()), places = at::empty({count}, logits.options().dtype(at::kLong));
  top_tokens(logits, normalisers, before, scores, places);
  return {scores, places};
}

}  // namespace

TORCH_LIBRARY(promptmux_cpu, library) {
  library.def(
      "prefix_attention(Tensor q, Tensor k, Tensor v, int[] starts, int[] lengths, Tensor prompt_key, "
      "Tensor prompt_value, Tensor prompt_table, int[] prompt_lengths, Tensor[] tables, int[] table_of_row, "
      "float scale, Tensor head_scale, bool causal) -> (Tensor, Tensor)");
  library.def(
      "prefix_decode_attention(Tensor q, int[] starts, int[] beams, Tensor prompt_key, Tensor prompt_value, "
      "Tensor prompt_table, int[] prompt_lengths, Tensor cache_key, Tensor cache_value, Tensor history, int[] steps, "
      "Tensor bias, float scale, Tensor head_scale) -> Tensor");
  library.def(
      "pack_memory(Tensor key, Tensor value, int[] starts, int[] lengths, int[] packed_starts) -> (Tensor, Tensor)");
  library.def(
      "cross_attention(Tensor q, int[] starts, int[] counts, Tensor keys, Tensor values, int[] memory_starts, "
      "int[] memory_lengths, Tensor[] tables, int[] table_of_row, int[] first_positions, bool consecutive, "
      "float scale, Tensor head_scale) -> (Tensor, Tensor)");
  library.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] starts, "
      "int[] lengths, int[] key_starts, int[] key_lengths, Tensor prompt_key, Tensor prompt_value, "
      "Tensor prompt_table, int[] prompt_lengths, Tensor[] tables, int[] table_of_row, int[] first_positions, "
      "float scale, Tensor head_scale, bool causal, bool queries, bool keys, bool prompts) -> Tensor[]");
  library.def(
      "write_cache(Tensor(a!) cache_key, Tensor(b!) cache_value, Tensor slots, Tensor key, Tensor value) -> ()");
  library.def("gelu_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
  library.def("gelu_norm_gradient(Tensor x, Tensor weight, float eps, Tensor out_gradient) -> Tensor");
  library.def("pack_weight(Tensor weight) -> Tensor");
  library.def("wide_product(Tensor x, Tensor packed, int neurons) -> Tensor");
  library.def("log_normalisers(Tensor logits) -> Tensor");
  library.def("top_tokens(Tensor logits, Tensor normalisers, Tensor before, int count) -> (Tensor, Tensor)");
  library.def("few_rows(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor");
}

TORCH_LIBRARY_IMPL(promptmux_cpu, CPU, library) {
  library.impl("prefix_attention", prefix_attention_op);
  library.impl("prefix_decode_attention", prefix_decode_attention_op);
  library.impl("pack_memory", pack_memory_op);
  library.impl("cross_attention", cross_attention_op);
  library.impl("attention_backward", attention_backward_op);
  library.impl("write_cache", write_cache_op);
  library.impl("gelu_norm", gelu_norm_op);
  library.impl("gelu_norm_gradient", gelu_norm_gradient_op);
  library.impl("pack_weight", pack_weight_op);
  library.impl("wide_product", wide_product_op);
  library.impl("log_normalisers", log_normalisers_op);
  library.impl("top_tokens", top_tokens_op);
  library.impl("few_rows", few_rows_op);
}

}  // namespace promptmux
