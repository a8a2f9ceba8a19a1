#include <remnant/ops/attention.h>

#include "kernels/cpu/attention_kernels.h"
#include "ops/attention_common.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/randint.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

namespace remnant {

namespace ops {

at::ScalarType accumulation_type(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf ? at::kFloat : type;
}

void check_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, double dropout, at::IntArrayRef window) {
  const auto check_dim = [](const at::Tensor& x, const char* name) {
    TORCH_CHECK(x.dim() == 4, "attention: ", name,
                " must have 4 dimensions [batch, heads, length, head size], got ", x.dim());
  };
  check_dim(query, "query");
  check_dim(key, "key");
  check_dim(value, "value");
  const auto type = query.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
              "attention: query must be float32, float64, bfloat16 or float16, got ", toString(type));
  TORCH_CHECK(key.scalar_type() == type && value.scalar_type() == type,
              "attention: query, key and value must have one dtype, got ", toString(type), ", ",
              toString(key.scalar_type()), " and ", toString(value.scalar_type()));
  TORCH_CHECK(key.device() == query.device() && value.device() == query.device(),
              "attention: query, key and value must be on one device, got ", query.device(), ", ",
              key.device(), " and ", value.device());
  TORCH_CHECK(key.sym_size(0) == query.sym_size(0) && value.sym_size(0) == query.sym_size(0),
              "attention: batch sizes differ: query ", query.sym_size(0), ", key ", key.sym_size(0),
              ", value ", value.sym_size(0));
  TORCH_CHECK(key.sym_size(1) == value.sym_size(1), "attention: key has ", key.sym_size(1), " heads, value ",
              value.sym_size(1), "; expected the same number");
  TORCH_CHECK(key.sym_size(1) > 0 ? query.sym_size(1) % key.sym_size(1) == 0 : query.sym_size(1) == 0,
              "attention: the number of key heads must divide the number of query heads, got ",
              query.sym_size(1), " query and ", key.sym_size(1), " key heads");
  TORCH_CHECK(key.sym_size(2) == value.sym_size(2), "attention: key has length ", key.sym_size(2), ", value ",
              value.sym_size(2), "; expected the same");
  TORCH_CHECK(key.sym_size(3) == query.sym_size(3), "attention: query has head size ", query.sym_size(3),
              ", key ", key.sym_size(3), "; expected the same");
  TORCH_CHECK(dropout >= 0 && dropout < 1, "attention: dropout must be in [0, 1), got ", dropout);
  TORCH_CHECK(window.empty() || (window.size() == 2 && window[0] >= -1 && window[1] >= -1),
              "attention: window must be (left, right), each at least 0, or -1 for no bound");
  if (!mask.has_value()) return;
  TORCH_CHECK(mask->device() == query.device(), "attention: mask is on ", mask->device(), ", query on ",
              query.device());
  TORCH_CHECK(mask->scalar_type() == at::kBool || at::isFloatingType(mask->scalar_type()),
              "attention: mask must be boolean (true = attend) or floating point (added), got ",
              toString(mask->scalar_type()));
  TORCH_CHECK(mask->dim() <= 4, "attention: mask must have at most 4 dimensions, got ", mask->dim());
  const std::array<c10::SymInt, 4> full{query.sym_size(0), query.sym_size(1), query.sym_size(2),
                                        key.sym_size(2)};
  for (int64_t d = 0; d < mask->dim(); ++d) {
    const auto have = mask->sym_size(mask->dim() - 1 - d);
    const auto& want = full[static_cast<size_t>(3 - d)];
    TORCH_CHECK(have == 1 || have == want, "attention: mask of shape ", mask->sym_sizes(),
                " does not broadcast to [batch, heads, queries, keys] = [", full[0], ", ", full[1], ", ",
                full[2], ", ", full[3], "]");
  }
}

AttentionCall make_call(const std::optional<at::Tensor>& mask, bool causal, double dropout, double scale,
                        const std::string& policy, at::IntArrayRef window) {
  AttentionCall call;
  call.policy = Policy::parse(policy);
  call.dropout = dropout;
  call.scale = scale;
  if (!window.empty()) {
    call.left = window[0];
    call.right = window[1];
  }
  if (causal) call.right = call.right < 0 ? 0 : std::min<int64_t>(call.right, 0);
  if (mask.has_value()) {
    at::Tensor view = *mask;
    while (view.dim() < 4) view = view.unsqueeze(0);
    call.mask = view;
  }
  return call;
}

