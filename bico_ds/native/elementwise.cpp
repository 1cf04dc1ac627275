// RMSNorm and SwiGLU with their gradients, each one pass over memory. Inputs are bf16 or fp32, arithmetic is fp32, and
// intermediate results are rounded where Hugging Face's Llama rounds them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "scalars.h"

namespace {

using at::Tensor;

constexpr int64_t kRowsAtATime = 64;
constexpr int64_t kElementsAtATime = 1 << 14;
constexpr int64_t kLanes = 16;  // partial sums, so that a sum vectorises without reordering what the source has

float total(const float* lanes) {
  float sum = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// The sum over i of term(i).
template <typename Term>
float sum_over(int64_t n, const Term& term) {
  float lanes[kLanes] = {};
  int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += term(i + j);
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += term(i);
  return total(lanes);
}

// out = weight * round(x * inverse), inverse = 1 / sqrt(mean(x^2) + eps) of each row. x, out [T, E]; inverse fp32 [T].
template <typename T>
void norm_forward(const Tensor& x, const Tensor& weight, double eps, Tensor& out, Tensor& inverse) {
  int64_t E = x.size(1);
  const T *x_data = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
  T* out_data = out.data_ptr<T>();
  float* inverse_data = inverse.data_ptr<float>();
  at::parallel_for(0, x.size(0), kRowsAtATime, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* row = x_data + t * E;
      T* target = out_data + t * E;
      float square = sum_over(E, [&](int64_t i) { return widen(row[i]) * widen(row[i]); });
      float r = 1.0f / std::sqrt(square / E + static_cast<float>(eps));
      inverse_data[t] = r;
#pragma omp simd
      for (int64_t i = 0; i < E; ++i) target[i] = narrow<T>(widen(w[i]) * widen(narrow<T>(widen(row[i]) * r)));
    }
  });
}

// With n = x * inverse and h = grad * weight: dx = inverse * (h - n * mean(h * n)), dweight = sum over rows of grad * n.
// Rows are summed in blocks of a fixed size, in order, so that dweight does not depend on the number of threads.
template <typename T>
void norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& inverse, Tensor& dx,
                   Tensor& dweight) {
  int64_t rows = x.size(0), E = x.size(1), blocks = (rows + kRowsAtATime - 1) / kRowsAtATime;
  const T *grad_data = grad.const_data_ptr<T>(), *x_data = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
  const float* inverse_data = inverse.const_data_ptr<float>();
  T* dx_data = dx.data_ptr<T>();
  std::vector<float> partial(blocks * E);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin * kRowsAtATime; t < std::min(end * kRowsAtATime, rows); ++t) {
      const T *g = grad_data + t * E, *row = x_data + t * E;
      T* target = dx_data + t * E;
      float r = inverse_data[t], *dw = partial.data() + t / kRowsAtATime * E;
      float slope = sum_over(E, [&](int64_t i) { return widen(g[i]) * widen(w[i]) * widen(row[i]) * r; }) / E;
#pragma omp simd
      for (int64_t i = 0; i < E; ++i) {
        float n = widen(row[i]) * r;
        target[i] = narrow<T>(r * (widen(g[i]) * widen(w[i]) - n * slope));
        dw[i] += widen(g[i]) * n;
      }
    }
  });
  std::vector<float> sum(E);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < E; ++i) sum[i] += partial[block * E + i];
  T* dw = dweight.data_ptr<T>();
  for (int64_t i = 0; i < E; ++i) dw[i] = narrow<T>(sum[i]);
}

inline float sigmoid(float x) {
  float e = exp_negative(-std::fabs(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// out = round(silu(gate)) * up, element by element.
template <typename T>
void gate_forward(const Tensor& gate, const Tensor& up, Tensor& out) {
  const T *g = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
  T* target = out.data_ptr<T>();
  at::parallel_for(0, gate.numel(), kElementsAtATime, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      float x = widen(g[i]);
      target[i] = narrow<T>(widen(narrow<T>(x * sigmoid(x))) * widen(u[i]));
    }
  });
}

template <typename T>
void gate_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, Tensor& dgate, Tensor& dup) {
  const T *d = grad.const_data_ptr<T>(), *g = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
  T *dg = dgate.data_ptr<T>(), *du = dup.data_ptr<T>();
  at::parallel_for(0, gate.numel(), kElementsAtATime, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      float x = widen(g[i]), s = sigmoid(x), gradient = widen(d[i]);
      du[i] = narrow<T>(gradient * x * s);
      dg[i] = narrow<T>(gradient * widen(u[i]) * s * (1.0f + x * (1.0f - s)));
    }
  });
}

void check_alike(std::initializer_list<Tensor> tensors, const Tensor& like) {
  TORCH_CHECK(like.scalar_type() == at::kFloat || like.scalar_type() == at::kBFloat16, "takes bf16 and fp32");
  for (const Tensor& tensor : tensors)
    TORCH_CHECK(tensor.is_contiguous() && tensor.sizes() == like.sizes() && tensor.scalar_type() == like.scalar_type());
}

void check_norm(const Tensor& x, const Tensor& weight, const Tensor& inverse) {
  TORCH_CHECK(x.dim() == 2 && weight.is_contiguous() && weight.numel() == x.size(1) && inverse.is_contiguous() &&
              inverse.numel() == x.size(0) && weight.scalar_type() == x.scalar_type());
}

void rms_norm_forward(const Tensor& x, const Tensor& weight, double eps, Tensor out, Tensor inverse) {
  check_alike({x, out}, x);
  check_norm(x, weight, inverse);
  auto run = [&]<typename T>(T) { norm_forward<T>(x, weight, eps, out, inverse); };
  x.scalar_type() == at::kFloat ? run(float()) : run(BFloat16());
}

void rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& inverse, Tensor dx,
                       Tensor dweight) {
  check_alike({grad, x, dx}, x);
  check_alike({dweight}, weight);
  check_norm(x, weight, inverse);
  auto run = [&]<typename T>(T) { norm_backward<T>(grad, x, weight, inverse, dx, dweight); };
  x.scalar_type() == at::kFloat ? run(float()) : run(BFloat16());
}

void swiglu_forward(const Tensor& gate, const Tensor& up, Tensor out) {
  check_alike({gate, up, out}, gate);
  auto run = [&]<typename T>(T) { gate_forward<T>(gate, up, out); };
  gate.scalar_type() == at::kFloat ? run(float()) : run(BFloat16());
}

void swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, Tensor dgate, Tensor dup) {
  check_alike({grad, gate, up, dgate, dup}, gate);
  auto run = [&]<typename T>(T) { gate_backward<T>(grad, gate, up, dgate, dup); };
  gate.scalar_type() == at::kFloat ? run(float()) : run(BFloat16());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bico_ds, m) {
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps, Tensor(a!) out, Tensor(b!) inverse) -> ()");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, Tensor(a!) dx, Tensor(b!) dweight) -> ()");
  m.def("swiglu_forward(Tensor gate, Tensor up, Tensor(a!) out) -> ()");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up, Tensor(a!) dgate, Tensor(b!) dup) -> ()");
}

TORCH_LIBRARY_IMPL(bico_ds, CPU, m) {
  m.impl("rms_norm_forward", &rms_norm_forward);
  m.impl("rms_norm_backward", &rms_norm_backward);
  m.impl("swiglu_forward", &swiglu_forward);
  m.impl("swiglu_backward", &swiglu_backward);
}
