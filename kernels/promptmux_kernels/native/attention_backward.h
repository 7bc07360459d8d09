// Gradients of attention from what its forward pass kept: inputs, outputs and the log-sum of each query.
//
//     P = exp(scale Q K^T + B - lse)    dP = c dO V^T    dS = P (dP - rowsum(dO out))
//     dQ = scale dS K                   dK = scale dS^T Q           dV = c P^T dO
//
// with c the head's scale. A task is one row's head, and works on 64 keys by 64 queries at a time, so that scores never
// leave the cache. What keys get is summed as its transpose (D, keys): P and dS then enter those products as they lie,
// pairs of queries beside each other, and only D x keys numbers are turned. Biases and the head's scale do not learn here.
//
// Several rows may read one page of a prompt. Each task writes its own part, and the parts are added afterwards in the
// order of the rows: no number depends on how many threads there are.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "attend.h"
#include "bias.h"
#include "prompts.h"

namespace promptmux {

constexpr int64_t BIAS_AHEAD = 16;  // rows of a bias table fetched before their turn

// One row: its queries and the keys of its own that they see, on the flat axes of q and of k and v.
struct GradientRow {
  int64_t query, queries, key, keys;
  int64_t table, position;  // bias table, position of the first query in it
  int64_t prompt;           // length of the prompt before its own keys
  int64_t part;             // where its part of the prompts' gradients begins, in keys
};

// Which gradients are asked for.
struct Wanted {
  bool queries, keys, prompts;
};

// Memory that a thread keeps between calls. `turned` is a block's transpose, `pairs` has two queries beside each other.
template <typename T>
struct GradientWorkspace {
  Buffer<Operand<T>> queries, turned_queries, grads, turned_grads;          // of all queries of a row
  Buffer<Operand<T>> keys, key_rows, values, weights, slopes, slope_pairs;  // of a tile
  Buffer<float> scores, weight_grads, key_sums, value_sums;                 // of a tile
  Buffer<float> query_sums, dots;                                           // of all queries of a row

  static GradientWorkspace& mine() {
    static thread_local GradientWorkspace workspace;
    return workspace;
  }
};

// Queries of a tile with those that fill it up: pairs, and few counts, for code is generated for each.
inline int64_t tile_rows(int64_t queries) { return queries <= 8 ? round_up(queries, 2) : filled(queries); }

// Rows of a tile (elements `pitch` apart) as products read them from the left, (rows, D), filled up with zeros; and, if
// `turned` is given, their transpose (D, filled(rows)).
template <typename T>
void take_rows(const T* x, int64_t pitch, int64_t count, int64_t dim, Operand<T>* out, Operand<T>* turned) {
  const int64_t rows = tile_rows(count), width = filled(rows);
  for (int64_t i = 0; i < width; i += WIDTH)
    for (int64_t d = 0; d < dim; d += WIDTH) {
      Vec lanes[WIDTH];
      for (int64_t r = 0; r < WIDTH; ++r) {
        lanes[r] = i + r < count ? load(x + (i + r) * pitch + d) : splat(0.f);
        if (i + r < rows) store(out + (i + r) * dim + d, lanes[r]);
      }
      if (!turned) continue;
      transpose(lanes);
      for (int64_t r = 0; r < WIDTH; ++r) store(turned + (d + r) * width + i, lanes[r]);
    }
}

// The first `count` columns of `turned` (D, width), times a factor, as rows.
template <typename RowOf>
void put_rows(const float* turned, int64_t width, int64_t count, int64_t dim, float factor, RowOf row) {
  const Vec times = splat(factor);
  for (int64_t j = 0; j < count; j += WIDTH)
    for (int64_t d = 0; d < dim; d += WIDTH) {
      Vec lanes[WIDTH];
      for (int64_t r = 0; r < WIDTH; ++r) lanes[r] = load(turned + (d + r) * width + j);
      transpose(lanes);
      for (int64_t r = 0; r < std::min(WIDTH, count - j); ++r) store(row(j + r) + d, lanes[r] * times);
    }
}

template <typename T, typename B>
class AttentionBackward {
 public:
  AttentionBackward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& out, const at::Tensor& lse, PromptPages<T> prompts, int64_t pages,
                    std::vector<GradientRow> rows, std::vector<BiasTable<B>> tables, const float* head_scale,
                    float scale, bool causal, Wanted wanted)
      : grad_(grad), q_(q), k_(k), v_(v), out_(out), lse_(lse), prompts_(prompts), pages_(pages),
        rows_(std::move(rows)), tables_(std::move(tables)), head_scale_(head_scale), scale_(scale), causal_(causal),
        wanted_(wanted), heads_(q.size(1)), dim_(q.size(2)) {
    for (auto& row : rows_) {
      row.part = parts_;
      parts_ += row.prompt;
    }
  }

