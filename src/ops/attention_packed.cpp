// Attention of packed sequences: checks, the CPU's kernels on sequences where they lie, padding elsewhere.

#include <remnant/ops/attention.h>

#include "kernels/philox.h"
#include "ops/attention_common.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace remnant {

namespace ops {

namespace {

void check_packed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  const auto check_dim = [](const at::Tensor& x, const char* name) {
    TORCH_CHECK(x.dim() == 3, "attention_packed: ", name,
                " must have 3 dimensions [rows of all sequences, heads, head size], got ", x.dim());
  };
  check_dim(query, "query");
  check_dim(key, "key");
  check_dim(value, "value");
}

// [T, H, D] as [1, H, T, D]: a view.
at::Tensor batch_of_one(const at::Tensor& x) { return x.unsqueeze(0).transpose(1, 2); }

std::vector<int64_t> boundaries(const at::Tensor& cu_seqlens, const char* name) {
  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "attention_packed: ", name,
              " must be one row of batch + 1 numbers, got shape ", cu_seqlens.sizes());
  TORCH_CHECK(cu_seqlens.scalar_type() == at::kInt || cu_seqlens.scalar_type() == at::kLong,
              "attention_packed: ", name, " must be int32 or int64, got ",
              toString(cu_seqlens.scalar_type()));
  const at::Tensor numbers = cu_seqlens.to(at::kCPU, at::kLong).contiguous();
  const auto* data = numbers.const_data_ptr<int64_t>();
  return {data, data + numbers.numel()};
}

int64_t check_boundaries(at::IntArrayRef ends, int64_t rows, const char* name) {
  TORCH_CHECK(!ends.empty() && ends.front() == 0 && ends.back() == rows, "attention_packed: ", name,
              " must rise from 0 to the number of rows, ", rows, "; got ", ends);
  int64_t longest = 0;
  for (size_t b = 1; b < ends.size(); ++b) {
    TORCH_CHECK(ends[b] >= ends[b - 1], "attention_packed: ", name, " must not fall, got ", ends[b - 1],
                " before ", ends[b]);
    longest = std::max(longest, ends[b] - ends[b - 1]);
  }
  return longest;
}

PackedSequences make_packed(at::IntArrayRef ends_q, at::IntArrayRef ends_k, int64_t rows_q, int64_t rows_k) {
  TORCH_CHECK(ends_q.size() == ends_k.size(),
              "attention_packed: cu_seqlens_q and cu_seqlens_k must name the "
              "same number of sequences, got ",
              ends_q.size(), " and ", ends_k.size(), " numbers");
  return {ends_q.vec(), ends_k.vec(), check_boundaries(ends_q, rows_q, "cu_seqlens_q"),
          check_boundaries(ends_k, rows_k, "cu_seqlens_k")};
}

// What the policy keeps: rows of all sequences, as wide as the longest of keys; tiles of each sequence.
AttentionResiduals packed_residuals(const at::Tensor& query, const at::Tensor& key, const AttentionCall& call,
                                    const PackedSequences& packed, bool keep) {
  AttentionResiduals residuals = empty_residuals(query, key.narrow(2, 0, packed.longest_key), call, keep);
  if (keep && call.policy.kind == PolicyKind::sampled) {
    const auto batch = static_cast<int64_t>(packed.first_query.size()) - 1;
    const int64_t tiles = (packed.longest_query + kernels::kSampleRows - 1) / kernels::kSampleRows;
    const std::array<int64_t, 4> shape{batch, query.size(1), tiles, residuals.codes.size(3)};
    residuals.codes = at::empty(shape, residuals.codes.options());
    residuals.table = at::empty(shape, residuals.table.options());
  }
  // Shorter sequences leave some of it unwritten.
  if (residuals.codes.dim() > 1) residuals.codes.zero_();
  if (residuals.table.dim() > 1) residuals.table.zero_();
  return residuals;
}

struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

