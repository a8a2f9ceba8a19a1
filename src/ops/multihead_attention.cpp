#include <remnant/ops/multihead_attention.h>

#include "ops/attention_common.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace remnant {

namespace ops {

namespace {

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Backward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& query, const std::optional<at::Tensor>& memory, const at::Tensor& in_weight,
           const std::optional<at::Tensor>& in_bias, const at::Tensor& out_weight,
           const std::optional<at::Tensor>& out_bias, int64_t heads, const std::optional<at::Tensor>& mask,
           double dropout) {
  TORCH_CHECK(query.dim() == 3, "multihead_attention: query must be [B, N, E], got ", query.dim(),
              " dimensions");
  const auto dim = query.sym_size(2);
  const auto type = query.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
              "multihead_attention: query must be float32, float64, bfloat16 or float16, got ",
              toString(type));
  TORCH_CHECK(heads >= 1 && dim % heads == 0, "multihead_attention: heads must divide E = ", dim, ", got ",
              heads);
  TORCH_CHECK(!memory.has_value() || (memory->dim() == 3 && memory->sym_size(0) == query.sym_size(0) &&
                                      memory->sym_size(2) == dim),
              "multihead_attention: memory must be [", query.sym_size(0), ", M, ", dim, "], got ",
              memory->sym_sizes());
  TORCH_CHECK(in_weight.dim() == 2 && in_weight.sym_size(0) == dim * 3 && in_weight.sym_size(1) == dim,
              "multihead_attention: in_weight must be [", dim * 3, ", ", dim, "], got ",
              in_weight.sym_sizes());
  TORCH_CHECK(!in_bias.has_value() || (in_bias->dim() == 1 && in_bias->sym_size(0) == dim * 3),
              "multihead_attention: in_bias must be [", dim * 3, "], got ", in_bias->sym_sizes());
  TORCH_CHECK(out_weight.dim() == 2 && out_weight.sym_size(1) == dim,
              "multihead_attention: out_weight must be [G, ", dim, "], got ", out_weight.sym_sizes());
  TORCH_CHECK(
      !out_bias.has_value() || (out_bias->dim() == 1 && out_bias->sym_size(0) == out_weight.sym_size(0)),
      "multihead_attention: out_bias must be [", out_weight.sym_size(0), "], got ", out_bias->sym_sizes());
  for (const std::optional<at::Tensor>& each : {memory, std::optional<at::Tensor>(in_weight), in_bias,
                                                std::optional<at::Tensor>(out_weight), out_bias}) {
    TORCH_CHECK(!each.has_value() || each->scalar_type() == type,
                "multihead_attention: inputs, weights and biases must have one dtype, got ", toString(type),
                " and ", toString(each->scalar_type()));
  }
  TORCH_CHECK(dropout >= 0 && dropout < 1, "multihead_attention: dropout must be in [0, 1), got ", dropout);
  TORCH_CHECK(!mask.has_value() || mask->dim() <= 4,
              "multihead_attention: mask must have at most 4 dimensions, got ", mask->dim());
}

// Sequences are taken a few at a time, about this many positions: products are long enough for full speed,
// and what they make stays in cache. Neither threads nor the batch decide, as each group has a seed of its
// own.
int64_t group_size(const at::Tensor& query, const std::optional<at::Tensor>& memory) {
  const int64_t positions = query.device().is_cpu() ? 1024 : 16384;
  const int64_t longest = std::max(query.size(1), memory.has_value() ? memory->size(1) : 0);
  return std::clamp<int64_t>(positions / std::max<int64_t>(longest, 1), 1,
                             std::max<int64_t>(query.size(0), 1));
}

struct Block {
  at::Tensor in_weight;
  std::optional<at::Tensor> in_bias;
  int64_t heads = 1;
  AttentionCall call;
  bool fused = false;
};

