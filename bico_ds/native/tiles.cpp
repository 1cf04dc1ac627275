// Fused dense attention over documents on AVX-512 / AMX, bf16 and fp32: rotation in both directions, one softmax, and
// backward.
//
// One work item is a document and a key head. Its keys are rotated and packed once; query rows come in blocks of
// M = tokens x group rows. Matrix products run through torch's own brgemm (bf16 x bf16 -> fp32, AMX where there is one;
// fp32 x fp32 -> fp32). T is the dtype of the inputs; softmax, sums and gradients of keys are fp32 for both.
// Scores of key j for a row with split s are forward-rotated where j < s, reversed behind it. The same algorithm as
// bico_ds/attention/dense.py, which serves every other dtype and machine and is the reference in the tests.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include "scalars.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using at::Tensor;
using at::native::cpublas::brgemm;

constexpr int64_t kPad = 32;            // rows and keys are padded to AMX tiles
constexpr int64_t kKeyStep = 128;       // keys that no row of a block needs are skipped in such steps
constexpr int64_t kMaxRows = 128;       // query rows of a block at most, but for one token's
constexpr int64_t kChunk = 256;         // keys that are scored at a time: with 128 rows, buffers that stay in the L2 cache

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// R_m x and R_-m x, computed in fp32. All [D].
template <typename T>
inline void rotate(const T* x, const T* cos, const T* sin, int64_t D, T* forward, T* reverse) {
  int64_t half = D / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    float x1 = widen(x[i]), x2 = widen(x[i + half]);
    float even1 = x1 * widen(cos[i]), even2 = x2 * widen(cos[i + half]);
    float odd1 = -x2 * widen(sin[i]), odd2 = x1 * widen(sin[i + half]);
    forward[i] = narrow<T>(even1 + odd1);
    forward[i + half] = narrow<T>(even2 + odd2);
    reverse[i] = narrow<T>(even1 - odd1);
    reverse[i + half] = narrow<T>(even2 - odd2);
  }
}

// The transpose of `rotate`: gradient [D] of x from those of R_m x and R_-m x.
template <typename T>
inline void rotate_back(const float* forward, const float* reverse, const T* cos, const T* sin, int64_t D, float* grad) {
  int64_t half = D / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    float even1 = forward[i] + reverse[i], even2 = forward[i + half] + reverse[i + half];
    float odd1 = forward[i] - reverse[i], odd2 = forward[i + half] - reverse[i + half];
    grad[i] = even1 * widen(cos[i]) + odd2 * widen(sin[i + half]);
    grad[i + half] = even2 * widen(cos[i + half]) - odd1 * widen(sin[i]);
  }
}

// Layouts of brgemm's B operand [K, N]: row-major in fp32; in bf16 in pairs along K, element (k, n) at
// (k / 2 * N + n) * 2 + k % 2.
template <typename T>
constexpr int64_t kPairs = sizeof(float) / sizeof(T);

// B operand [rows, D] of a row-major matrix [rows, D].
inline void pack_rows(const float* from, int64_t rows, int64_t D, float* packed) {
  std::memcpy(packed, from, rows * D * sizeof(float));
}

inline void pack_rows(const BFloat16* from, int64_t rows, int64_t D, BFloat16* packed) {
  for (int64_t row = 0; row < rows; row += 2) {
    const uint16_t* first = reinterpret_cast<const uint16_t*>(from + row * D);
    const uint16_t* second = first + D;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(packed + row * D);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) pairs[d] = first[d] | static_cast<uint32_t>(second[d]) << 16;
  }
}

// [rows, columns] of a matrix with row length `stride`, as [columns, rows].
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t row = 0; row < rows; row += 16)
    for (int64_t column = 0; column < columns; column += 16)
      at::vec::transpose_mxn<float>(from + row * stride + column, stride, to + column * rows + row, rows, 16,
                                    static_cast<int>(std::min<int64_t>(16, columns - column)));
}

inline void transpose(const BFloat16* from, int64_t stride, int64_t rows, int64_t columns, BFloat16* to) {
  for (int64_t row = 0; row < rows; row += 32)
    for (int64_t column = 0; column < columns; column += 32)
      at::vec::transpose_mxn<BFloat16>(from + row * stride + column, stride, to + column * rows + row, rows, 32, 32);
}