at::Tensor empty_heads(c10::SymInt batch, c10::SymInt heads, c10::SymInt rows, c10::SymInt dim,
                       const at::TensorOptions& options) {
  return at::empty_symint({std::move(batch), std::move(rows), std::move(heads), std::move(dim)}, options)
      .transpose(1, 2);
}

AttentionResiduals empty_residuals(const at::Tensor& query, const at::Tensor& key, const AttentionCall& call,
                                   bool keep) {
  const auto options = query.options();
  const auto wide = options.dtype(accumulation_type(query.scalar_type()));
  const at::Tensor none = at::empty({0}, wide);
  const at::Tensor no_codes = at::empty({0}, options.dtype(at::kByte));
  AttentionResiduals residuals{none, at::empty({0}, options), no_codes, none.clone(),
                               at::empty({0}, options.dtype(at::kLong))};
  if (!keep) return residuals;
  const auto batch = query.sym_size(0);
  const auto heads = query.sym_size(1);
  const auto rows = query.sym_size(2);
  const auto keys = key.sym_size(2);
  switch (call.policy.kind) {
    case PolicyKind::exact:
      residuals.probabilities = at::empty_symint({batch, heads, rows, keys}, options);
      break;
    case PolicyKind::recompute:
      residuals.lse = at::empty_symint({batch, heads, rows}, wide);
      break;
    case PolicyKind::curve: {
      // ceil(log2 n) cannot stay symbolic: a compiled program is specialised to the number of keys.
      const int64_t n = keys.guard_int(__FILE__, __LINE__);
      residuals.codes =
          at::empty_symint({batch, heads, rows, kernels::rank_bytes(n)}, options.dtype(at::kByte));
      residuals.table = at::empty_symint({batch, heads, rows, kernels::curve_width(n, call.policy.m)}, wide);
      break;
    }
    case PolicyKind::quantized:
      residuals.codes =
          at::empty_symint({batch, heads, rows, (keys * call.policy.bits + 7) / 8}, options.dtype(at::kByte));
      residuals.table = at::empty_symint({batch, heads, rows, 1}, wide);
      break;
    case PolicyKind::sampled: {
      const auto tiles = (rows + (kernels::kSampleRows - 1)) / kernels::kSampleRows;
      const auto slots = keys.min(call.policy.m);
      residuals.lse = at::empty_symint({batch, heads, rows}, wide);
      residuals.codes = at::empty_symint({batch, heads, tiles, slots}, options.dtype(at::kInt));
      residuals.table = at::empty_symint({batch, heads, tiles, slots}, wide);
      break;
    }
    case PolicyKind::top:
      residuals.lse = at::empty_symint({batch, heads, rows}, wide);
      residuals.codes =
          at::empty_symint({batch, heads, rows, keys.min(call.policy.m)}, options.dtype(at::kInt));
      break;
  }
  if (call.dropout > 0) residuals.seed = at::empty({2}, options.dtype(at::kLong));
  return residuals;
}

at::Tensor draw_seed(const at::Tensor& like, const std::optional<at::Generator>& generator) {
  return at::randint(0, std::numeric_limits<int64_t>::max(), {2}, generator, like.options().dtype(at::kLong));
}

bool fused_on_cpu() {
  // REMNANT_CPU=composite takes the device-independent path, for tests.
  static const bool fused = [] {
    const char* forced = std::getenv("REMNANT_CPU");
    return forced == nullptr || std::string(forced) != "composite";
  }();
  return fused;
}

// Policies that the CPU's fused kernels know; the others run the composite path there too.
bool fused_policy(const AttentionCall& call) { return call.policy.kind != PolicyKind::top; }

