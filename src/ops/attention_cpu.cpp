// The CPU's fused kernels: tensors become pointers here, blocks and threads are chosen here.

#include "kernels/cpu/attention_kernels.h"
#include "ops/attention_common.h"
#include "ops/seed.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <numeric>
#include <type_traits>

namespace remnant::ops {

namespace {

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

// narrow: the kernels take bfloat16 as it is.
template <typename T>
void set_view(const at::Tensor& x, bool narrow, kernels::HeadView<const T>& wide,
              kernels::HeadView<const uint16_t>& as_it_is) {
  if (!narrow) {
    wide = view<T>(x);
  } else if (x.defined()) {
    as_it_is = {reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>()), x.stride(0), x.stride(1),
                x.stride(2)};
  }
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
  if (seed.defined() && seed.numel() == 2) problem.seed = seed_of(seed);
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
  problem.row_head = problem.queries;
  problem.row_batch = problem.heads * problem.queries;
  switch (call.policy.kind) {
    case PolicyKind::exact:
      problem.keep = kernels::Keep::probabilities;
      problem.probabilities = const_cast<T*>(residuals.probabilities.const_data_ptr<T>());
      return;
    case PolicyKind::recompute:
      problem.keep = kernels::Keep::lse;
      problem.lse = const_cast<T*>(residuals.lse.const_data_ptr<T>());
      return;
    case PolicyKind::sampled:
      problem.keep = kernels::Keep::sample;
      problem.lse = const_cast<T*>(residuals.lse.const_data_ptr<T>());
      problem.drawn = const_cast<int32_t*>(residuals.codes.const_data_ptr<int32_t>());
      problem.inverse = const_cast<T*>(residuals.table.const_data_ptr<T>());
      problem.slots = residuals.codes.size(3);
      return;
    case PolicyKind::curve:
      problem.keep = kernels::Keep::curve;
      break;
    case PolicyKind::quantized:
      problem.keep = kernels::Keep::codes;
      break;
    case PolicyKind::top:  // runs the composite path
      return;
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
// Threads fetch tasks as they get free: triangles and padding make them unequal, and no result depends on
// who ran which.
template <typename T, typename Problem>
void run(const Problem& problem, void (*kernel)(const Problem&, int64_t, int64_t, void*), int64_t tasks) {
  const int64_t bytes = (kernels::attention_scratch_bytes<T>(problem) + 63) / 64 * 64;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), tasks));
  const at::Tensor scratch = at::empty({threads, bytes}, at::kByte);
  uint8_t* const memory = scratch.mutable_data_ptr<uint8_t>();
  const int64_t chunk = std::max<int64_t>(1, tasks / (threads * 32));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t task = next.fetch_add(chunk); task < tasks; task = next.fetch_add(chunk)) {
        kernel(problem, task, std::min(task + chunk, tasks), memory + t * bytes);
      }
    }
  });
}

// Packed sequences lie one after the other in a batch of one: the problem's batch counts sequences, and
// rows are counted from the tensors' start.
template <typename T>
std::vector<kernels::Sequence> set_packed(kernels::AttentionProblem<T>& problem,
                                          const PackedSequences* packed) {
  if (packed == nullptr) return {};
  std::vector<kernels::Sequence> sequences(packed->first_query.size() - 1);
  for (size_t b = 0; b < sequences.size(); ++b) {
    kernels::Sequence& sequence = sequences[b];
    sequence.first_query = packed->first_query[b];
    sequence.queries = packed->first_query[b + 1] - sequence.first_query;
    sequence.first_key = packed->first_key[b];
    sequence.keys = packed->first_key[b + 1] - sequence.first_key;
  }
  problem.batch = static_cast<int64_t>(sequences.size());
  problem.row_batch = 0;
  problem.row_head = problem.queries;
  problem.queries = packed->longest_query;
  problem.keys = packed->longest_key;
  for (auto* view : {&problem.query, &problem.key, &problem.value}) view->batch = 0;
  for (auto* view : {&problem.narrow_query, &problem.narrow_key, &problem.narrow_value}) view->batch = 0;
  return sequences;
}

