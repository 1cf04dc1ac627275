// Fused dense attention over documents on AVX-512 / AMX, bf16: rotation in both directions, one softmax, and backward.
//
// One work item is a document and a key head. Its keys are rotated and packed once; query rows come in blocks of
// M = tokens x group rows. Matrix products run through torch's own brgemm (bf16 x bf16 -> fp32, AMX where there is one).
// Scores of key j for a row with split s are forward-rotated where j < s, reversed behind it. The same algorithm as
// bico_ds/attention/dense.py, which serves every other dtype and machine and is the reference in the tests.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using at::native::cpublas::brgemm;

constexpr int64_t kPad = 32;            // rows and keys are padded to AMX tiles
constexpr int64_t kKeyStep = 128;       // keys that no row of a block needs are skipped in such steps
constexpr int64_t kMaxRows = 256;       // query rows of a block at most
constexpr int64_t kBlockScores = 1 << 16;  // scores a block aims at, so that its buffers stay in the L2 cache

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

inline float widen(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline BFloat16 narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return BFloat16(static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16), BFloat16::from_bits());
}

// exp(x) for x <= 0 to 2 ulp: Cody-Waite reduction and a degree-6 polynomial; branch-free, so that loops vectorise.
inline float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  float shifted = x * 1.44269504f + 12582912.0f;
  float n = shifted - 12582912.0f;
  float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * (0.0083333f + r * 0.0013888f)))));
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// R_m x and R_-m x, computed in fp32. All [D].
inline void rotate(const BFloat16* x, const BFloat16* cos, const BFloat16* sin, int64_t D, BFloat16* forward,
                   BFloat16* reverse) {
  int64_t half = D / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    float x1 = widen(x[i]), x2 = widen(x[i + half]);
    float even1 = x1 * widen(cos[i]), even2 = x2 * widen(cos[i + half]);
    float odd1 = -x2 * widen(sin[i]), odd2 = x1 * widen(sin[i + half]);
    forward[i] = narrow(even1 + odd1);
    forward[i + half] = narrow(even2 + odd2);
    reverse[i] = narrow(even1 - odd1);
    reverse[i + half] = narrow(even2 - odd2);
  }
}

// The transpose of `rotate`: gradient [D] of x from those of R_m x and R_-m x.
inline void rotate_back(const float* forward, const float* reverse, const BFloat16* cos, const BFloat16* sin, int64_t D, float* grad) {
  int64_t half = D / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    float even1 = forward[i] + reverse[i], even2 = forward[i + half] + reverse[i + half];
    float odd1 = forward[i] - reverse[i], odd2 = forward[i + half] - reverse[i + half];
    grad[i] = even1 * widen(cos[i]) + odd2 * widen(sin[i + half]);
    grad[i + half] = even2 * widen(cos[i + half]) - odd1 * widen(sin[i]);
  }
}

// Layouts of brgemm's B operand [K, N] in pairs along K: element (k, n) at (k / 2 * N + n) * 2 + k % 2.

// B operand [rows, D] of a row-major matrix [rows, D].
inline void pack_rows(const BFloat16* from, int64_t rows, int64_t D, BFloat16* packed) {
  for (int64_t row = 0; row < rows; row += 2) {
    const uint16_t* first = reinterpret_cast<const uint16_t*>(from + row * D);
    const uint16_t* second = first + D;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(packed + row * D);
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) pairs[d] = first[d] | static_cast<uint32_t>(second[d]) << 16;
  }
}

// B operand [D, rows] of the same matrix: its pairs, as 32-bit units, transposed.
inline void pack_columns(const BFloat16* from, int64_t rows, int64_t D, BFloat16* packed) {
  const float* pairs = reinterpret_cast<const float*>(from);
  float* target = reinterpret_cast<float*>(packed);
  int64_t width = D / 2;
  for (int64_t row = 0; row < rows; row += 16)
    for (int64_t column = 0; column < width; column += 16)
      at::vec::transpose_mxn<float>(pairs + row * width + column, width, target + column * rows + row, rows, 16,
                                    static_cast<int>(std::min<int64_t>(16, width - column)));
}