namespace {

// Autocast chose the inputs' dtype before; products inside an op must not be cast again.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

// Without dropout, `exact` is the very operations of eager PyTorch. With dropout no eager code draws the
// same mask, so nothing is there to equal, and the fused kernel keeps p as recompute would rebuild it:
// the two policies then give the same bits.
bool exact_is_fused(const AttentionCall& call, at::ScalarType type) {
  return call.dropout > 0 && (type == at::kFloat || type == at::kDouble);
}

// Top spreads what it does not keep over the other keys by sums over all of them, or over a prefix.
void check_policy(const AttentionCall& call) {
  if (call.policy.kind != PolicyKind::top) return;
  const char* way_out = "; use policy 'sampled' or 'recompute' with it";
  TORCH_CHECK(call.left < 0, "attention: policy 'top' takes no window with a bound on the left, got ",
              call.left, way_out);
  if (!call.mask.has_value()) return;
  TORCH_CHECK(call.mask->scalar_type() == at::kBool,
              "attention: policy 'top' takes causal and boolean key-padding masks [B, 1, 1, Nk] only, got an "
              "additive mask",
              way_out);
  TORCH_CHECK(call.mask->sym_size(2) == 1,
              "attention: policy 'top' takes causal and boolean key-padding masks [B, 1, 1, Nk] only, got a "
              "mask of shape ",
              call.mask->sym_sizes(), way_out);
}

ForwardResult forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                      const std::optional<at::Tensor>& mask, bool causal, double dropout, double scale,
                      c10::string_view policy, at::IntArrayRef window, bool keep,
                      const std::optional<at::Generator>& generator, bool fused) {
  const NoAutocast no_autocast;
  check_attention(query, key, value, mask, dropout, window);
  const AttentionCall call = make_call(mask, causal, dropout, scale, std::string(policy), window);
  check_policy(call);
  if (keep && call.policy.kind == PolicyKind::top) {
    TORCH_WARN_ONCE("attention: policy '", call.policy.str(),
                    "' gives biased gradients and is unsafe once attention is peaked (docs/numerics.md); use "
                    "'sampled' for unbiased ones");
  }
  AttentionResiduals residuals = empty_residuals(query, key, call, keep);
  // Also where nothing is kept: see skip_seeds.
  const bool draws = call.policy.kind == PolicyKind::quantized || call.policy.kind == PolicyKind::sampled;
  at::Tensor seed;
  if (dropout > 0 || draws) seed = draw_seed(query, generator);
  at::Tensor output;
  if (call.policy.kind == PolicyKind::exact && !(fused && exact_is_fused(call, query.scalar_type()))) {
    output = exact_forward(query, key, value, call, seed, residuals);
  } else {
    output = fused && fused_policy(call) ? cpu_forward(query, key, value, call, seed, residuals)
                                         : composite_forward(query, key, value, call, seed, residuals);
  }
  if (keep && dropout > 0) residuals.seed = seed;
  return {output, residuals.lse, residuals.probabilities, residuals.codes, residuals.table, residuals.seed};
}

ForwardResult forward_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const std::optional<at::Tensor>& mask, bool causal, double dropout, double scale,
                          c10::string_view policy, at::IntArrayRef window, bool keep,
                          const std::optional<at::Generator>& generator) {
  return forward(query, key, value, mask, causal, dropout, scale, policy, window, keep, generator,
                 fused_on_cpu());
}

ForwardResult forward_composite(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                const std::optional<at::Tensor>& mask, bool causal, double dropout,
                                double scale, c10::string_view policy, at::IntArrayRef window, bool keep,
                                const std::optional<at::Generator>& generator) {
  return forward(query, key, value, mask, causal, dropout, scale, policy, window, keep, generator, false);
}

ForwardResult forward_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const std::optional<at::Tensor>& mask, bool causal, double dropout, double scale,
                           c10::string_view policy, at::IntArrayRef window, bool keep,
                           const std::optional<at::Generator>& generator) {
  check_attention(query, key, value, mask, dropout, window);
  const AttentionCall call = make_call(mask, causal, dropout, scale, std::string(policy), window);
  check_policy(call);
  AttentionResiduals residuals = empty_residuals(query, key, call, keep);
  const at::Tensor output = empty_heads(query.sym_size(0), query.sym_size(1), query.sym_size(2),
                                        value.sym_size(3), query.options());
  return {output, residuals.lse, residuals.probabilities, residuals.codes, residuals.table, residuals.seed};
}

