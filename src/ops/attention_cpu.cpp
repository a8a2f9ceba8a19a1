// The CPU's fused kernels: tensors become pointers here, blocks and threads are chosen here.

#include "kernels/cpu/attention_kernels.h"
#include "ops/attention_common.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <type_traits>

// MKL's (or another BLAS's) products as the torch wheel exports them; weak, because not every build does.
extern "C" {
__attribute__((weak)) void sgemm_(const char* transa, const char* transb, const int* m, const int* n,
                                  const int* k, const float* alpha, const float* a, const int* lda,
                                  const float* b, const int* ldb, const float* beta, float* c,
                                  const int* ldc);
__attribute__((weak)) void dgemm_(const char* transa, const char* transb, const int* m, const int* n,
                                  const int* k, const double* alpha, const double* a, const int* lda,
                                  const double* b, const int* ldb, const double* beta, double* c,
                                  const int* ldc);
}

namespace remnant::ops {

namespace {

void blas_gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k, const float* alpha,
               const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
               const int* ldc) {
  sgemm_(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void blas_gemm(const char* ta, const char* tb, const int* m, const int* n, const int* k, const double* alpha,
               const double* a, const int* lda, const double* b, const int* ldb, const double* beta,
               double* c, const int* ldc) {
  dgemm_(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

// Row-major product by a column-major library: C' = op(B)' op(A)'.
template <typename T>
void gemm_blas(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, T alpha, const T* a,
               int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  // A dimension of size 1 may come with any stride, which the library would reject.
  const auto stride = [](int64_t given, int64_t least) {
    return static_cast<int>(std::max<int64_t>(std::max(given, least), 1));
  };
  const int columns = static_cast<int>(n), rows = static_cast<int>(m), depth = static_cast<int>(k);
  const int stride_a = stride(lda, transpose_a ? m : k);
  const int stride_b = stride(ldb, transpose_b ? k : n);
  const int stride_c = stride(ldc, n);
  blas_gemm(transpose_b ? "T" : "N", transpose_a ? "T" : "N", &columns, &rows, &depth, &alpha, b, &stride_b,
            a, &stride_a, &beta, c, &stride_c);
}

template <typename T>
kernels::Gemm<T> choose_gemm() {
  bool blas = false;
  if constexpr (std::is_same_v<T, float>) {
    blas = sgemm_ != nullptr;
  } else {
    blas = dgemm_ != nullptr;
  }
  return blas ? gemm_blas<T> : static_cast<kernels::Gemm<T>>(kernels::gemm_plain);
}

// Rows of a block so that its scores stay in a core's cache, and products are not too thin.
int64_t block_rows(int64_t queries, int64_t keys) {
  const int64_t rows = std::clamp<int64_t>(32768 / std::max<int64_t>(keys, 1), 16, 128);
  return std::max<int64_t>(1, std::min(rows, queries));
}

// The kernels read rows of consecutive elements; a product library wants row strides that do not overlap.
at::Tensor readable(const at::Tensor& x, at::ScalarType type) {
  if (!x.defined()) return x;
  at::Tensor y = x.to(type);
  const bool rows_apart = y.size(2) <= 1 || y.stride(2) >= y.size(3);
  return (y.size(3) <= 1 || y.stride(3) == 1) && rows_apart ? y : y.contiguous();
}

template <typename T>
kernels::HeadView<const T> view(const at::Tensor& x) {
  if (!x.defined()) return {};
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
kernels::HeadView<T> mutable_view(const at::Tensor& x) {
  if (!x.defined()) return {};
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

// `mask` holds a converted additive mask alive.
template <typename T>
void set_call(kernels::AttentionProblem<T>& problem, const AttentionCall& call, const at::Tensor& seed,
              at::Tensor& mask) {
  problem.left = call.left;
  problem.right = call.right;
  problem.scale = static_cast<T>(call.scale);
  problem.gemm = choose_gemm<T>();
  if (seed.defined() && seed.numel() == 2) problem.seed = kernels::Seed::from(seed.const_data_ptr<int64_t>());
  problem.drop_threshold = kernels::dropout_threshold(call.dropout);
  problem.m = call.policy.m;
  problem.paper_text = call.policy.paper_text;
  problem.bits = call.policy.bits;
  if (!call.mask.has_value()) return;
  const bool boolean = call.mask->scalar_type() == at::kBool;
  mask = boolean ? *call.mask : call.mask->to(at::CppTypeToScalarType<T>::value);
  const auto stride = [&](int64_t d) { return mask.size(d) == 1 ? 0 : mask.stride(d); };
  problem.mask = {boolean ? kernels::MaskKind::boolean : kernels::MaskKind::additive,
                  mask.const_data_ptr(),
                  stride(0),
                  stride(1),
                  stride(2),
                  stride(3)};
}

template <typename T>
void set_residuals(kernels::AttentionProblem<T>& problem, const AttentionCall& call,
                   const AttentionResiduals& residuals) {
  switch (call.policy.kind) {
    case PolicyKind::exact:
      problem.keep = kernels::Keep::probabilities;
      problem.probabilities = const_cast<T*>(residuals.probabilities.const_data_ptr<T>());
      return;
    case PolicyKind::recompute:
      problem.keep = kernels::Keep::lse;
      problem.lse = const_cast<T*>(residuals.lse.const_data_ptr<T>());
      return;
    case PolicyKind::curve:
      problem.keep = kernels::Keep::curve;
      break;
    case PolicyKind::quantized:
      problem.keep = kernels::Keep::codes;
      break;
  }
  problem.codes = const_cast<uint8_t*>(residuals.codes.const_data_ptr<uint8_t>());
  problem.code_bytes = residuals.codes.size(3);
  problem.table = const_cast<T*>(residuals.table.const_data_ptr<T>());
  problem.table_width = residuals.table.size(3);
}

bool keeps(const AttentionResiduals& residuals) {
  return residuals.lse.dim() > 1 || residuals.codes.dim() > 1 || residuals.probabilities.dim() > 1;
}

// Runs `tasks` over the threads, each with its own scratch from the c10 allocator, so that it is counted.
template <typename T, typename Problem>
void run(const Problem& problem, void (*kernel)(const Problem&, int64_t, int64_t, void*), int64_t tasks) {
  const int64_t bytes = (kernels::attention_scratch_bytes<T>(problem, problem.block_rows) + 63) / 64 * 64;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), tasks));
  const at::Tensor scratch = at::empty({threads, bytes}, at::kByte);
  uint8_t* const memory = scratch.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernel(problem, tasks * t / threads, tasks * (t + 1) / threads, memory + t * bytes);
    }
  });
}

template <typename T>
at::Tensor forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                   const AttentionCall& call, const at::Tensor& seed, AttentionResiduals& residuals) {
  constexpr auto type = at::CppTypeToScalarType<T>::value;
  const at::Tensor q = readable(query, type);
  const at::Tensor k = readable(key, type);
  const at::Tensor v = readable(value, type);
  at::Tensor output = empty_heads(q.size(0), q.size(1), q.size(2), v.size(3), q.options());
  kernels::AttentionForward<T> problem;
  problem.batch = q.size(0);
  problem.heads = q.size(1);
  problem.kv_heads = k.size(1);
  problem.queries = q.size(2);
  problem.keys = k.size(2);
  problem.head_dim = q.size(3);
  problem.value_dim = v.size(3);
  problem.query = view<T>(q);
  problem.key = view<T>(k);
  problem.value = view<T>(v);
  problem.output = mutable_view<T>(output);
  problem.block_rows = block_rows(problem.queries, problem.keys);
  at::Tensor mask;
  set_call(problem, call, seed, mask);
  if (keeps(residuals)) set_residuals(problem, call, residuals);
  if (output.numel() == 0 || problem.keys == 0) {
    residuals.table.zero_();
    residuals.lse.fill_(-std::numeric_limits<double>::infinity());
    output.zero_();
  } else if constexpr (std::is_same_v<T, float>) {
    run<T>(problem, kernels::cpu_kernels().forward_float, problem.tasks());
  } else {
    run<T>(problem, kernels::cpu_kernels().forward_double, problem.tasks());
  }
  return output.scalar_type() == query.scalar_type()
             ? output
             : empty_heads(output.size(0), output.size(1), output.size(2), output.size(3), query.options())
                   .copy_(output);
}