Block make_block(const at::Tensor& query, const at::Tensor& in_weight,
                 const std::optional<at::Tensor>& in_bias, int64_t heads,
                 const std::optional<at::Tensor>& mask, bool causal, double dropout) {
  Block block{in_weight, in_bias, heads, {}, query.device().is_cpu() && fused_on_cpu()};
  const double head_dim = static_cast<double>(query.size(2)) / static_cast<double>(heads);
  block.call = make_call(mask, causal, dropout, 1.0 / std::sqrt(std::max(head_dim, 1.0)), "recompute", {});
  return block;
}

// The mask of sequences [first, first + count).
AttentionCall call_of_group(const Block& block, int64_t first, int64_t count) {
  AttentionCall call = block.call;
  if (call.mask.has_value() && call.mask->size(0) > 1) call.mask = call.mask->narrow(0, first, count);
  return call;
}

// x [n, N, E] through `parts` of the stacked projections from `part` on: each [n, heads, N, E / heads].
std::vector<at::Tensor> project(const Block& block, const at::Tensor& x, int64_t part, int64_t parts) {
  const int64_t dim = x.size(2);
  const at::Tensor weight = block.in_weight.narrow(0, part * dim, parts * dim);
  const at::Tensor rows = x.reshape({-1, dim});
  const at::Tensor made = block.in_bias.has_value()
                              ? at::addmm(block.in_bias->narrow(0, part * dim, parts * dim), rows, weight.t())
                              : at::mm(rows, weight.t());
  return made.view({x.size(0), x.size(1), parts, block.heads, dim / block.heads})
      .permute({2, 0, 3, 1, 4})
      .unbind(0);
}

std::vector<at::Tensor> project(const Block& block, const at::Tensor& query,
                                const std::optional<at::Tensor>& memory) {
  if (!memory.has_value()) return project(block, query, 0, 3);
  std::vector<at::Tensor> parts = project(block, query, 0, 1);
  for (at::Tensor& part : project(block, *memory, 1, 2)) parts.push_back(std::move(part));
  return parts;
}

at::Tensor attend(const Block& block, const AttentionCall& call, const std::vector<at::Tensor>& qkv,
                  const at::Tensor& seed, AttentionResiduals& residuals) {
  return block.fused ? cpu_forward(qkv[0], qkv[1], qkv[2], call, seed, residuals)
                     : composite_forward(qkv[0], qkv[1], qkv[2], call, seed, residuals);
}

// [n, heads, N, D] to rows [n N, E].
at::Tensor merge(const at::Tensor& heads) {
  return heads.transpose(1, 2).reshape({heads.size(0) * heads.size(2), heads.size(1) * heads.size(3)});
}

std::optional<at::Tensor> group_of(const std::optional<at::Tensor>& x, int64_t first, int64_t count) {
  return x.has_value() ? std::optional<at::Tensor>(x->narrow(0, first, count)) : std::nullopt;
}

at::Tensor seed_of_group(const at::Tensor& seeds, int64_t group) {
  return seeds.numel() > 0 ? seeds.select(0, group) : at::Tensor();
}