// [rows, columns] of a matrix with row length `stride`, as [columns, rows].
inline void transpose(const BFloat16* from, int64_t stride, int64_t rows, int64_t columns, BFloat16* to) {
  for (int64_t row = 0; row < rows; row += 32)
    for (int64_t column = 0; column < columns; column += 32)
      at::vec::transpose_mxn<BFloat16>(from + row * stride + column, stride, to + column * rows + row, rows, 32, 32);
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

struct Problem {
  const BFloat16 *q, *k, *v, *cos, *sin;
  const int64_t *rows, *split, *offsets, *key_starts, *key_counts;
  int64_t documents, H, N, D;
  float scale;
  bool causal;

  int64_t group() const { return H / N; }
  int64_t block_tokens(int64_t keys) const {
    int64_t rows_a_block = std::min<int64_t>(128, std::max<int64_t>(kPad, kBlockScores / keys / kPad * kPad));
    TORCH_CHECK(group() <= kMaxRows);
    return std::max<int64_t>(1, rows_a_block / group());
  }
};

Problem describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                 const Tensor& rows, const Tensor& split, const Tensor& offsets, const Tensor& key_starts,
                 const Tensor& key_counts, double scale, bool causal) {
  for (const Tensor* x : {&q, &k, &v, &cos, &sin}) TORCH_CHECK(x->is_contiguous() && x->scalar_type() == at::kBFloat16);
  for (const Tensor* x : {&rows, &split, &offsets, &key_starts, &key_counts})
    TORCH_CHECK(x->is_contiguous() && x->scalar_type() == at::kLong);
  auto bf16 = [](const Tensor& x) { return x.const_data_ptr<BFloat16>(); };
  auto index = [](const Tensor& x) { return x.const_data_ptr<int64_t>(); };
  return {bf16(q), bf16(k), bf16(v), bf16(cos), bf16(sin), index(rows), index(split), index(offsets), index(key_starts),
          index(key_counts), key_starts.numel(), q.size(1), k.size(1), q.size(2), static_cast<float>(scale), causal};
}

// Rotated keys and values of one document and key head, packed as B operands.
struct Keys {
  int64_t count, padded_count;
  Buffer<BFloat16> forward_t, reverse_t, value_t;  // [D, K]: scores, gradient of the weights
  Buffer<BFloat16> forward, reverse, value;        // [K, D]: gradient of the queries, output
  Buffer<BFloat16> rows;                           // [K, D], row-major

