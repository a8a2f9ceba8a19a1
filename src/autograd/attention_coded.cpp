#include "ops/attention_common.h"
#include "ops/codes.h"
#include "ops/seed.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using OptionalTensor = std::optional<at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;
using Forward = ops::ForwardResult(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                   const OptionalTensor&, bool, double, double, c10::string_view,
                                   at::IntArrayRef, bool, const OptionalGenerator&);
using Backward = ops::BackwardResult(const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                                     const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                     const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                     const at::Tensor&, const at::Tensor&, c10::SymInt, c10::SymInt, bool,
                                     double, double, c10::string_view, at::IntArrayRef, std::array<bool, 4>);

constexpr const char* kPolicy = "recompute";
// What enters the softmax is rounded finer: its noise goes through an exponential.
constexpr int64_t kScoreBits = 8;

c10::TypedOperatorHandle<Forward> forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::attention_forward", "").typed<Forward>();
  return op;
}

ops::ForwardResult run_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const OptionalTensor& mask, bool causal, double dropout, double scale,
                               at::IntArrayRef window, bool keep, const OptionalGenerator& generator) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return forward_op().call(query, key, value, mask, causal, dropout, scale, kPolicy, window, keep, generator);
}

// Heads lie beside each other in memory, position by position: codes are of that order, which other readers
// of the same numbers share.
ops::Codes code_heads(const at::Tensor& x, int64_t bits, const OptionalGenerator& generator) {
  return ops::shared_codes(x.transpose(1, 2), bits, generator);
}

at::Tensor decode_heads(const at::Tensor& codes, const at::Tensor& table, int64_t bits,
                        c10::SymIntArrayRef shape, at::ScalarType dtype) {
  return ops::decode({codes, table}, bits, {shape[0], shape[2], shape[1], shape[3]}, dtype).transpose(1, 2);
}

void check_bits(int64_t bits) {
  TORCH_CHECK(bits == 8 || bits == 4 || bits == 2, "attention: bits must be 0, 8, 4 or 2, got ", bits);
}

double scale_or_default(const at::Tensor& query, std::optional<double> scale) {
  if (scale.has_value()) return *scale;
  return 1.0 / std::sqrt(static_cast<double>(query.sym_size(3).guard_int(__FILE__, __LINE__)));
}

at::Tensor forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                   const OptionalTensor& mask, bool causal, double dropout, std::optional<double> scale,
                   at::OptionalIntArrayRef window, int64_t bits, const OptionalGenerator& generator) {
  check_bits(bits);
  ops::check_attention(query, key, value, mask, dropout, window.value_or(at::IntArrayRef{}));
  return std::get<0>(run_forward(query, key, value, mask, causal, dropout, scale_or_default(query, scale),
                                 window.value_or(at::IntArrayRef{}), false, generator));
}