ForwardResult packed_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             at::IntArrayRef ends_q, at::IntArrayRef ends_k, bool causal, double dropout,
                             double scale, c10::string_view policy, at::IntArrayRef window, bool keep,
                             const std::optional<at::Generator>& generator) {
  const NoAutocast no_autocast;
  check_packed(query, key, value);
  const at::Tensor q = batch_of_one(query), k = batch_of_one(key), v = batch_of_one(value);
  check_attention(q, k, v, std::nullopt, dropout, window);
  const AttentionCall call = make_call(std::nullopt, causal, dropout, scale, std::string(policy), window);
  const PackedSequences packed = make_packed(ends_q, ends_k, query.size(0), key.size(0));
  AttentionResiduals residuals = packed_residuals(q, k, call, packed, keep);
  // Also where nothing is kept: see skip_seeds.
  const bool rounds = call.policy.kind == PolicyKind::quantized || call.policy.kind == PolicyKind::sampled;
  at::Tensor seed;
  if (dropout > 0 || rounds) seed = draw_seed(query, generator);
  if (residuals.seed.numel() == 2) residuals.seed = seed;
  const at::Tensor output = cpu_forward(q, k, v, call, seed, residuals, &packed).transpose(1, 2).squeeze(0);
  return {output, residuals.lse, residuals.probabilities, residuals.codes, residuals.table, residuals.seed};
}