// B operand [D, rows] of a row-major matrix [rows, D]: its pairs, as 32-bit units, transposed.
template <typename T>
inline void pack_columns(const T* from, int64_t rows, int64_t D, T* packed) {
  int64_t width = D / kPairs<T>;
  transpose(reinterpret_cast<const float*>(from), width, rows, width, reinterpret_cast<float*>(packed));
}

// Scratch memory that only grows.
template <typename T>
struct Buffer {
  std::vector<T> storage;

  T* sized(int64_t n) {
    if (static_cast<int64_t>(storage.size()) < n) storage.resize(n);
    return storage.data();
  }
  T* zeroed(int64_t n) {
    std::memset(static_cast<void*>(sized(n)), 0, n * sizeof(T));
    return storage.data();
  }
  T* data() { return storage.data(); }
  const T* data() const { return storage.data(); }
};

template <typename T>
void clear(T* row, int64_t from, int64_t to) {
  if (from < to) std::fill(row + from, row + to, T(0.0f));
}

template <typename T>
struct Problem {
  const T *q, *k, *v, *cos, *sin;
  const int64_t *rows, *split, *offsets, *key_starts, *key_counts;
  int64_t documents, H, N, D;
  float scale;
  bool causal;

  int64_t group() const { return H / N; }
  int64_t block_tokens() const { return std::max<int64_t>(1, kMaxRows / group()); }
};

template <typename T>
Problem<T> describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                 const Tensor& rows, const Tensor& split, const Tensor& offsets, const Tensor& key_starts,
                 const Tensor& key_counts, double scale, bool causal) {
  for (const Tensor* x : {&q, &k, &v, &cos, &sin}) TORCH_CHECK(x->is_contiguous());
  for (const Tensor* x : {&rows, &split, &offsets, &key_starts, &key_counts})
    TORCH_CHECK(x->is_contiguous() && x->scalar_type() == at::kLong);
  auto data = [](const Tensor& x) { return x.const_data_ptr<T>(); };  // checks the dtype
  auto index = [](const Tensor& x) { return x.const_data_ptr<int64_t>(); };
  return {data(q), data(k), data(v), data(cos), data(sin), index(rows), index(split), index(offsets), index(key_starts),
          index(key_counts), key_starts.numel(), q.size(1), k.size(1), q.size(2), static_cast<float>(scale), causal};
}

// Rotated keys and values of one document and key head, packed as B operands.
template <typename T>
struct Keys {
  int64_t count, padded_count;
  Buffer<T> forward_t, reverse_t, value_t;  // [D, K]: scores, gradient of the weights
  Buffer<T> forward, reverse, value;        // [K, D]: gradient of the queries, output
  Buffer<T> rows;                           // [K, D], row-major

  void load(const Problem<T>& p, int64_t document, int64_t head, bool backward) {
    count = p.key_counts[document];
    padded_count = padded(count);
    int64_t D = p.D, size = padded_count * D;
    T *f = rows.zeroed(3 * size), *r = f + size, *v = r + size;
    for (int64_t j = 0; j < count; ++j) {
      int64_t row = p.key_starts[document] + j;
      rotate(p.k + (row * p.N + head) * D, p.cos + row * D, p.sin + row * D, D, f + j * D, r + j * D);
      std::memcpy(v + j * D, p.v + (row * p.N + head) * D, D * sizeof(T));
    }
    pack_columns(f, padded_count, D, forward_t.sized(size));
    pack_columns(r, padded_count, D, reverse_t.sized(size));
    if (!backward) {
      pack_rows(v, padded_count, D, value.sized(size));
      return;
    }
    pack_columns(v, padded_count, D, value_t.sized(size));
    pack_rows(f, padded_count, D, forward.sized(size));
    pack_rows(r, padded_count, D, reverse.sized(size));
  }
};