Forward forward(const at::Tensor& query, const std::optional<at::Tensor>& memory, const at::Tensor& in_weight,
                const std::optional<at::Tensor>& in_bias, const at::Tensor& out_weight,
                const std::optional<at::Tensor>& out_bias, int64_t heads,
                const std::optional<at::Tensor>& mask, bool causal, double dropout, bool keep,
                const std::optional<at::Generator>& generator) {
  check(query, memory, in_weight, in_bias, out_weight, out_bias, heads, mask, dropout);
  const Block block = make_block(query, in_weight, in_bias, heads, mask, causal, dropout);
  const auto options = query.options();
  const auto wide = options.dtype(accumulation_type(query.scalar_type()));
  const int64_t batch = query.size(0), length = query.size(1), dim = query.size(2);
  const int64_t step = group_size(query, memory), groups = (batch + step - 1) / step;
  at::Tensor output = at::empty({batch, length, out_weight.size(0)}, options);
  at::Tensor attended = keep ? at::empty({batch, length, dim}, options) : at::empty({0}, options);
  at::Tensor lse = keep ? at::empty({batch, heads, length}, wide) : at::empty({0}, wide);
  at::Tensor seeds = at::empty({0}, options.dtype(at::kLong));
  if (dropout > 0) {
    seeds = at::empty({groups, 2}, options.dtype(at::kLong));
    for (int64_t g = 0; g < groups; ++g) seeds.select(0, g).copy_(draw_seed(query, generator));
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * step, count = std::min(step, batch - first);
    const std::vector<at::Tensor> qkv =
        project(block, query.narrow(0, first, count), group_of(memory, first, count));
    const AttentionCall call = call_of_group(block, first, count);
    if (g == 0) check_attention(qkv[0], qkv[1], qkv[2], call.mask, dropout, {});
    AttentionResiduals residuals = empty_residuals(qkv[0], qkv[1], call, keep);
    const at::Tensor rows = merge(attend(block, call, qkv, seed_of_group(seeds, g), residuals));
    if (keep) {
      attended.narrow(0, first, count).copy_(rows.view({count, length, dim}));
      lse.narrow(0, first, count).copy_(residuals.lse);
    }
    at::Tensor out = output.narrow(0, first, count).view({count * length, -1});
    if (out_bias.has_value()) {
      at::addmm_out(out, *out_bias, rows, out_weight.t());
    } else {
      at::mm_out(out, rows, out_weight.t());
    }
  }
  return {output, attended, lse, seeds};
}

// sum += a^T b, in sum's dtype.
void add_product(at::Tensor sum, const at::Tensor& a, const at::Tensor& b) {
  if (sum.scalar_type() == a.scalar_type()) {
    sum.addmm_(a.t(), b);
  } else {
    sum.add_(a.t().mm(b));
  }
}

// The gradients of projections `part`, `part` + 1, ... of x, from their outputs' [n N, E] each.
struct ProjectionGradients {
  at::Tensor in_weight, in_bias;  // undefined where not wanted

  void add(const std::vector<at::Tensor>& grads, int64_t part, const at::Tensor& x_rows) {
    const int64_t dim = x_rows.size(1);
    for (size_t i = 0; i < grads.size(); ++i) {
      const int64_t first = (part + static_cast<int64_t>(i)) * dim;
      if (in_weight.defined()) add_product(in_weight.narrow(0, first, dim), grads[i], x_rows);
      if (in_bias.defined())
        in_bias.narrow(0, first, dim).add_(grads[i].sum(0, false, in_bias.scalar_type()));
    }
  }
};

// sum of grads[i] W[part + i], into the group's rows of `into`.
void to_input(const Block& block, const std::vector<at::Tensor>& grads, int64_t part, at::Tensor into) {
  const int64_t dim = into.size(1);
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor weight = block.in_weight.narrow(0, (part + static_cast<int64_t>(i)) * dim, dim);
    if (i == 0) {
      at::mm_out(into, grads[i], weight);
    } else {
      into.addmm_(grads[i], weight);
    }
  }
}