  void load(const Problem& p, int64_t document, int64_t head, bool backward) {
    count = p.key_counts[document];
    padded_count = padded(count);
    int64_t D = p.D, size = padded_count * D;
    BFloat16 *f = rows.zeroed(3 * size), *r = f + size, *v = r + size;
    for (int64_t j = 0; j < count; ++j) {
      int64_t row = p.key_starts[document] + j;
      rotate(p.k + (row * p.N + head) * D, p.cos + row * D, p.sin + row * D, D, f + j * D, r + j * D);
      std::memcpy(v + j * D, p.v + (row * p.N + head) * D, D * sizeof(BFloat16));
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
struct Block {
  int64_t rows, padded_rows;
  int64_t forward_end, reverse_begin, end;  // some row needs forward scores of keys [0, forward_end), reversed ones of
                                            // [reverse_begin, end); none needs keys from `end`
  Buffer<BFloat16> forward, reverse;            // [M, D]
  Buffer<float> forward_scores, reverse_scores;  // [M, K]

  void load(const Problem& p, const Keys& keys, int64_t first, int64_t last, int64_t head) {
    int64_t D = p.D, G = p.group();
    rows = (last - first) * G;
    padded_rows = padded(rows);
    BFloat16 *f = forward.zeroed(padded_rows * D), *r = reverse.zeroed(padded_rows * D);
    for (int64_t m = 0; m < rows; ++m) {
      int64_t row = p.rows[first + m / G];
      rotate(p.q + (row * p.H + head * G + m % G) * D, p.cos + row * D, p.sin + row * D, D, f + m * D, r + m * D);
    }
    int64_t K = keys.padded_count;
    forward_end = std::min(K, (p.split[last - 1] + kKeyStep - 1) / kKeyStep * kKeyStep);
    end = p.causal ? forward_end : K;
    reverse_begin = p.causal ? end : p.split[first] / kKeyStep * kKeyStep;
    brgemm(padded_rows, forward_end, D, D, K, K, false, f, keys.forward_t.data(), forward_scores.sized(padded_rows * K));
    if (reverse_begin < end)
      brgemm(padded_rows, end - reverse_begin, D, D, K, K, false, r, keys.reverse_t.data() + 2 * reverse_begin,
             reverse_scores.sized(padded_rows * K) + reverse_begin);
  }

  // Scaled scores of row m, forward up to the split and reversed behind it, into forward_scores; returns keys seen.
  int64_t blend(const Problem& p, const Keys& keys, int64_t m, int64_t split) {
    float* f = forward_scores.data() + m * keys.padded_count;
    const float* r = reverse_scores.data() + m * keys.padded_count;
    int64_t seen = p.causal ? split : keys.count;
    for (int64_t j = 0; j < split; ++j) f[j] *= p.scale;
    for (int64_t j = split; j < seen; ++j) f[j] = r[j] * p.scale;
    return seen;
  }
};

void forward_item(const Problem& p, int64_t document, int64_t head, Keys& keys, Block& block, Buffer<BFloat16>& weights,
                  Buffer<float>& product, BFloat16* out, float* lse) {
  int64_t D = p.D, G = p.group();
  keys.load(p, document, head, false);
  int64_t K = keys.padded_count, step = p.block_tokens(K);
  for (int64_t first = p.offsets[document]; first < p.offsets[document + 1]; first += step) {
    int64_t last = std::min(first + step, p.offsets[document + 1]);
    block.load(p, keys, first, last, head);
    weights.zeroed(block.padded_rows * K);
    product.sized(block.padded_rows * D);
    float totals[kMaxRows];
    for (int64_t m = 0; m < block.rows; ++m) {
      int64_t token = first + m / G, seen = block.blend(p, keys, m, p.split[token]);
      float* s = block.forward_scores.data() + m * K;
      float largest = -std::numeric_limits<float>::infinity(), total = 0.0f;
#pragma omp simd reduction(max : largest)
      for (int64_t j = 0; j < seen; ++j) largest = s[j] > largest ? s[j] : largest;
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < seen; ++j) {
        s[j] = exp_negative(s[j] - largest);
        total += s[j];
      }
      BFloat16* w = weights.data() + m * K;
#pragma omp simd
      for (int64_t j = 0; j < seen; ++j) w[j] = narrow(s[j]);
      totals[m] = total;
      lse[p.rows[token] * p.H + head * G + m % G] = largest + std::log(total);
    }
    brgemm(block.padded_rows, D, block.end, K, D, D, false, weights.data(), keys.value.data(), product.data());
    for (int64_t m = 0; m < block.rows; ++m) {
      BFloat16* target = out + (p.rows[first + m / G] * p.H + head * G + m % G) * D;
      float inverse = 1.0f / totals[m];
      const float* source = product.data() + m * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) target[d] = narrow(source[d] * inverse);
    }
  }
}

struct Gradients {
  const BFloat16 *grad_out, *out;
  const float* lse;
  BFloat16* dq;
  float *dk, *dv;
};

struct BackwardScratch {
  Buffer<BFloat16> d_out, d_out_p, forward_p, reverse_p;   // [M, D], and as B operands
  Buffer<BFloat16> weights, d_forward, d_reverse, turned;  // [M, K], and [K, M]
  Buffer<float> d_weights, dq_forward, dq_reverse, dk_forward, dk_reverse, dv, row;