// A block of query rows: tokens x group, padded; row m belongs to token m / group, head head * group + m % group.
// Its keys come in chunks [begin, end) of at most kChunk.
template <typename T>
struct Block {
  int64_t rows, padded_rows;
  int64_t forward_end, reverse_begin, last_key;  // some row needs forward scores of keys [0, forward_end), reversed ones
                                                 // of [reverse_begin, last_key); none needs keys from `last_key`
  int64_t begin, end;                            // the chunk
  Buffer<T> forward, reverse;                    // [M, D]
  Buffer<float> scores, reverse_scores;          // [M, end - begin]

  void load(const Problem<T>& p, const Keys<T>& keys, int64_t first, int64_t last, int64_t head) {
    int64_t D = p.D, G = p.group(), K = keys.padded_count;
    rows = (last - first) * G;
    padded_rows = padded(rows);
    T *f = forward.zeroed(padded_rows * D), *r = reverse.zeroed(padded_rows * D);
    for (int64_t m = 0; m < rows; ++m) {
      int64_t row = p.rows[first + m / G];
      rotate(p.q + (row * p.H + head * G + m % G) * D, p.cos + row * D, p.sin + row * D, D, f + m * D, r + m * D);
    }
    forward_end = std::min(K, (p.split[last - 1] + kKeyStep - 1) / kKeyStep * kKeyStep);
    last_key = p.causal ? forward_end : K;
    reverse_begin = p.causal ? last_key : p.split[first] / kKeyStep * kKeyStep;
  }

  int64_t width() const { return end - begin; }
  // Columns of the chunk that some row needs: forward scores before the first, reversed ones from the second.
  int64_t forward_columns() const { return std::clamp(forward_end, begin, end) - begin; }
  int64_t reverse_column() const { return std::clamp(reverse_begin, begin, end) - begin; }
  // The first column of the chunk behind key `key`.
  int64_t column(int64_t key) const { return std::clamp(key, begin, end) - begin; }

  void score(const Problem<T>& p, const Keys<T>& keys, int64_t first_key) {
    begin = first_key;
    end = std::min(begin + kChunk, last_key);
    int64_t D = p.D, K = keys.padded_count, N = width(), M = padded_rows;
    scores.sized(M * N);
    reverse_scores.sized(M * N);
    if (int64_t columns = forward_columns(); columns > 0)
      brgemm(M, columns, D, D, K, N, false, forward.data(), keys.forward_t.data() + kPairs<T> * begin, scores.data());
    if (int64_t from = reverse_column(); from < N)
      brgemm(M, N - from, D, D, K, N, false, reverse.data(), keys.reverse_t.data() + kPairs<T> * (begin + from),
             reverse_scores.data() + from);
  }

  // Scaled scores of row m, forward up to the split and reversed behind it, into `scores`; returns the columns seen.
  int64_t blend(const Problem<T>& p, const Keys<T>& keys, int64_t m, int64_t split) {
    float* f = scores.data() + m * width();
    const float* r = reverse_scores.data() + m * width();
    int64_t cut = column(split), seen = p.causal ? cut : column(keys.count);
    for (int64_t j = 0; j < cut; ++j) f[j] *= p.scale;
    for (int64_t j = cut; j < seen; ++j) f[j] = r[j] * p.scale;
    return seen;
  }
};

// Softmax over chunks: output so far is relative to `largest`, the largest score so far, and so is `total`.
struct ForwardScratch {
  Buffer<float> product, largest, total;  // [M, D], [M], [M]

  void load(int64_t M, int64_t D) {
    product.zeroed(M * D);
    std::fill_n(largest.sized(M), M, -std::numeric_limits<float>::infinity());
    total.zeroed(M);
  }

  // Weights of row m's scores s [seen], in place, after bringing what is there to the new largest score.
  void soften(int64_t m, int64_t D, float* s, int64_t seen) {
    float before = largest.data()[m], now = before, sum = 0.0f;
#pragma omp simd reduction(max : now)
    for (int64_t j = 0; j < seen; ++j) now = s[j] > now ? s[j] : now;
    if (now > before) {
      float factor = exp_negative(before - now);
      float* row = product.data() + m * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) row[d] *= factor;
      total.data()[m] *= factor;
      largest.data()[m] = now;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < seen; ++j) {
      s[j] = exp_negative(s[j] - now);
      sum += s[j];
    }
    total.data()[m] += sum;
  }
};