struct CodedAttentionFunction : torch::autograd::Function<CodedAttentionFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                            const at::Tensor& value, const OptionalTensor& mask, bool causal, double dropout,
                            double scale, const std::vector<int64_t>& window, int64_t bits,
                            const OptionalGenerator& generator, std::array<bool, 4> needs) {
    const auto [output, lse, probabilities, codes, table, seed] =
        run_forward(query, key, value, mask, causal, dropout, scale, window, true, generator);
    const bool scores = needs[0] || needs[1] || needs[3];
    variable_list saved{lse, probabilities, codes, table, seed, mask.value_or(at::Tensor())};
    const auto add = [&](const at::Tensor& x, int64_t at_bits, bool wanted) {
      const at::AutoDispatchBelowADInplaceOrView below;
      const ops::Codes kept = wanted ? code_heads(x, at_bits, generator) : ops::Codes{};
      if (!wanted) ops::skip_seeds(x, 1, generator);
      saved.push_back(kept.codes);
      saved.push_back(kept.table);
    };
    add(query, std::max(bits, kScoreBits), true);
    add(key, std::max(bits, kScoreBits), true);
    add(value, bits, scores);
    add(output, bits, scores);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["query_shape"] = query.sym_sizes().vec();
    ctx->saved_data["key_shape"] = key.sym_sizes().vec();
    ctx->saved_data["value_shape"] = value.sym_sizes().vec();
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["dropout"] = dropout;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["window"] = window;
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["policy"] = "recompute, bits=" + std::to_string(bits);
    ctx->saved_data["needs"] = std::vector<bool>(needs.begin(), needs.end());
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("remnant::attention_backward", "").typed<Backward>();
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "attention that keeps codes has no gradient of its gradient; use bits 0 and policy 'exact' "
                "where you need one");
    variable_list result(11);
    const variable_list saved = ctx->get_saved_variables();
    const auto shape = [&](const char* name) { return ctx->saved_data[name].toSymIntVector(); };
    const auto query_shape = shape("query_shape"), key_shape = shape("key_shape"),
               value_shape = shape("value_shape");
    auto output_shape = query_shape;
    output_shape[3] = value_shape[3];
    const int64_t bits = ctx->saved_data["bits"].toInt(), score_bits = std::max(bits, kScoreBits);
    const auto type = grads[0].scalar_type();
    const auto read = [&](size_t i, int64_t at_bits, c10::SymIntArrayRef sizes) {
      return saved[i].defined() ? OptionalTensor(decode_heads(saved[i], saved[i + 1], at_bits, sizes, type))
                                : std::nullopt;
    };
    const auto wanted = ctx->saved_data["needs"].toBoolList();
    const auto window = ctx->saved_data["window"].toIntVector();
    const auto [grad_query, grad_key, grad_value, grad_mask] = op.call(
        grads[0], read(6, score_bits, query_shape), read(8, score_bits, key_shape),
        read(10, bits, value_shape), saved[5].defined() ? OptionalTensor(saved[5]) : std::nullopt,
        read(12, bits, output_shape), saved[0], saved[1], saved[2], saved[3], saved[4], key_shape[1],
        key_shape[2], ctx->saved_data["causal"].toBool(), ctx->saved_data["dropout"].toDouble(),
        ctx->saved_data["scale"].toDouble(), kPolicy, window, {wanted[0], wanted[1], wanted[2], wanted[3]});
    result[0] = grad_query;
    result[1] = grad_key;
    result[2] = grad_value;
    result[3] = grad_mask;
    return result;
  }
};

at::Tensor forward_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const OptionalTensor& mask, bool causal, double dropout,
                            std::optional<double> scale, at::OptionalIntArrayRef window, int64_t bits,
                            const OptionalGenerator& generator) {
  const std::array<bool, 4> needs{query.requires_grad(), key.requires_grad(), value.requires_grad(),
                                  mask.has_value() && mask->requires_grad()};
  if (!at::GradMode::is_enabled() || !(needs[0] || needs[1] || needs[2] || needs[3])) {
    const at::Tensor output =
        forward(query, key, value, mask, causal, dropout, scale, window, bits, generator);
    ops::skip_seeds(query, 4, generator);
    return output;
  }
  check_bits(bits);
  const auto bounds = window.value_or(at::IntArrayRef{});
  if (ops::keeps_whole()) {
    const at::Tensor output =
        std::get<0>(forward_op().call(query, key, value, mask, causal, dropout,
                                      scale_or_default(query, scale), kPolicy, bounds, true, generator));
    ops::skip_seeds(query, 4, generator);
    return output;
  }
  ops::check_attention(query, key, value, mask, dropout, bounds);
  return CodedAttentionFunction::apply(query, key, value, mask, causal, dropout,
                                       scale_or_default(query, scale), bounds.vec(), bits, generator, needs);
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, CompositeExplicitAutograd, m) { m.impl("attention_coded", TORCH_FN(forward)); }
TORCH_LIBRARY_IMPL(remnant, Meta, m) { m.impl("attention_coded", TORCH_FN(forward)); }
TORCH_LIBRARY_IMPL(remnant, Autograd, m) { m.impl("attention_coded", TORCH_FN(forward_autograd)); }

}  // namespace remnant::autograd