  // Gradients of q, k, v and, in float32, of the pools' keys and values; those not asked for are empty.
  std::vector<at::Tensor> run() {
    const auto options = q_.options(), sums = options.dtype(at::kFloat);
    const auto like = [&](const at::Tensor& x, bool wanted) {
      return wanted ? at::empty(x.sizes(), options) : at::empty({0}, options);
    };
    at::Tensor dq = like(q_, wanted_.queries), dk = like(k_, wanted_.keys), dv = like(v_, wanted_.keys);
    const int64_t parts = wanted_.prompts ? parts_ : 0;
    at::Tensor key_parts = at::empty({parts, heads_, dim_}, sums), value_parts = at::empty_like(key_parts);
    dq_ = dq.data_ptr<T>(), dk_ = dk.data_ptr<T>(), dv_ = dv.data_ptr<T>();
    key_parts_ = key_parts.data_ptr<float>(), value_parts_ = value_parts.data_ptr<float>();
    const int64_t count = static_cast<int64_t>(rows_.size());
    // Head before row: all rows of one picture size read the same bias rows.
    at::parallel_for(0, heads_ * count, 1, [&](int64_t begin, int64_t end) {
      auto& work = GradientWorkspace<T>::mine();
      for (int64_t task = begin; task < end; ++task) differentiate(task % count, task / count, work);
      at::native::cpublas::brgemm_release(PAIR<T> == 2);
    });
    return {dq, dk, dv, sum_parts(key_parts, sums), sum_parts(value_parts, sums)};
  }

 private:
  // 64 keys or fewer, the bias of the first query for the first of them, and the sums that they get.
  struct Tile {
    int64_t count;
    const B* bias = nullptr;
    int64_t bias_pitch = 0;
    int64_t causal_from = -1;  // which query is the first to see the first key, if later keys are hidden; else -1
    bool first = false;        // of the row's tiles
    bool learns = false;       // whether the keys' own gradients are asked for

    int64_t visible(int64_t query) const {
      return causal_from < 0 ? count : std::clamp<int64_t>(query - causal_from + 1, 0, count);
    }
  };

  void differentiate(int64_t r, int64_t head, GradientWorkspace<T>& work) const {
    const auto& row = rows_[r];
    take_queries(row, head, work);
    bool first = true;
    if (wanted_.queries || wanted_.prompts) {
      for (int64_t j = 0; j < row.prompt; j += BLOCK) {
        const auto key = [&](int64_t i) { return prompts_.key + prompts_.offset(r, head, j + i); };
        const auto value = [&](int64_t i) { return prompts_.value + prompts_.offset(r, head, j + i); };
        const Tile tile{.count = std::min(BLOCK, row.prompt - j), .first = first, .learns = wanted_.prompts};
        meet(row, head, tile, key, value, work);
        first = false;
        if (!tile.learns) continue;
        const int64_t at = (row.part * heads_ + head * row.prompt + j) * dim_;
        put(tile, head, work, [&](int64_t i) { return key_parts_ + at + i * dim_; },
            [&](int64_t i) { return value_parts_ + at + i * dim_; });
      }
    }
    if (wanted_.queries || wanted_.keys) {
      const auto& table = tables_[row.table];
      for (int64_t j = 0; j < row.keys; j += BLOCK) {
        const T* k = k_.const_data_ptr<T>() + (row.key + j) * k_.stride(0) + head * k_.stride(1);
        const T* v = v_.const_data_ptr<T>() + (row.key + j) * v_.stride(0) + head * v_.stride(1);
        const Tile tile{.count = std::min(BLOCK, row.keys - j), .bias = table.row(head, row.position) + j,
                        .bias_pitch = table.pitch, .causal_from = causal_ ? j : -1, .first = first,
                        .learns = wanted_.keys};
        meet(row, head, tile, [&](int64_t i) { return k + i * k_.stride(0); },
             [&](int64_t i) { return v + i * v_.stride(0); }, work);
        first = false;
        if (!tile.learns) continue;
        const int64_t at = ((row.key + j) * heads_ + head) * dim_;
        put(tile, head, work, [&](int64_t i) { return dk_ + at + i * heads_ * dim_; },
            [&](int64_t i) { return dv_ + at + i * heads_ * dim_; });
      }
    }
    if (!wanted_.queries) return;
    const float* sums = work.query_sums.of(0);
    const Vec times = splat(scale_);
    T* to = dq_ + (row.query * heads_ + head) * dim_;
    for (int64_t i = 0; i < row.queries; ++i)
      for (int64_t d = 0; d < dim_; d += WIDTH)
        store(to + i * heads_ * dim_ + d, load(sums + i * dim_ + d) * times);
  }