template <typename T>
void forward_item(const Problem<T>& p, int64_t document, int64_t head, Keys<T>& keys, Block<T>& block, Buffer<T>& weights,
                  ForwardScratch& s, T* out, float* lse) {
  int64_t D = p.D, G = p.group();
  keys.load(p, document, head, false);
  int64_t step = p.block_tokens();
  for (int64_t first = p.offsets[document]; first < p.offsets[document + 1]; first += step) {
    int64_t last = std::min(first + step, p.offsets[document + 1]);
    block.load(p, keys, first, last, head);
    s.load(block.padded_rows, D);
    for (int64_t key = 0; key < block.last_key; key = block.end) {
      block.score(p, keys, key);
      int64_t N = block.width();
      weights.sized(block.padded_rows * N);
      clear(weights.data(), block.rows * N, block.padded_rows * N);
      for (int64_t m = 0; m < block.rows; ++m) {
        int64_t seen = block.blend(p, keys, m, p.split[first + m / G]);
        float* row = block.scores.data() + m * N;
        s.soften(m, D, row, seen);
        T* w = weights.data() + m * N;
#pragma omp simd
        for (int64_t j = 0; j < seen; ++j) w[j] = narrow<T>(row[j]);
        clear(w, seen, N);
      }
      brgemm(block.padded_rows, D, N, N, D, D, true, weights.data(), keys.value.data() + key * D, s.product.data());
    }
    for (int64_t m = 0; m < block.rows; ++m) {
      int64_t row = p.rows[first + m / G] * p.H + head * G + m % G;
      float total = s.total.data()[m], inverse = 1.0f / total;
      lse[row] = s.largest.data()[m] + std::log(total);
      const float* source = s.product.data() + m * D;
      T* target = out + row * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) target[d] = narrow<T>(source[d] * inverse);
    }
  }
}

template <typename T>
struct Gradients {
  const T *grad_out, *out;
  const float* lse;
  T* dq;
  float *dk, *dv;
};

template <typename T>
struct BackwardScratch {
  Buffer<T> d_out, d_out_p, forward_p, reverse_p;   // [M, D], and as B operands
  Buffer<T> weights, d_forward, d_reverse, turned;  // [M, N] of a chunk, and [N, M]
  Buffer<float> delta;                              // [M]: the product of output and its gradient
  Buffer<float> d_weights, dq_forward, dq_reverse, dk_forward, dk_reverse, dv, row;

  void load(const Problem<T>& p, const Gradients<T>& g, Block<T>& block, int64_t first, int64_t head) {
    int64_t D = p.D, G = p.group(), M = block.padded_rows;
    d_out.zeroed(M * D);
    delta.sized(M);
    for (int64_t m = 0; m < block.rows; ++m) {
      int64_t row = p.rows[first + m / G] * p.H + head * G + m % G;
      const T *source = g.grad_out + row * D, *out = g.out + row * D;
      std::memcpy(d_out.data() + m * D, source, D * sizeof(T));
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < D; ++d) sum += widen(out[d]) * widen(source[d]);
      delta.data()[m] = sum;
    }
    pack_rows(d_out.data(), M, D, d_out_p.sized(M * D));
    pack_rows(block.forward.data(), M, D, forward_p.sized(M * D));
    pack_rows(block.reverse.data(), M, D, reverse_p.sized(M * D));
    dq_forward.zeroed(M * D);
    dq_reverse.zeroed(M * D);
  }
};

