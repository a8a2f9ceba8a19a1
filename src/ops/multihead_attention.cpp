#include <remnant/ops/multihead_attention.h>

#include "ops/attention_common.h"
#include "ops/product.h"
#include "ops/step_common.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
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
  check_floating("multihead_attention", "query", query);
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

// Positions whose projections are made at once: enough for full-speed products, and what they make stays in
// cache.
int64_t positions_at_once(const at::Tensor& query) { return query.device().is_cpu() ? 1024 : 16384; }

int64_t longest(const at::Tensor& query, const std::optional<at::Tensor>& memory) {
  return std::max<int64_t>({query.size(1), memory.has_value() ? memory->size(1) : 0, 1});
}

// Sequences are taken a few at a time, and of one that is long some of the heads at a time. Neither threads
// nor the batch decide, as each such part has a seed of its own.
int64_t group_size(const at::Tensor& query, const std::optional<at::Tensor>& memory) {
  return std::clamp<int64_t>(positions_at_once(query) / longest(query, memory), 1,
                             std::max<int64_t>(query.size(0), 1));
}

int64_t heads_at_once(const at::Tensor& query, const std::optional<at::Tensor>& memory, int64_t heads) {
  // Twice the positions of a group: halves of what fits are no gain.
  return std::clamp<int64_t>(heads * 2 * positions_at_once(query) / longest(query, memory), 1, heads);
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

struct Range {
  int64_t first = 0, count = 0;
};

// The mask of some sequences and heads.
AttentionCall call_of(const Block& block, Range sequences, Range heads) {
  AttentionCall call = block.call;
  if (!call.mask.has_value()) return call;
  if (call.mask->size(0) > 1) call.mask = call.mask->narrow(0, sequences.first, sequences.count);
  if (call.mask->size(1) > 1) call.mask = call.mask->narrow(1, heads.first, heads.count);
  return call;
}

// The rows of the stacked projections that make `heads` of projection `part`: 0 query, 1 key, 2 value.
Range rows_of(const Block& block, int64_t part, Range heads) {
  const int64_t dim = block.in_weight.size(1), head_dim = dim / block.heads;
  return {part * dim + heads.first * head_dim, heads.count * head_dim};
}

// x [n, N, E] through projections `part` to `part` + `parts` - 1: each [n, heads, N, E / all heads].
std::vector<at::Tensor> project(const Block& block, const at::Tensor& x, int64_t part, int64_t parts,
                                Range heads) {
  const int64_t head_dim = x.size(2) / block.heads;
  const at::Tensor rows = as_rows(x);
  const auto projected = [&](Range of) {
    const at::Tensor weight = block.in_weight.narrow(0, of.first, of.count).t();
    if (!block.in_bias.has_value()) return product(rows, weight);
    return product(rows, weight, block.in_bias->narrow(0, of.first, of.count));
  };
  if (heads.count == block.heads) {
    const Range first = rows_of(block, part, heads);
    return projected({first.first, parts * first.count})
        .view({x.size(0), x.size(1), parts, heads.count, head_dim})
        .permute({2, 0, 3, 1, 4})
        .unbind(0);
  }
  std::vector<at::Tensor> made;
  made.reserve(static_cast<size_t>(parts));
  for (int64_t i = 0; i < parts; ++i) {
    made.push_back(projected(rows_of(block, part + i, heads))
                       .view({x.size(0), x.size(1), heads.count, head_dim})
                       .transpose(1, 2));
  }
  return made;
}

std::vector<at::Tensor> project(const Block& block, const at::Tensor& query,
                                const std::optional<at::Tensor>& memory, Range heads) {
  if (!memory.has_value()) return project(block, query, 0, 3, heads);
  std::vector<at::Tensor> parts = project(block, query, 0, 1, heads);
  for (at::Tensor& part : project(block, *memory, 1, 2, heads)) parts.push_back(std::move(part));
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

at::Tensor seed_of(const at::Tensor& seeds, int64_t part) {
  return seeds.numel() > 0 ? seeds.select(0, part) : at::Tensor();
}

int64_t parts_of(const at::Tensor& query, const std::optional<at::Tensor>& memory, int64_t heads) {
  const int64_t step = group_size(query, memory), wide = heads_at_once(query, memory, heads);
  return (query.size(0) + step - 1) / step * ((heads + wide - 1) / wide);
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
  const int64_t step = group_size(query, memory), wide_heads = heads_at_once(query, memory, heads);
  at::Tensor output = at::empty({batch, length, out_weight.size(0)}, options);
  at::Tensor attended = keep ? at::empty({batch, length, dim}, options) : at::empty({0}, options);
  at::Tensor lse = keep ? at::empty({batch, heads, length}, wide) : at::empty({0}, wide);
  at::Tensor seeds = at::empty({0}, options.dtype(at::kLong));
  if (dropout > 0) {
    const int64_t parts = parts_of(query, memory, heads);
    seeds = at::empty({parts, 2}, options.dtype(at::kLong));
    for (int64_t part = 0; part < parts; ++part) seeds.select(0, part).copy_(draw_seed(query, generator));
  }
  int64_t part = 0;
  for (int64_t first = 0; first < batch; first += step) {
    const Range sequences{first, std::min(step, batch - first)};
    const at::Tensor x = query.narrow(0, first, sequences.count);
    const std::optional<at::Tensor> m = group_of(memory, first, sequences.count);
    at::Tensor out =
        output.narrow(0, first, sequences.count).view({sequences.count * length, output.size(2)});
    for (int64_t head = 0; head < heads; head += wide_heads, ++part) {
      const Range some{head, std::min(wide_heads, heads - head)};
      const std::vector<at::Tensor> qkv = project(block, x, m, some);
      const AttentionCall call = call_of(block, sequences, some);
      if (part == 0) {
        const auto all_heads = [&](const at::Tensor& each) {
          return each.narrow(1, 0, 1).expand({-1, heads, -1, -1});
        };
        check_attention(all_heads(qkv[0]), all_heads(qkv[1]), all_heads(qkv[2]),
                        call_of(block, sequences, {0, heads}).mask, dropout, {});
      }
      AttentionResiduals residuals = empty_residuals(qkv[0], qkv[1], call, keep);
      const at::Tensor rows = merge(attend(block, call, qkv, seed_of(seeds, part), residuals));
      const int64_t column = head * (dim / heads);
      if (keep) {
        attended.narrow(0, first, sequences.count)
            .narrow(2, column, rows.size(1))
            .copy_(rows.view({sequences.count, length, rows.size(1)}));
        lse.narrow(0, first, sequences.count).narrow(1, head, some.count).copy_(residuals.lse);
      }
      const at::Tensor weight = out_weight.narrow(1, column, rows.size(1)).t();
      if (head > 0) {
        product_add(out, rows, weight);
      } else {
        product_into(out, rows, weight, out_bias);
      }
    }
  }
  return {output, attended, lse, seeds};
}

// The gradients of some heads' projections `part`, `part` + 1, ... of x, from their outputs' [n N, columns]
// each.
struct ProjectionGradients {
  at::Tensor in_weight, in_bias;  // undefined where not wanted

  void add(const Block& block, const std::vector<at::Tensor>& grads, int64_t part, Range heads,
           const at::Tensor& x_rows) {
    for (const at::Tensor& grad : grads) {
      const Range rows = rows_of(block, part++, heads);
      if (in_weight.defined()) add_product(in_weight.narrow(0, rows.first, rows.count), grad, x_rows);
      if (in_bias.defined()) {
        in_bias.narrow(0, rows.first, rows.count).add_(grad.sum(0, false, in_bias.scalar_type()));
      }
    }
  }
};

// Their gradient of x: into `into`, or under `add` added to it.
void to_input(const Block& block, const std::vector<at::Tensor>& grads, int64_t part, Range heads, bool add,
              at::Tensor into) {
  for (const at::Tensor& grad : grads) {
    const Range rows = rows_of(block, part++, heads);
    const at::Tensor weight = block.in_weight.narrow(0, rows.first, rows.count);
    if (add) {
      product_add(into, grad, weight);
    } else {
      product_into(into, grad, weight);
    }
    add = true;
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
  const int64_t step = group_size(query, memory), wide_heads = heads_at_once(query, memory, heads);
  const int64_t head_dim = dim / heads;
  int64_t part = 0;
  for (int64_t first = 0; first < batch; first += step) {
    const int64_t count = std::min(step, batch - first);
    const at::Tensor g_rows = grad_output.narrow(0, first, count).reshape({count * length, out_dim});
    if (needs[5]) grad_out_bias.add_(g_rows.sum(0, false, wide.dtype().toScalarType()));
    if (!through && !needs[4]) continue;
    const at::Tensor x = query.narrow(0, first, count), x_rows = x.reshape({count * length, dim});
    const std::optional<at::Tensor> m = group_of(memory, first, count);
    for (int64_t head = 0; head < heads; head += wide_heads, ++part) {
      const Range some{head, std::min(wide_heads, heads - head)};
      const int64_t column = head * head_dim, columns = some.count * head_dim;
      const at::Tensor seed = seed_of(seeds, part);
      const AttentionCall call = call_of(block, {first, count}, some);
      std::vector<at::Tensor> qkv;
      if (through || !kept) qkv = project(block, x, m, some);
      AttentionResiduals residuals;
      at::Tensor attended_heads;
      if (kept) {
        residuals = empty_residuals(x.unsqueeze(1), x.unsqueeze(1), call, false);
        residuals.lse = lse.narrow(0, first, count).narrow(1, head, some.count).contiguous();
        attended_heads = attended.narrow(0, first, count)
                             .narrow(2, column, columns)
                             .unflatten(2, {some.count, head_dim})
                             .transpose(1, 2);
      } else {
        residuals = empty_residuals(qkv[0], qkv[1], call, true);
        attended_heads = attend(block, call, qkv, seed, residuals);
      }
      if (dropout > 0) residuals.seed = seed;
      if (needs[4]) add_product(grad_out_weight.narrow(1, column, columns), g_rows, merge(attended_heads));
      if (!through) continue;
      const at::Tensor grad_heads = product(g_rows, out_weight.narrow(1, column, columns))
                                        .view({count, length, some.count, head_dim})
                                        .transpose(1, 2);
      const BackwardInputs inputs{grad_heads, qkv[0],         qkv[1],
                                  qkv[2],     attended_heads, residuals,
                                  some.count, qkv[1].size(2), {true, true, true, false}};
      auto [dq, dk, dv, dmask] = block.fused ? cpu_backward(inputs, call) : composite_backward(inputs, call);
      if (m.has_value()) {
        const std::vector<at::Tensor> grad_q{merge(dq)}, grad_kv{merge(dk), merge(dv)};
        projections.add(block, grad_q, 0, some, x_rows);
        projections.add(block, grad_kv, 1, some, m->reshape({-1, dim}));
        if (needs[0]) {
          to_input(block, grad_q, 0, some, head > 0, grad_query.narrow(0, first, count).view({-1, dim}));
        }
        if (needs[1]) {
          to_input(block, grad_kv, 1, some, head > 0, grad_memory.narrow(0, first, count).view({-1, dim}));
        }
      } else {
        const std::vector<at::Tensor> grads{merge(dq), merge(dk), merge(dv)};
        projections.add(block, grads, 0, some, x_rows);
        if (needs[0]) {
          to_input(block, grads, 0, some, head > 0, grad_query.narrow(0, first, count).view({-1, dim}));
        }
      }
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
  const int64_t parts = dropout > 0 ? parts_of(query, memory, heads) : 0;
  return {at::empty_symint({batch, length, out_weight.sym_size(0)}, options),
          keep ? at::empty_symint({batch, length, query.sym_size(2)}, options) : at::empty({0}, options),
          keep ? at::empty_symint({batch, heads, length}, wide) : at::empty({0}, wide),
          dropout > 0 ? at::empty({parts, 2}, seeds.options()) : seeds};
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
  const auto wanted = [](const std::optional<at::Tensor>& x) { return x.has_value() && x->requires_grad(); };
  const bool keep = keep_output && at::GradMode::is_enabled() &&
                    (wanted(query) || wanted(memory) || wanted(in_weight) || wanted(in_bias) ||
                     wanted(out_weight) || wanted(out_bias));
  return std::get<0>(op.call(query, memory, in_weight, in_bias, out_weight, out_bias, heads, mask, causal,
                             dropout, keep, generator));
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
  // Through the dispatcher, where autocast sees it.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::multihead_attention", "")
                             .typed<decltype(ops::multihead_attention_op)>();
  return op.call(query, memory, in_weight, in_bias, out_weight, out_bias, call.heads, call.mask, call.causal,
                 call.dropout, call.keep_output, call.generator);
}

bool keeps_attention_output(int64_t keys, int64_t embed_dim) {
  // A position's attention multiplies 2 n E numbers, its projections to q, k and v 3 E^2.
  return 2 * keys > 3 * embed_dim;
}

}  // namespace remnant