  void take_queries(const GradientRow& row, int64_t head, GradientWorkspace<T>& work) const {
    const int64_t room = filled(row.queries) * dim_;
    Operand<T>*queries = work.queries.of(room), *grads = work.grads.of(room);
    const bool turn = wanted_.keys || wanted_.prompts;
    Operand<T>* turned_queries = turn ? work.turned_queries.of(room) : nullptr;
    Operand<T>* turned_grads = turn ? work.turned_grads.of(room) : nullptr;
    float* dots = work.dots.of(row.queries);
    work.query_sums.of(room);
    const T* q = q_.const_data_ptr<T>() + row.query * q_.stride(0) + head * q_.stride(1);
    const T* grad = grad_.const_data_ptr<T>() + row.query * grad_.stride(0) + head * grad_.stride(1);
    const T* out = out_.const_data_ptr<T>() + (row.query * heads_ + head) * dim_;
    for (int64_t i = 0; i < row.queries; i += QUERIES) {
      const int64_t count = std::min(QUERIES, row.queries - i), at = i * dim_;
      take_rows<T>(q + i * q_.stride(0), q_.stride(0), count, dim_, queries + at, turn ? turned_queries + at : nullptr);
      take_rows<T>(grad + i * grad_.stride(0), grad_.stride(0), count, dim_, grads + at,
                   turn ? turned_grads + at : nullptr);
    }
    for (int64_t i = 0; i < row.queries; ++i) {
      Vec total = splat(0.f);
      for (int64_t d = 0; d < dim_; d += WIDTH)
        total = total + load(grad + i * grad_.stride(0) + d) * load(out + i * heads_ * dim_ + d);
      dots[i] = sum(total);
    }
  }

  // Let all queries of a row meet a tile of keys: adds to the sums of the queries, and makes those of the keys.
  template <typename KeyOf, typename ValueOf>
  void meet(const GradientRow& row, int64_t head, const Tile& tile, KeyOf key, ValueOf value,
            GradientWorkspace<T>& work) const {
    const int64_t width = filled(tile.count), room = BLOCK * std::max(dim_, BLOCK);
    Operand<T>*keys = work.keys.of(room), *values = work.values.of(room), *key_rows = work.key_rows.of(room);
    Operand<T>*weights = work.weights.of(room), *slopes = work.slopes.of(room), *pairs = slopes;
    if constexpr (PAIR<T> == 2) pairs = work.slope_pairs.of(room);
    float *scores = work.scores.of(room), *weight_grads = work.weight_grads.of(room);
    float *key_sums = work.key_sums.of(room), *value_sums = work.value_sums.of(room);
    pack_keys<T>(key, tile.count, dim_, keys);
    pack_keys<T>(value, tile.count, dim_, values);
    if (wanted_.queries) pack_values<T>(key, tile.count, dim_, key_rows);

    bool add = false;
    for (int64_t begin = 0; begin < row.queries; begin += QUERIES) {
      const int64_t count = std::min(QUERIES, row.queries - begin), rows = tile_rows(count), at = begin * dim_;
      if (tile.visible(begin + count - 1) == 0) continue;
      multiply<T>(rows, width, dim_, work.queries.of(0) + at, dim_, keys, scores, width, false);
      multiply<T>(rows, width, dim_, work.grads.of(0) + at, dim_, values, weight_grads, width, false);
      differentiate_scores(row, head, tile, begin, count, scores, weight_grads, weights, slopes, pairs, work);
      if (tile.learns) {
        multiply<T>(dim_, width, rows, work.turned_queries.of(0) + at, filled(rows), pairs, key_sums, width, add);
        multiply<T>(dim_, width, rows, work.turned_grads.of(0) + at, filled(rows), weights, value_sums, width, add);
        add = true;
      }
      if (wanted_.queries)
        multiply<T>(rows, dim_, width, slopes, width, key_rows, work.query_sums.of(0) + at, dim_, !tile.first);
    }
  }