ForwardResult packed_forward_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                  at::IntArrayRef ends_q, at::IntArrayRef ends_k, bool causal, double dropout,
                                  double scale, c10::string_view policy, at::IntArrayRef window, bool keep,
                                  const std::optional<at::Generator>& generator) {
  check_packed(query, key, value);
  const at::Tensor q = batch_of_one(query), k = batch_of_one(key);
  check_attention(q, k, batch_of_one(value), std::nullopt, dropout, window);
  const AttentionCall call = make_call(std::nullopt, causal, dropout, scale, std::string(policy), window);
  const PackedSequences packed = make_packed(ends_q, ends_k, query.size(0), key.size(0));
  AttentionResiduals residuals = packed_residuals(q, k, call, packed, keep);
  const at::Tensor output = at::empty({query.size(0), query.size(1), value.size(2)}, query.options());
  return {output, residuals.lse, residuals.probabilities, residuals.codes, residuals.table, residuals.seed};
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Gradients packed_backward(const at::Tensor& grad_output, const std::optional<at::Tensor>& query,
                          const std::optional<at::Tensor>& key, const std::optional<at::Tensor>& value,
                          const std::optional<at::Tensor>& output, at::IntArrayRef ends_q,
                          at::IntArrayRef ends_k, const at::Tensor& lse, const at::Tensor& probabilities,
                          const at::Tensor& codes, const at::Tensor& table, const at::Tensor& seed,
                          int64_t kv_heads, bool causal, double dropout, double scale,
                          c10::string_view policy, at::IntArrayRef window, std::array<bool, 3> needs) {
  const NoAutocast no_autocast;
  const AttentionCall call = make_call(std::nullopt, causal, dropout, scale, std::string(policy), window);
  const PackedSequences packed = make_packed(ends_q, ends_k, grad_output.size(0), ends_k.back());
  const auto wide = [](const std::optional<at::Tensor>& x) {
    return x.has_value() ? batch_of_one(*x) : at::Tensor();
  };
  const BackwardInputs inputs{batch_of_one(grad_output),
                              wide(query),
                              wide(key),
                              wide(value),
                              wide(output),
                              {lse, probabilities, codes, table, seed},
                              kv_heads,
                              ends_k.back(),
                              {needs[0], needs[1], needs[2], false}};
  const auto [grad_query, grad_key, grad_value, unused] = cpu_backward(inputs, call, &packed);
  const auto narrow = [](const at::Tensor& x) { return x.defined() ? x.transpose(1, 2).squeeze(0) : x; };
  return {narrow(grad_query), narrow(grad_key), narrow(grad_value)};
}

Gradients packed_backward_meta(const at::Tensor& grad_output, const std::optional<at::Tensor>& query,
                               const std::optional<at::Tensor>& key, const std::optional<at::Tensor>& value,
                               const std::optional<at::Tensor>& output, at::IntArrayRef ends_q,
                               at::IntArrayRef ends_k, const at::Tensor& lse, const at::Tensor& probabilities,
                               const at::Tensor& codes, const at::Tensor& table, const at::Tensor& seed,
                               int64_t kv_heads, bool causal, double dropout, double scale,
                               c10::string_view policy, at::IntArrayRef window, std::array<bool, 3> needs) {
  const auto options = grad_output.options();
  const at::Tensor none;
  return {needs[0] ? at::empty({grad_output.size(0), grad_output.size(1), key->size(2)}, options) : none,
          needs[1] ? at::empty({ends_k.back(), kv_heads, query->size(2)}, options) : none,
          needs[2] ? at::empty({ends_k.back(), kv_heads, grad_output.size(2)}, options) : none};
}

// Rows of the padded batch for each packed row.
at::Tensor padded_rows(const std::vector<int64_t>& ends, int64_t longest, const at::Tensor& like) {
  std::vector<at::Tensor> rows;
  for (size_t b = 0; b + 1 < ends.size(); ++b) {
    const auto begin = static_cast<int64_t>(b) * longest;
    rows.push_back(at::arange(begin, begin + ends[b + 1] - ends[b], like.options().dtype(at::kLong)));
  }
  return rows.empty() ? at::empty({0}, like.options().dtype(at::kLong)) : at::cat(rows);
}

at::Tensor padded(const at::Tensor& x, const at::Tensor& rows, int64_t batch, int64_t longest) {
  return at::zeros({batch * longest, x.size(1), x.size(2)}, x.options())
      .index_copy(0, rows, x)
      .view({batch, longest, x.size(1), x.size(2)})
      .transpose(1, 2);
}

at::Tensor attention_by_padding(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                const PackedSequences& packed, const AttentionOptions& options) {
  const auto batch = static_cast<int64_t>(packed.first_query.size()) - 1;
  const at::Tensor rows_q = padded_rows(packed.first_query, packed.longest_query, query);
  const at::Tensor rows_k = padded_rows(packed.first_key, packed.longest_key, query);
  const at::Tensor allowed = at::zeros({batch * packed.longest_key}, query.options().dtype(at::kBool))
                                 .index_fill_(0, rows_k, 1)
                                 .view({batch, 1, 1, packed.longest_key});
  AttentionOptions own = options;
  own.mask = allowed;
  const at::Tensor output = attention(padded(query, rows_q, batch, packed.longest_query),
                                      padded(key, rows_k, batch, packed.longest_key),
                                      padded(value, rows_k, batch, packed.longest_key), own);
  return output.transpose(1, 2).reshape({-1, output.size(1), output.size(3)}).index_select(0, rows_q);
}

at::Tensor packed_op(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, bool causal,
                     double dropout, const std::optional<double> scale, c10::string_view policy,
                     at::OptionalIntArrayRef window, const std::optional<at::Generator>& generator) {
  check_packed(query, key, value);
  const auto bounds = window.value_or(at::IntArrayRef{});
  check_attention(batch_of_one(query), batch_of_one(key), batch_of_one(value), std::nullopt, dropout, bounds);
  const double factor =
      scale.value_or(1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(query.size(2), 1))));
  const AttentionCall call = make_call(std::nullopt, causal, dropout, factor, std::string(policy), bounds);
  const std::vector<int64_t> ends_q = boundaries(cu_seqlens_q, "cu_seqlens_q");
  const std::vector<int64_t> ends_k = boundaries(cu_seqlens_k, "cu_seqlens_k");
  const PackedSequences packed = make_packed(ends_q, ends_k, query.size(0), key.size(0));
  if (!query.is_cpu() || !fused_on_cpu() || !fused_policy(call)) {
    AttentionOptions options;
    options.causal = causal;
    options.dropout = dropout;
    options.scale = factor;
    options.policy = call.policy;
    if (!bounds.empty()) options.window = std::make_pair(bounds[0], bounds[1]);
    options.generator = generator;
    return attention_by_padding(query, key, value, packed, options);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::attention_packed_forward", "")
                             .typed<decltype(packed_forward)>();
  const bool keep =
      at::GradMode::is_enabled() && (query.requires_grad() || key.requires_grad() || value.requires_grad());
  return std::get<0>(
      op.call(query, key, value, ends_q, ends_k, causal, dropout, factor, policy, bounds, keep, generator));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("attention_packed", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(packed_op));
  m.impl("attention_packed_forward", c10::DispatchKey::CPU, TORCH_FN(packed_forward));
  m.impl("attention_packed_forward", c10::DispatchKey::Meta, TORCH_FN(packed_forward_meta));
  m.impl("attention_packed_backward", c10::DispatchKey::CPU, TORCH_FN(packed_backward));
  m.impl("attention_packed_backward", c10::DispatchKey::Meta, TORCH_FN(packed_backward_meta));
}

}  // namespace ops

at::Tensor attention_packed(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k,
                            const AttentionOptions& options) {
  TORCH_CHECK(!options.mask.has_value(),
              "attention_packed: packed sequences attend themselves alone and take no mask; use causal or "
              "window, or `attention` with padding");
  std::vector<int64_t> window;
  if (options.window.has_value()) window = {options.window->first, options.window->second};
  // Through the dispatcher, where autocast sees it.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::attention_packed", "")
                             .typed<decltype(ops::packed_op)>();
  return op.call(query, key, value, cu_seqlens_q, cu_seqlens_k, options.causal, options.dropout,
                 options.scale, options.policy.str(), window, options.generator);
}

}  // namespace remnant