template <typename T>
at::Tensor forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                   const AttentionCall& call, const at::Tensor& seed, AttentionResiduals& residuals,
                   const PackedSequences* packed) {
  constexpr auto type = at::CppTypeToScalarType<T>::value;
  const bool narrow = query.scalar_type() == at::kBFloat16 && kernels::cpu_kernels().bfloat16;
  const auto read_as = narrow ? at::kBFloat16 : type;
  const at::Tensor q = readable(query, read_as);
  const at::Tensor k = readable(key, read_as);
  const at::Tensor v = readable(value, read_as);
  at::Tensor output = empty_heads(q.size(0), q.size(1), q.size(2), v.size(3), q.options().dtype(type));
  kernels::AttentionForward<T> problem;
  problem.batch = q.size(0);
  problem.heads = q.size(1);
  problem.kv_heads = k.size(1);
  problem.queries = q.size(2);
  problem.keys = k.size(2);
  problem.head_dim = q.size(3);
  problem.value_dim = v.size(3);
  problem.bfloat16 = narrow;
  set_view(q, narrow, problem.query, problem.narrow_query);
  set_view(k, narrow, problem.key, problem.narrow_key);
  set_view(v, narrow, problem.value, problem.narrow_value);
  problem.output = mutable_view<T>(output);
  at::Tensor mask;
  set_call(problem, call, seed, mask);
  if (keeps(residuals)) set_residuals(problem, call, residuals);
  std::vector<kernels::Sequence> sequences = set_packed(problem, packed);
  if (packed != nullptr) {
    problem.sequences = sequences.data();
    problem.output.batch = 0;
  }
  kernels::choose_tiles<T>(problem);
  if (output.numel() == 0 || problem.keys == 0) {
    if (residuals.codes.scalar_type() == at::kInt) residuals.codes.fill_(-1);
    residuals.table.zero_();
    residuals.lse.fill_(-std::numeric_limits<double>::infinity());
    output.zero_();
  } else {
    const int64_t tasks = kernels::forward_tasks<T>(problem, packed != nullptr ? sequences.data() : nullptr);
    if constexpr (std::is_same_v<T, float>) {
      run<T>(problem, kernels::cpu_kernels().forward_float, tasks);
    } else {
      run<T>(problem, kernels::cpu_kernels().forward_double, tasks);
    }
  }
  return output.scalar_type() == query.scalar_type()
             ? output
             : empty_heads(output.size(0), output.size(1), output.size(2), output.size(3), query.options())
                   .copy_(output);
}

// Shares of a key-value head, so that the threads have equal work when heads are few; no more than tiles.
int64_t backward_lanes(int64_t heads, int64_t tiles) {
  const int64_t threads = at::get_num_threads();
  return heads >= 4 * threads ? 1 : std::min(threads / std::gcd(heads, threads), tiles);
}