  // P, in pairs, and dS, in pairs and as it is; zero where a key is hidden and in what fills a tile up.
  void differentiate_scores(const GradientRow& row, int64_t head, const Tile& tile, int64_t begin, int64_t count,
                            const float* scores, const float* weight_grads, Operand<T>* weights, Operand<T>* slopes,
                            Operand<T>* pairs, GradientWorkspace<T>& work) const {
    const int64_t width = filled(tile.count);
    const Vec factor = splat(scale_), head_scale = splat(head_scale_[head]);
    const float* dots = work.dots.of(0) + begin;
    const float* lse = lse_.const_data_ptr<float>() + (row.query + begin) * heads_ + head;
    for (int64_t i = 0; i < tile_rows(count); i += 2) {
      for (int64_t j = 0; j < width; j += WIDTH) {
        Vec weight[2], slope[2];
        for (int64_t two = 0; two < 2; ++two) {
          const int64_t query = i + two, visible = query < count ? tile.visible(begin + query) : 0;
          weight[two] = slope[two] = splat(0.f);
          if (j >= visible) continue;
          Vec score = load(scores + query * width + j) * factor;
          if (tile.bias) {
            const B* bias = tile.bias + (begin + query) * tile.bias_pitch + j;
            _mm_prefetch(reinterpret_cast<const char*>(bias + BIAS_AHEAD * tile.bias_pitch), _MM_HINT_T0);
            score = score + (j + WIDTH <= tile.count ? load(bias) : load_first(bias, tile.count - j));
          }
          score = score - splat(lse[query * heads_]);
          if constexpr (std::is_same_v<Operand<T>, float>) weight[two] = exp(score);
          else weight[two] = rough_exp(score);
          slope[two] = weight[two] * (load(weight_grads + query * width + j) * head_scale - splat(dots[query]));
          if (j + WIDTH > visible) {
            weight[two] = first(visible - j, weight[two], splat(0.f));
            slope[two] = first(visible - j, slope[two], splat(0.f));
          }
        }
        if constexpr (PAIR<T> == 2) {
          round_pairs(weights + i * width + 2 * j, weight[0], weight[1]);
          round_pairs(pairs + i * width + 2 * j, slope[0], slope[1]);
          store(slopes + i * width + j, slope[0]);
          store(slopes + (i + 1) * width + j, slope[1]);
        } else {
          for (int64_t two = 0; two < 2; ++two) {
            store(weights + (i + two) * width + j, weight[two]);
            store(slopes + (i + two) * width + j, slope[two]);
          }
        }
      }
    }
  }

  template <typename KeyOf, typename ValueOf>
  void put(const Tile& tile, int64_t head, GradientWorkspace<T>& work, KeyOf key, ValueOf value) const {
    const int64_t width = filled(tile.count);
    put_rows(work.key_sums.of(0), width, tile.count, dim_, scale_, key);
    put_rows(work.value_sums.of(0), width, tile.count, dim_, head_scale_[head], value);
  }

  // Parts of rows, (part * H + head * P + j) * D each, added up to pages.
  at::Tensor sum_parts(const at::Tensor& parts, const at::TensorOptions& options) const {
    if (!wanted_.prompts) return at::empty({0}, options);
    at::Tensor pool = at::zeros({pages_, heads_, PAGE, dim_}, options);
    std::vector<std::vector<std::pair<int64_t, int64_t>>> readers(pages_);  // row, and first key in it
    for (size_t r = 0; r < rows_.size(); ++r)
      for (int64_t j = 0; j < rows_[r].prompt; j += PAGE) readers[prompts_.page(r, j)].push_back({r, j});
    const float* from = parts.const_data_ptr<float>();
    float* to = pool.data_ptr<float>();
    at::parallel_for(0, pages_ * heads_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        for (const auto& [r, j] : readers[task / heads_]) {
          const auto& row = rows_[r];
          const float* part = from + (row.part * heads_ + task % heads_ * row.prompt + j) * dim_;
          float* page = to + task * PAGE * dim_;
          for (int64_t d = 0; d < std::min(PAGE, row.prompt - j) * dim_; d += WIDTH)
            store(page + d, load(page + d) + load(part + d));
        }
    });
    return pool;
  }

  const at::Tensor &grad_, &q_, &k_, &v_;  // (T, H, D), any token and head strides
  const at::Tensor &out_, &lse_;           // (T, H, D) and (T, H), contiguous
  PromptPages<T> prompts_;
  int64_t pages_;
  std::vector<GradientRow> rows_;
  std::vector<BiasTable<B>> tables_;
  const float* head_scale_;
  float scale_;
  bool causal_;
  Wanted wanted_;
  int64_t heads_, dim_, parts_ = 0;
  T *dq_ = nullptr, *dk_ = nullptr, *dv_ = nullptr;                 // (T, H, D), contiguous
  float *key_parts_ = nullptr, *value_parts_ = nullptr;
};

}  // namespace promptmux