template <typename T>
BackwardResult backward(const BackwardInputs& inputs, const AttentionCall& call) {
  constexpr auto type = at::CppTypeToScalarType<T>::value;
  const at::Tensor g = readable(inputs.grad_output, type);
  const at::Tensor q = readable(inputs.query, type);
  const at::Tensor k = readable(inputs.key, type);
  const at::Tensor v = readable(inputs.value, type);
  const at::Tensor o = readable(inputs.output, type);
  kernels::AttentionBackward<T> problem;
  problem.batch = g.size(0);
  problem.heads = g.size(1);
  problem.kv_heads = inputs.kv_heads;
  problem.queries = g.size(2);
  problem.keys = inputs.keys;
  problem.head_dim = q.defined() ? q.size(3) : (k.defined() ? k.size(3) : 0);
  problem.value_dim = g.size(3);
  problem.query = view<T>(q);
  problem.key = view<T>(k);
  problem.value = view<T>(v);
  problem.grad_output = view<T>(g);
  problem.output = view<T>(o);
  problem.block_rows = block_rows(problem.queries, problem.keys);
  at::Tensor mask;
  set_call(problem, call, inputs.kept.seed, mask);

  at::Tensor grad_query, grad_key, grad_value;
  const auto options = g.options();
  const auto zeros = [&](int64_t splits, int64_t dim) {
    // Zeroed as laid out, heads beside each other, one copy a split.
    return at::zeros({splits * problem.batch, problem.keys, problem.kv_heads, dim}, options).transpose(1, 2);
  };
  if (inputs.needs[0]) {
    grad_query =
        at::zeros({problem.batch, problem.queries, problem.heads, problem.head_dim}, options).transpose(1, 2);
    problem.grad_query = mutable_view<T>(grad_query);
  }
  // Fewer key-value heads than threads: several tasks share one, each into its own sum.
  const int64_t kv = problem.batch * problem.kv_heads;
  const int64_t work = problem.heads / std::max<int64_t>(problem.kv_heads, 1) *
                       ((problem.queries + problem.block_rows - 1) / problem.block_rows);
  const int64_t wanted = (at::get_num_threads() + std::max<int64_t>(kv, 1) - 1) / std::max<int64_t>(kv, 1);
  problem.splits = std::max<int64_t>(1, std::min(wanted, work));
  if (inputs.needs[1]) {
    grad_key = zeros(problem.splits, problem.head_dim);
    problem.grad_key = mutable_view<T>(grad_key);
    problem.split_stride_key = problem.batch * problem.grad_key.batch;
  }
  if (inputs.needs[2]) {
    grad_value = zeros(problem.splits, problem.value_dim);
    problem.grad_value = mutable_view<T>(grad_value);
    problem.split_stride_value = problem.batch * problem.grad_value.batch;
  }
  if (g.numel() > 0 && problem.keys > 0) {
    set_residuals(problem, call, inputs.kept);
    if constexpr (std::is_same_v<T, float>) {
      run<T>(problem, kernels::cpu_kernels().backward_float, problem.tasks());
    } else {
      run<T>(problem, kernels::cpu_kernels().backward_double, problem.tasks());
    }
  }
  const auto finish = [&](const at::Tensor& grad, bool split) {
    if (!grad.defined()) return grad;
    at::Tensor sum = grad;
    if (split && problem.splits > 1) {
      sum = grad.narrow(0, 0, problem.batch);
      for (int64_t s = 1; s < problem.splits; ++s) sum.add_(grad.narrow(0, s * problem.batch, problem.batch));
    }
    if (sum.scalar_type() == inputs.grad_output.scalar_type() && sum.sizes() == grad.sizes()) return sum;
    return empty_heads(sum.size(0), sum.size(1), sum.size(2), sum.size(3), inputs.grad_output.options())
        .copy_(sum);
  };
  return {finish(grad_query, false), finish(grad_key, true), finish(grad_value, true), at::Tensor()};
}

}  // namespace

at::Tensor cpu_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       const AttentionCall& call, const at::Tensor& seed, AttentionResiduals& residuals) {
  if (query.scalar_type() == at::kDouble) return forward<double>(query, key, value, call, seed, residuals);
  return forward<float>(query, key, value, call, seed, residuals);
}

BackwardResult cpu_backward(const BackwardInputs& inputs, const AttentionCall& call) {
  if (inputs.grad_output.scalar_type() == at::kDouble) return backward<double>(inputs, call);
  return backward<float>(inputs, call);
}

}  // namespace remnant::ops