Backward backward(const at::Tensor& grad_output, const at::Tensor& query,
                  const std::optional<at::Tensor>& memory, const at::Tensor& in_weight,
                  const std::optional<at::Tensor>& in_bias, const at::Tensor& out_weight,
                  const at::Tensor& attended, const at::Tensor& lse, const at::Tensor& seeds, int64_t heads,
                  const std::optional<at::Tensor>& mask, bool causal, double dropout,
                  std::array<bool, 6> needs) {
  const Block block = make_block(query, in_weight, in_bias, heads, mask, causal, dropout);
  const auto options = query.options();
  const auto wide = options.dtype(accumulation_type(query.scalar_type()));
  const int64_t batch = query.size(0), length = query.size(1), dim = query.size(2);
  const int64_t out_dim = out_weight.size(0);
  const bool kept = attended.dim() == 3;
  const auto sum_like = [&](bool needed, at::IntArrayRef shape) {
    return needed ? at::zeros(shape, wide) : at::empty({0}, wide);
  };
  at::Tensor grad_query = needs[0] ? at::empty(query.sizes(), options) : at::empty({0}, options);
  at::Tensor grad_memory = needs[1] ? at::empty(memory->sizes(), options) : at::empty({0}, options);
  at::Tensor grad_in_weight = sum_like(needs[2], in_weight.sizes());
  at::Tensor grad_in_bias = sum_like(needs[3], {3 * dim});
  at::Tensor grad_out_weight = sum_like(needs[4], {out_dim, dim});
  at::Tensor grad_out_bias = sum_like(needs[5], {out_dim});
  ProjectionGradients projections{needs[2] ? grad_in_weight : at::Tensor(),
                                  needs[3] ? grad_in_bias : at::Tensor()};
  const bool through = needs[0] || needs[1] || needs[2] || needs[3];  // past the output projection
  const int64_t step = group_size(query, memory);
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = std::min(step, batch - first);
    const at::Tensor g_rows = grad_output.narrow(0, first, count).reshape({count * length, out_dim});
    if (needs[5]) grad_out_bias.add_(g_rows.sum(0, false, wide.dtype().toScalarType()));
    if (!through && !needs[4]) continue;
    const at::Tensor x = query.narrow(0, first, count);
    const std::optional<at::Tensor> m = group_of(memory, first, count);
    const at::Tensor seed = seed_of_group(seeds, first / step);
    const AttentionCall call = call_of_group(block, first, count);
    std::vector<at::Tensor> qkv;
    if (through || !kept) qkv = project(block, x, m);
    AttentionResiduals residuals;
    at::Tensor attended_heads;
    if (kept) {
      residuals = empty_residuals(x.unsqueeze(1), x.unsqueeze(1), call, false);
      residuals.lse = lse.narrow(0, first, count);
      attended_heads =
          attended.narrow(0, first, count).view({count, length, heads, dim / heads}).transpose(1, 2);
    } else {
      residuals = empty_residuals(qkv[0], qkv[1], call, true);
      attended_heads = attend(block, call, qkv, seed, residuals);
    }
    if (dropout > 0) residuals.seed = seed;
    if (needs[4]) add_product(grad_out_weight, g_rows, merge(attended_heads));
    if (!through) continue;
    const at::Tensor grad_heads =
        g_rows.mm(out_weight).view({count, length, heads, dim / heads}).transpose(1, 2);
    const BackwardInputs inputs{grad_heads, qkv[0],         qkv[1],
                                qkv[2],     attended_heads, residuals,
                                heads,      qkv[1].size(2), {true, true, true, false}};
    auto [dq, dk, dv, dmask] = block.fused ? cpu_backward(inputs, call) : composite_backward(inputs, call);
    const at::Tensor x_rows = x.reshape({count * length, dim});
    if (m.has_value()) {
      const std::vector<at::Tensor> grad_q{merge(dq)}, grad_kv{merge(dk), merge(dv)};
      projections.add(grad_q, 0, x_rows);
      projections.add(grad_kv, 1, m->reshape({-1, dim}));
      if (needs[0]) to_input(block, grad_q, 0, grad_query.narrow(0, first, count).view({-1, dim}));
      if (needs[1]) to_input(block, grad_kv, 1, grad_memory.narrow(0, first, count).view({-1, dim}));
    } else {
      const std::vector<at::Tensor> grads{merge(dq), merge(dk), merge(dv)};
      projections.add(grads, 0, x_rows);
      if (needs[0]) to_input(block, grads, 0, grad_query.narrow(0, first, count).view({-1, dim}));
    }
  }
  const auto type = query.scalar_type();
  return {grad_query,
          grad_memory,
          grad_in_weight.to(type),
          grad_in_bias.to(type),
          grad_out_weight.to(type),
          grad_out_bias.to(type)};
}