template <typename T>
BackwardResult backward(const BackwardInputs& inputs, const AttentionCall& call,
                        const PackedSequences* packed) {
  constexpr auto type = at::CppTypeToScalarType<T>::value;
  // Policy sampled gathers its keys' rows in the accumulation type.
  const bool narrow = inputs.grad_output.scalar_type() == at::kBFloat16 && kernels::cpu_kernels().bfloat16 &&
                      call.policy.kind != PolicyKind::sampled;
  const auto read_as = narrow ? at::kBFloat16 : type;
  const at::Tensor g = readable(inputs.grad_output, read_as);
  const at::Tensor q = readable(inputs.query, read_as);
  const at::Tensor k = readable(inputs.key, read_as);
  const at::Tensor v = readable(inputs.value, read_as);
  const at::Tensor o = readable(inputs.output, read_as);
  kernels::AttentionBackward<T> problem;
  problem.batch = g.size(0);
  problem.heads = g.size(1);
  problem.kv_heads = inputs.kv_heads;
  problem.queries = g.size(2);
  problem.keys = inputs.keys;
  problem.head_dim = q.defined() ? q.size(3) : (k.defined() ? k.size(3) : 0);
  problem.value_dim = g.size(3);
  problem.bfloat16 = narrow;
  set_view(q, narrow, problem.query, problem.narrow_query);
  set_view(k, narrow, problem.key, problem.narrow_key);
  set_view(v, narrow, problem.value, problem.narrow_value);
  set_view(g, narrow, problem.grad_output, problem.narrow_grad_output);
  set_view(o, narrow, problem.output, problem.narrow_output);
  at::Tensor mask;
  set_call(problem, call, inputs.kept.seed, mask);
  set_residuals(problem, call, inputs.kept);
  at::Tensor grad_query, grad_key, grad_value;
  const auto options = g.options().dtype(type);
  // The kernel writes every row, also of gradients that are 0.
  if (inputs.needs[0]) {
    grad_query = empty_heads(problem.batch, problem.heads, problem.queries, problem.head_dim, options);
    problem.grad_query = mutable_view<T>(grad_query);
  }
  if (inputs.needs[1]) {
    grad_key = empty_heads(problem.batch, problem.kv_heads, problem.keys, problem.head_dim, options);
    problem.grad_key = mutable_view<T>(grad_key);
  }
  if (inputs.needs[2]) {
    grad_value = empty_heads(problem.batch, problem.kv_heads, problem.keys, problem.value_dim, options);
    problem.grad_value = mutable_view<T>(grad_value);
  }
  const std::vector<kernels::Sequence> sequences = set_packed(problem, packed);
  if (packed != nullptr) {
    problem.sequences = sequences.data();
    problem.grad_output.batch = problem.output.batch = 0;
    problem.narrow_grad_output.batch = problem.narrow_output.batch = 0;
    for (auto* view : {&problem.grad_query, &problem.grad_key, &problem.grad_value}) view->batch = 0;
  }
  kernels::choose_tiles<T>(problem);
  if (g.numel() > 0 && problem.keys > 0) {
    problem.lanes = backward_lanes(problem.batch * problem.kv_heads,
                                   (problem.keys + problem.tile_keys - 1) / problem.tile_keys);
    for (problem.phase = 0; problem.phase < problem.lanes; ++problem.phase) {
      if constexpr (std::is_same_v<T, float>) {
        run<T>(problem, kernels::cpu_kernels().backward_float, problem.tasks());
      } else {
        run<T>(problem, kernels::cpu_kernels().backward_double, problem.tasks());
      }
    }
  } else {
    for (const at::Tensor& grad : {grad_query, grad_key, grad_value}) {
      if (grad.defined()) grad.zero_();
    }
  }
  const auto finish = [&](const at::Tensor& grad) {
    if (!grad.defined() || grad.scalar_type() == inputs.grad_output.scalar_type()) return grad;
    return empty_heads(grad.size(0), grad.size(1), grad.size(2), grad.size(3), inputs.grad_output.options())
        .copy_(grad);
  };
  return {finish(grad_query), finish(grad_key), finish(grad_value), at::Tensor()};
}

}  // namespace

at::Tensor cpu_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       const AttentionCall& call, const at::Tensor& seed, AttentionResiduals& residuals,
                       const PackedSequences* packed) {
  return (query.scalar_type() == at::kDouble ? forward<double> : forward<float>)(query, key, value, call,
                                                                                 seed, residuals, packed);
}

BackwardResult cpu_backward(const BackwardInputs& inputs, const AttentionCall& call,
                            const PackedSequences* packed) {
  return (inputs.grad_output.scalar_type() == at::kDouble ? backward<double> : backward<float>)(inputs, call,
                                                                                                packed);
}

}  // namespace remnant::ops