BackwardInputs backward_inputs(const at::Tensor& grad_output, const std::optional<at::Tensor>& query,
                               const std::optional<at::Tensor>& key, const std::optional<at::Tensor>& value,
                               const std::optional<at::Tensor>& output, const at::Tensor& lse,
                               const at::Tensor& probabilities, const at::Tensor& codes,
                               const at::Tensor& table, const at::Tensor& seed, int64_t kv_heads,
                               int64_t keys, std::array<bool, 4> needs) {
  return {grad_output,
          query.value_or(at::Tensor()),
          key.value_or(at::Tensor()),
          value.value_or(at::Tensor()),
          output.value_or(at::Tensor()),
          {lse, probabilities, codes, table, seed},
          kv_heads,
          keys,
          needs};
}

BackwardResult backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& query,
                        const std::optional<at::Tensor>& key, const std::optional<at::Tensor>& value,
                        const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& output,
                        const at::Tensor& lse, const at::Tensor& probabilities, const at::Tensor& codes,
                        const at::Tensor& table, const at::Tensor& seed, int64_t kv_heads, int64_t keys,
                        bool causal, double dropout, double scale, c10::string_view policy,
                        at::IntArrayRef window, std::array<bool, 4> needs, bool fused) {
  const NoAutocast no_autocast;
  const AttentionCall call = make_call(mask, causal, dropout, scale, std::string(policy), window);
  const BackwardInputs inputs = backward_inputs(grad_output, query, key, value, output, lse, probabilities,
                                                codes, table, seed, kv_heads, keys, needs);
  BackwardResult grads;
  const bool plain_exact =
      call.policy.kind == PolicyKind::exact &&
      !(fused && !needs[3] && output.has_value() && exact_is_fused(call, grad_output.scalar_type()));
  if (plain_exact) {
    grads = exact_backward(inputs, call);
  } else {
    // The mask's gradient sums dz over broadcast axes, which the composite path does.
    grads = fused && fused_policy(call) && !needs[3] ? cpu_backward(inputs, call)
                                                     : composite_backward(inputs, call);
  }
  if (needs[3]) std::get<3>(grads) = std::get<3>(grads).view(mask->sizes()).to(mask->scalar_type());
  return grads;
}

BackwardResult backward_cpu(const at::Tensor& grad_output, const std::optional<at::Tensor>& query,
                            const std::optional<at::Tensor>& key, const std::optional<at::Tensor>& value,
                            const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& output,
                            const at::Tensor& lse, const at::Tensor& probabilities, const at::Tensor& codes,
                            const at::Tensor& table, const at::Tensor& seed, int64_t kv_heads, int64_t keys,
                            bool causal, double dropout, double scale, c10::string_view policy,
                            at::IntArrayRef window, std::array<bool, 4> needs) {
  return backward(grad_output, query, key, value, mask, output, lse, probabilities, codes, table, seed,
                  kv_heads, keys, causal, dropout, scale, policy, window, needs, fused_on_cpu());
}

BackwardResult backward_composite(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& query,
    const std::optional<at::Tensor>& key, const std::optional<at::Tensor>& value,
    const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& output, const at::Tensor& lse,
    const at::Tensor& probabilities, const at::Tensor& codes, const at::Tensor& table, const at::Tensor& seed,
    int64_t kv_heads, int64_t keys, bool causal, double dropout, double scale, c10::string_view policy,
    at::IntArrayRef window, std::array<bool, 4> needs) {
  return backward(grad_output, query, key, value, mask, output, lse, probabilities, codes, table, seed,
                  kv_heads, keys, causal, dropout, scale, policy, window, needs, false);
}

BackwardResult backward_meta(const at::Tensor& grad_output, const std::optional<at::Tensor>& query,
                             const std::optional<at::Tensor>& key, const std::optional<at::Tensor>& value,
                             const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& output,
                             const at::Tensor& lse, const at::Tensor& probabilities, const at::Tensor& codes,
                             const at::Tensor& table, const at::Tensor& seed, c10::SymInt kv_heads,
                             c10::SymInt keys, bool causal, double dropout, double scale,
                             c10::string_view policy, at::IntArrayRef window, std::array<bool, 4> needs) {
  const auto options = grad_output.options();
  const auto batch = grad_output.sym_size(0);
  const at::Tensor none;
  return {
      needs[0]
          ? empty_heads(batch, grad_output.sym_size(1), grad_output.sym_size(2), key->sym_size(3), options)
          : none,
      needs[1] ? empty_heads(batch, kv_heads, keys, query->sym_size(3), options) : none,
      needs[2] ? empty_heads(batch, std::move(kv_heads), std::move(keys), grad_output.sym_size(3), options)
               : none,
      needs[3] ? at::empty_symint(mask->sym_sizes(), mask->options()) : none};
}