Forward forward_meta(const at::Tensor& query, const std::optional<at::Tensor>& memory,
                     const at::Tensor& in_weight, const std::optional<at::Tensor>& in_bias,
                     const at::Tensor& out_weight, const std::optional<at::Tensor>& out_bias, int64_t heads,
                     const std::optional<at::Tensor>& mask, bool causal, double dropout, bool keep,
                     const std::optional<at::Generator>& generator) {
  check(query, memory, in_weight, in_bias, out_weight, out_bias, heads, mask, dropout);
  const auto options = query.options();
  const auto wide = options.dtype(accumulation_type(query.scalar_type()));
  const auto batch = query.sym_size(0), length = query.sym_size(1);
  const at::Tensor seeds = at::empty({0}, options.dtype(at::kLong));
  const int64_t groups =
      dropout > 0 ? (query.size(0) + group_size(query, memory) - 1) / group_size(query, memory) : 0;
  return {at::empty_symint({batch, length, out_weight.sym_size(0)}, options),
          keep ? at::empty_symint({batch, length, query.sym_size(2)}, options) : at::empty({0}, options),
          keep ? at::empty_symint({batch, heads, length}, wide) : at::empty({0}, wide),
          dropout > 0 ? at::empty({groups, 2}, seeds.options()) : seeds};
}

Backward backward_meta(const at::Tensor& grad_output, const at::Tensor& query,
                       const std::optional<at::Tensor>& memory, const at::Tensor& in_weight,
                       const std::optional<at::Tensor>& in_bias, const at::Tensor& out_weight,
                       const at::Tensor& attended, const at::Tensor& lse, const at::Tensor& seeds,
                       int64_t heads, const std::optional<at::Tensor>& mask, bool causal, double dropout,
                       std::array<bool, 6> needs) {
  const auto make = [&](bool needed, c10::SymIntArrayRef shape) {
    return needed ? at::empty_symint(shape, query.options()) : at::empty({0}, query.options());
  };
  return {make(needs[0], query.sym_sizes()),
          needs[1] ? at::empty_symint(memory->sym_sizes(), query.options()) : at::empty({0}, query.options()),
          make(needs[2], in_weight.sym_sizes()),
          make(needs[3], {in_weight.sym_size(0)}),
          make(needs[4], out_weight.sym_sizes()),
          make(needs[5], {out_weight.sym_size(0)})};
}

at::Tensor multihead_attention_op(const at::Tensor& query, const std::optional<at::Tensor>& memory,
                                  const at::Tensor& in_weight, const std::optional<at::Tensor>& in_bias,
                                  const at::Tensor& out_weight, const std::optional<at::Tensor>& out_bias,
                                  int64_t heads, const std::optional<at::Tensor>& mask, bool causal,
                                  double dropout, bool keep_output,
                                  const std::optional<at::Generator>& generator) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::multihead_attention_forward", "")
                             .typed<decltype(forward)>();
  return std::get<0>(op.call(query, memory, in_weight, in_bias, out_weight, out_bias, heads, mask, causal,
                             dropout, keep_output, generator));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("multihead_attention", c10::DispatchKey::CompositeImplicitAutograd,
         TORCH_FN(multihead_attention_op));
  m.impl("multihead_attention_forward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(forward));
  m.impl("multihead_attention_forward", c10::DispatchKey::Meta, TORCH_FN(forward_meta));
  m.impl("multihead_attention_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(backward));
  m.impl("multihead_attention_backward", c10::DispatchKey::Meta, TORCH_FN(backward_meta));
}

}  // namespace ops

at::Tensor multihead_attention(const at::Tensor& query, const std::optional<at::Tensor>& memory,
                               const at::Tensor& in_weight, const std::optional<at::Tensor>& in_bias,
                               const at::Tensor& out_weight, const std::optional<at::Tensor>& out_bias,
                               const MultiheadAttentionCall& call) {
  return ops::multihead_attention_op(query, memory, in_weight, in_bias, out_weight, out_bias, call.heads,
                                     call.mask, call.causal, call.dropout, call.keep_output, call.generator);
}

bool keeps_attention_output(int64_t keys, int64_t embed_dim) {
  // A position's attention multiplies 2 n E numbers, its projections to q, k and v 3 E^2.
  return 2 * keys > 3 * embed_dim;
}

}  // namespace remnant