  void load(const Problem& p, const Gradients& g, Block& block, int64_t first, int64_t head) {
    int64_t D = p.D, G = p.group(), M = block.padded_rows;
    d_out.zeroed(M * D);
    for (int64_t m = 0; m < block.rows; ++m) {
      const BFloat16* source = g.grad_out + (p.rows[first + m / G] * p.H + head * G + m % G) * D;
      std::memcpy(d_out.data() + m * D, source, D * sizeof(BFloat16));
    }
    pack_rows(d_out.data(), M, D, d_out_p.sized(M * D));
    pack_rows(block.forward.data(), M, D, forward_p.sized(M * D));
    pack_rows(block.reverse.data(), M, D, reverse_p.sized(M * D));
  }
};

// Weights and score gradients of row m, split between the two rotations.
void score_gradients(const Problem& p, const Gradients& g, const Keys& keys, Block& block, BackwardScratch& s, int64_t m,
                     int64_t token, int64_t head) {
  int64_t D = p.D, G = p.group(), K = keys.padded_count, split = p.split[token];
  int64_t seen = block.blend(p, keys, m, split), row = p.rows[token] * p.H + head * G + m % G;
  const float* score = block.forward_scores.data() + m * K;
  const float* d_weight = s.d_weights.data() + m * K;
  float lse = g.lse[row], delta = 0.0f;
  const BFloat16 *out = g.out + row * D, *d_out = s.d_out.data() + m * D;
#pragma omp simd reduction(+ : delta)
  for (int64_t d = 0; d < D; ++d) delta += widen(out[d]) * widen(d_out[d]);
  BFloat16 *weight = s.weights.data() + m * K, *forward = s.d_forward.data() + m * K, *reverse = s.d_reverse.data() + m * K;
  auto fill = [&](int64_t begin, int64_t end, BFloat16* gradient) {
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) {
      float difference = score[j] - lse;
      float w = exp_negative(difference > 0.0f ? 0.0f : difference);
      weight[j] = narrow(w);
      gradient[j] = narrow(w * (d_weight[j] - delta) * p.scale);
    }
  };
  fill(0, split, forward);
  fill(split, seen, reverse);
}