// Weights of the chunk and gradients of its scores, divided between the two rotations.
template <typename T>
void score_gradients(const Problem<T>& p, const Gradients<T>& g, const Keys<T>& keys, Block<T>& block, BackwardScratch<T>& s,
                     int64_t first, int64_t head) {
  int64_t G = p.group(), N = block.width(), M = block.padded_rows;
  for (auto* x : {&s.weights, &s.d_forward, &s.d_reverse}) clear(x->sized(M * N), block.rows * N, M * N);
  for (int64_t m = 0; m < block.rows; ++m) {
    int64_t token = first + m / G, seen = block.blend(p, keys, m, p.split[token]), cut = block.column(p.split[token]);
    const float *score = block.scores.data() + m * N, *d_weight = s.d_weights.data() + m * N;
    float lse = g.lse[p.rows[token] * p.H + head * G + m % G], delta = s.delta.data()[m];
    T* weight = s.weights.data() + m * N;
    auto fill = [&](int64_t from, int64_t to, T* gradient) {
#pragma omp simd
      for (int64_t j = from; j < to; ++j) {
        float difference = score[j] - lse;
        float w = exp_negative(difference > 0.0f ? 0.0f : difference);
        weight[j] = narrow<T>(w);
        gradient[j] = narrow<T>(w * (d_weight[j] - delta) * p.scale);
      }
    };
    T *forward = s.d_forward.data() + m * N, *reverse = s.d_reverse.data() + m * N;
    fill(0, cut, forward);
    fill(cut, seen, reverse);
    clear(weight, seen, N);
    clear(forward, cut, block.forward_columns());
    clear(reverse, block.reverse_column(), cut);
    clear(reverse, seen, N);
  }
}

// What a chunk adds to the gradients of its keys and values and to those of the block's queries.
template <typename T>
void add_chunk(const Problem<T>& p, const Keys<T>& keys, const Block<T>& block, BackwardScratch<T>& s) {
  int64_t D = p.D, M = block.padded_rows, N = block.width(), begin = block.begin;
  T* turned = s.turned.sized(M * N);
  transpose(s.weights.data(), N, M, N, turned);
  brgemm(N, D, M, M, D, D, true, turned, s.d_out_p.data(), s.dv.data() + begin * D);
  if (int64_t columns = block.forward_columns(); columns > 0) {
    transpose(s.d_forward.data(), N, M, columns, turned);
    brgemm(columns, D, M, M, D, D, true, turned, s.forward_p.data(), s.dk_forward.data() + begin * D);
    brgemm(M, D, columns, N, D, D, true, s.d_forward.data(), keys.forward.data() + begin * D, s.dq_forward.data());
  }
  if (int64_t from = block.reverse_column(); from < N) {
    transpose(s.d_reverse.data() + from, N, M, N - from, turned);
    brgemm(N - from, D, M, M, D, D, true, turned, s.reverse_p.data(), s.dk_reverse.data() + (begin + from) * D);
    brgemm(M, D, N - from, N, D, D, true, s.d_reverse.data() + from, keys.reverse.data() + (begin + from) * D,
           s.dq_reverse.data());
  }
}

template <typename T>
void backward_item(const Problem<T>& p, const Gradients<T>& g, int64_t document, int64_t head, Keys<T>& keys, Block<T>& block,
                   BackwardScratch<T>& s) {
  int64_t D = p.D, G = p.group();
  keys.load(p, document, head, true);
  int64_t K = keys.padded_count, step = p.block_tokens();
  for (auto* x : {&s.dk_forward, &s.dk_reverse, &s.dv}) x->zeroed(K * D);
  float* gradient = s.row.sized(D);
  for (int64_t first = p.offsets[document]; first < p.offsets[document + 1]; first += step) {
    int64_t last = std::min(first + step, p.offsets[document + 1]);
    block.load(p, keys, first, last, head);
    s.load(p, g, block, first, head);
    for (int64_t key = 0; key < block.last_key; key = block.end) {
      block.score(p, keys, key);
      int64_t M = block.padded_rows, N = block.width();
      brgemm(M, N, D, D, K, N, false, s.d_out.data(), keys.value_t.data() + kPairs<T> * key, s.d_weights.sized(M * N));
      score_gradients(p, g, keys, block, s, first, head);
      add_chunk(p, keys, block, s);
    }
    for (int64_t m = 0; m < block.rows; ++m) {
      int64_t row = p.rows[first + m / G];
      rotate_back(s.dq_forward.data() + m * D, s.dq_reverse.data() + m * D, p.cos + row * D, p.sin + row * D, D,
                  gradient);
      T* target = g.dq + (row * p.H + head * G + m % G) * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) target[d] = narrow<T>(gradient[d]);
    }
  }
  for (int64_t j = 0; j < keys.count; ++j) {
    int64_t row = p.key_starts[document] + j;
    rotate_back(s.dk_forward.data() + j * D, s.dk_reverse.data() + j * D, p.cos + row * D, p.sin + row * D, D,
                gradient);
    float *dk = g.dk + (row * p.N + head) * D, *dv = g.dv + (row * p.N + head) * D;
    const float* dv_row = s.dv.data() + j * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
      dk[d] += gradient[d];
      dv[d] += dv_row[d];
    }
  }
}