double default_scale(const at::Tensor& query, const std::optional<double>& scale) {
  if (scale.has_value()) return *scale;
  const auto dim = query.dim() == 4 ? query.sym_size(3).guard_int(__FILE__, __LINE__) : 1;
  return 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(dim, 1)));
}

ForwardResult call_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                           const std::optional<at::Tensor>& mask, bool causal, double dropout,
                           const std::optional<double>& scale, c10::string_view policy,
                           at::IntArrayRef window, const std::optional<at::Generator>& generator) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::attention_forward", "")
                             .typed<decltype(forward_cpu)>();
  const bool keep =
      at::GradMode::is_enabled() && (query.requires_grad() || key.requires_grad() || value.requires_grad() ||
                                     (mask.has_value() && mask->requires_grad()));
  return op.call(query, key, value, mask, causal, dropout, default_scale(query, scale), policy, window, keep,
                 generator);
}

at::Tensor attention_op(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const std::optional<at::Tensor>& mask, bool causal, double dropout,
                        const std::optional<double> scale, c10::string_view policy,
                        at::OptionalIntArrayRef window, const std::optional<at::Generator>& generator) {
  return std::get<0>(call_forward(query, key, value, mask, causal, dropout, scale, policy,
                                  window.value_or(at::IntArrayRef{}), generator));
}

using Weights = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, bool,
                           double, at::IntArrayRef);

c10::TypedOperatorHandle<Weights> weights_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("remnant::attention_weights", "").typed<Weights>();
  return op;
}

std::tuple<at::Tensor, at::Tensor> attention_with_weights_op(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& mask, bool causal, double dropout, const std::optional<double> scale,
    c10::string_view policy, at::OptionalIntArrayRef window, const std::optional<at::Generator>& generator) {
  const auto bounds = window.value_or(at::IntArrayRef{});
  const at::Tensor output =
      std::get<0>(call_forward(query, key, value, mask, causal, dropout, scale, policy, bounds, generator));
  const at::NoGradGuard no_grad;
  std::optional<at::Tensor> detached_mask;
  if (mask.has_value()) detached_mask = mask->detach();
  return {output, weights_op().call(query.detach(), key.detach(), detached_mask, causal,
                                    default_scale(query, scale), bounds)};
}

at::Tensor weights(const at::Tensor& query, const at::Tensor& key, const std::optional<at::Tensor>& mask,
                   bool causal, double scale, at::IntArrayRef window) {
  const NoAutocast no_autocast;
  check_attention(query, key, key, mask, 0.0, window);
  return composite_weights(query, key, make_call(mask, causal, 0.0, scale, "recompute", window));
}

// Weights are detached by definition: nothing is recorded, nothing kept.
at::Tensor weights_autograd(const at::Tensor& query, const at::Tensor& key,
                            const std::optional<at::Tensor>& mask, bool causal, double scale,
                            at::IntArrayRef window) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return weights_op().call(query, key, mask, causal, scale, window);
}

at::Tensor weights_meta(const at::Tensor& query, const at::Tensor& key, const std::optional<at::Tensor>& mask,
                        bool causal, double scale, at::IntArrayRef window) {
  check_attention(query, key, key, mask, 0.0, window);
  return at::empty_symint({query.sym_size(0), query.sym_size(1), query.sym_size(2), key.sym_size(2)},
                          query.options());
}