void backward_item(const Problem& p, const Gradients& g, int64_t document, int64_t head, Keys& keys, Block& block,
                   BackwardScratch& s) {
  int64_t D = p.D, G = p.group();
  keys.load(p, document, head, true);
  int64_t K = keys.padded_count, step = p.block_tokens(K);
  for (auto* x : {&s.dk_forward, &s.dk_reverse, &s.dv}) x->zeroed(K * D);
  float* gradient = s.row.sized(D);
  for (int64_t first = p.offsets[document]; first < p.offsets[document + 1]; first += step) {
    int64_t last = std::min(first + step, p.offsets[document + 1]);
    block.load(p, keys, first, last, head);
    s.load(p, g, block, first, head);
    int64_t M = block.padded_rows;
    for (auto* x : {&s.weights, &s.d_forward, &s.d_reverse}) x->zeroed(M * K);
    s.turned.sized(M * K);
    s.dq_forward.sized(M * D);
    s.dq_reverse.zeroed(M * D);
    brgemm(M, block.end, D, D, K, K, false, s.d_out.data(), keys.value_t.data(), s.d_weights.sized(M * K));
    for (int64_t m = 0; m < block.rows; ++m) score_gradients(p, g, keys, block, s, m, first + m / G, head);

    transpose(s.weights.data(), K, M, block.end, s.turned.data());
    brgemm(block.end, D, M, M, D, D, true, s.turned.data(), s.d_out_p.data(), s.dv.data());
    transpose(s.d_forward.data(), K, M, block.forward_end, s.turned.data());
    brgemm(block.forward_end, D, M, M, D, D, true, s.turned.data(), s.forward_p.data(), s.dk_forward.data());
    brgemm(M, D, block.forward_end, K, D, D, false, s.d_forward.data(), keys.forward.data(), s.dq_forward.data());
    if (block.reverse_begin < block.end) {
      int64_t begin = block.reverse_begin, count = block.end - begin;
      transpose(s.d_reverse.data() + begin, K, M, count, s.turned.data());
      brgemm(count, D, M, M, D, D, true, s.turned.data(), s.reverse_p.data(), s.dk_reverse.data() + begin * D);
      brgemm(M, D, count, K, D, D, false, s.d_reverse.data() + begin, keys.reverse.data() + begin * D,
             s.dq_reverse.data());
    }
    for (int64_t m = 0; m < block.rows; ++m) {
      int64_t row = p.rows[first + m / G];
      rotate_back(s.dq_forward.data() + m * D, s.dq_reverse.data() + m * D, p.cos + row * D, p.sin + row * D, D,
                  gradient);
      BFloat16* target = g.dq + (row * p.H + head * G + m % G) * D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) target[d] = narrow(gradient[d]);
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

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin, const Tensor& rows,
             const Tensor& split, const Tensor& offsets, const Tensor& key_starts, const Tensor& key_counts, double scale,
             bool causal, Tensor out, Tensor lse) {
  Problem p = describe(q, k, v, cos, sin, rows, split, offsets, key_starts, key_counts, scale, causal);
  TORCH_CHECK(out.is_contiguous() && out.scalar_type() == at::kBFloat16 && lse.is_contiguous() && lse.scalar_type() == at::kFloat);
  auto* out_data = out.data_ptr<BFloat16>();
  auto* lse_data = lse.data_ptr<float>();
  at::parallel_for(0, p.documents * p.N, 1, [&](int64_t begin, int64_t end) {
    Keys keys;
    Block block;
    Buffer<BFloat16> weights;
    Buffer<float> product;
    for (int64_t item = begin; item < end; ++item)
      forward_item(p, item / p.N, item % p.N, keys, block, weights, product, out_data, lse_data);
    at::native::cpublas::brgemm_release();
  });
}

void backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
              const Tensor& out, const Tensor& lse, const Tensor& rows, const Tensor& split, const Tensor& offsets,
              const Tensor& key_starts, const Tensor& key_counts, double scale, bool causal, Tensor dq, Tensor dk, Tensor dv) {
  Problem p = describe(q, k, v, cos, sin, rows, split, offsets, key_starts, key_counts, scale, causal);
  for (const Tensor* x : {&grad_out, &out, static_cast<const Tensor*>(&dq)})
    TORCH_CHECK(x->is_contiguous() && x->scalar_type() == at::kBFloat16);
  for (const Tensor* x : {&lse, static_cast<const Tensor*>(&dk), static_cast<const Tensor*>(&dv)})
    TORCH_CHECK(x->is_contiguous() && x->scalar_type() == at::kFloat);
  Gradients g{grad_out.const_data_ptr<BFloat16>(), out.const_data_ptr<BFloat16>(), lse.const_data_ptr<float>(),
              dq.data_ptr<BFloat16>(), dk.data_ptr<float>(), dv.data_ptr<float>()};
  at::parallel_for(0, p.documents * p.N, 1, [&](int64_t begin, int64_t end) {
    Keys keys;
    Block block;
    BackwardScratch scratch;
    for (int64_t item = begin; item < end; ++item) backward_item(p, g, item / p.N, item % p.N, keys, block, scratch);
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace

TORCH_LIBRARY(bico_ds, m) {
  m.def(
      "tiles_forward(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor rows, Tensor split, Tensor offsets, "
      "Tensor key_starts, Tensor key_counts, float scale, bool causal, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "tiles_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor out, Tensor lse, "
      "Tensor rows, Tensor split, Tensor offsets, Tensor key_starts, Tensor key_counts, float scale, bool causal, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

TORCH_LIBRARY_IMPL(bico_ds, CPU, m) {
  m.impl("tiles_forward", &forward);
  m.impl("tiles_backward", &backward);
}