template <typename T>
void forward(const Problem<T>& p, Tensor& out, Tensor& lse) {
  TORCH_CHECK(out.is_contiguous() && lse.is_contiguous());
  auto* out_data = out.data_ptr<T>();
  auto* lse_data = lse.data_ptr<float>();
  at::parallel_for(0, p.documents * p.N, 1, [&](int64_t begin, int64_t end) {
    Keys<T> keys;
    Block<T> block;
    Buffer<T> weights;
    ForwardScratch scratch;
    for (int64_t item = begin; item < end; ++item)
      forward_item(p, item / p.N, item % p.N, keys, block, weights, scratch, out_data, lse_data);
    at::native::cpublas::brgemm_release();
  });
}

template <typename T>
void backward(const Problem<T>& p, const Tensor& grad_out, const Tensor& out, const Tensor& lse, Tensor& dq, Tensor& dk,
              Tensor& dv) {
  for (const Tensor* x : {&grad_out, &out, &lse, static_cast<const Tensor*>(&dq), static_cast<const Tensor*>(&dk),
                          static_cast<const Tensor*>(&dv)})
    TORCH_CHECK(x->is_contiguous());
  Gradients<T> g{grad_out.const_data_ptr<T>(), out.const_data_ptr<T>(), lse.const_data_ptr<float>(),
                 dq.data_ptr<T>(), dk.data_ptr<float>(), dv.data_ptr<float>()};
  at::parallel_for(0, p.documents * p.N, 1, [&](int64_t begin, int64_t end) {
    Keys<T> keys;
    Block<T> block;
    BackwardScratch<T> scratch;
    for (int64_t item = begin; item < end; ++item) backward_item(p, g, item / p.N, item % p.N, keys, block, scratch);
    at::native::cpublas::brgemm_release();
  });
}

void tiles_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin, const Tensor& rows,
                   const Tensor& split, const Tensor& offsets, const Tensor& key_starts, const Tensor& key_counts, double scale,
                   bool causal, Tensor out, Tensor lse) {
  auto run = [&]<typename T>(T) {
    forward(describe<T>(q, k, v, cos, sin, rows, split, offsets, key_starts, key_counts, scale, causal), out, lse);
  };
  q.scalar_type() == at::kFloat ? run(float()) : run(BFloat16());
}

void tiles_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                    const Tensor& sin, const Tensor& out, const Tensor& lse, const Tensor& rows, const Tensor& split,
                    const Tensor& offsets, const Tensor& key_starts, const Tensor& key_counts, double scale, bool causal,
                    Tensor dq, Tensor dk, Tensor dv) {
  auto run = [&]<typename T>(T) {
    backward(describe<T>(q, k, v, cos, sin, rows, split, offsets, key_starts, key_counts, scale, causal), grad_out, out, lse,
             dq, dk, dv);
  };
  q.scalar_type() == at::kFloat ? run(float()) : run(BFloat16());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bico_ds, m) {
  m.def(
      "tiles_forward(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor rows, Tensor split, Tensor offsets, "
      "Tensor key_starts, Tensor key_counts, float scale, bool causal, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "tiles_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor out, Tensor lse, "
      "Tensor rows, Tensor split, Tensor offsets, Tensor key_starts, Tensor key_counts, float scale, bool causal, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

TORCH_LIBRARY_IMPL(bico_ds, CPU, m) {
  m.impl("tiles_forward", &tiles_forward);
  m.impl("tiles_backward", &tiles_backward);
}