int64_t residual_bytes_op(c10::string_view policy, int64_t heads, int64_t queries, int64_t keys,
                          int64_t element_bytes, bool dropout) {
  return attention_residual_bytes(Policy::parse({policy.data(), policy.size()}), heads, queries, keys,
                                  element_bytes, dropout);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("attention", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(attention_op));
  m.impl("attention_with_weights", c10::DispatchKey::CompositeImplicitAutograd,
         TORCH_FN(attention_with_weights_op));
  m.impl("attention_weights", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(weights));
  m.impl("attention_weights", c10::DispatchKey::Meta, TORCH_FN(weights_meta));
  m.impl("attention_weights", c10::DispatchKey::Autograd, TORCH_FN(weights_autograd));
  m.impl("attention_forward", c10::DispatchKey::CPU, TORCH_FN(forward_cpu));
  m.impl("attention_forward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(forward_composite));
  m.impl("attention_forward", c10::DispatchKey::Meta, TORCH_FN(forward_meta));
  m.impl("attention_backward", c10::DispatchKey::CPU, TORCH_FN(backward_cpu));
  m.impl("attention_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(backward_composite));
  m.impl("attention_backward", c10::DispatchKey::Meta, TORCH_FN(backward_meta));
  m.impl("attention_residual_bytes", c10::DispatchKey::CompositeImplicitAutograd,
         TORCH_FN(residual_bytes_op));
}

}  // namespace ops

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const AttentionOptions& options) {
  std::vector<int64_t> window;
  if (options.window.has_value()) window = {options.window->first, options.window->second};
  if (options.bits != 0) {
    TORCH_CHECK(options.policy.kind == PolicyKind::recompute,
                "attention: bits needs policy 'recompute', got '", options.policy.str(), "'");
    using Coded = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             const std::optional<at::Tensor>&, bool, double, std::optional<double>,
                             at::OptionalIntArrayRef, int64_t, const std::optional<at::Generator>&);
    static const auto coded =
        c10::Dispatcher::singleton().findSchemaOrThrow("remnant::attention_coded", "").typed<Coded>();
    return coded.call(query, key, value, options.mask, options.causal, options.dropout, options.scale,
                      options.window.has_value() ? at::OptionalIntArrayRef(window) : std::nullopt,
                      options.bits, options.generator);
  }
  // Through the dispatcher, where autocast sees it.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::attention", "")
                             .typed<decltype(ops::attention_op)>();
  return op.call(query, key, value, options.mask, options.causal, options.dropout, options.scale,
                 options.policy.str(), window, options.generator);
}

std::tuple<at::Tensor, at::Tensor> attention_with_weights(const at::Tensor& query, const at::Tensor& key,
                                                          const at::Tensor& value,
                                                          const AttentionOptions& options) {
  std::vector<int64_t> window;
  if (options.window.has_value()) window = {options.window->first, options.window->second};
  // Through the dispatcher, where autocast sees it.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::attention_with_weights", "")
                             .typed<decltype(ops::attention_with_weights_op)>();
  return op.call(query, key, value, options.mask, options.causal, options.dropout, options.scale,
                 options.policy.str(), window, options.generator);
}

int64_t attention_residual_bytes(const Policy& policy, int64_t heads, int64_t queries, int64_t keys,
                                 int64_t element_bytes, bool dropout) {
  TORCH_CHECK(heads >= 0 && queries >= 0 && keys >= 0,
              "attention_residual_bytes: heads, queries and keys must not be negative, got ", heads, ", ",
              queries, " and ", keys);
  const int64_t rows = heads * queries;
  const int64_t wide = std::max<int64_t>(element_bytes, 4);
  const int64_t seed = dropout ? 16 : 0;
  switch (policy.kind) {
    case PolicyKind::exact:
      return rows * keys * element_bytes + seed;
    case PolicyKind::recompute:
      return rows * wide + seed;
    case PolicyKind::curve:
      return rows * (kernels::rank_bytes(keys) + kernels::curve_width(keys, policy.m) * wide) + seed;
    case PolicyKind::quantized:
      return rows * ((keys * policy.bits + 7) / 8 + wide) + seed;
    case PolicyKind::sampled: {
      const int64_t tiles = (queries + kernels::kSampleRows - 1) / kernels::kSampleRows;
      return rows * wide + heads * tiles * std::min(policy.m, keys) * (4 + wide) + seed;
    }
    case PolicyKind::top:
      return rows * (wide + 4 * std::min(policy.m, keys)) + seed;
  }
  return 0;
}

}  // namespace remnant
