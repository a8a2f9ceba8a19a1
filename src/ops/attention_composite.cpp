// Attention in ATen operations, for any device. A block of query rows is all that is alive at a time,
// except under policy exact, which keeps its n x n softmax output by definition.

#include "ops/attention_composite.h"

#include "kernels/philox.h"

#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <vector>

namespace remnant::ops {

namespace {

// Rows of a block: its scores take about 16 MB, and never the whole of a long sequence.
int64_t rows_of_block(int64_t heads, int64_t queries, int64_t keys) {
  const int64_t rows = (int64_t{1} << 22) / std::max<int64_t>(1, heads * keys);
  return std::min(std::max<int64_t>(queries, 1), std::clamp<int64_t>(rows, 16, 128));
}

// The same in whole tiles of rows that share their drawn keys.
int64_t rows_of_tiles(int64_t heads, int64_t queries, int64_t keys) {
  constexpr int64_t tile = kernels::kSampleRows;
  return (rows_of_block(heads, queries, keys) + tile - 1) / tile * tile;
}

// True where the window forbids a key, [rows, keys]; undefined without a window.
at::Tensor outside_window(const AttentionCall& call, int64_t first, int64_t rows, int64_t keys,
                          const at::Device& device) {
  if (call.left < 0 && call.right < 0) return {};
  const auto options = at::TensorOptions(device).dtype(at::kLong);
  const at::Tensor i = at::arange(first, first + rows, options).unsqueeze(1);
  const at::Tensor j = at::arange(keys, options).unsqueeze(0);
  at::Tensor outside;
  if (call.left >= 0) outside = j.lt(i.sub(call.left));
  if (call.right >= 0) {
    const at::Tensor late = j.gt(i.add(call.right));
    outside = outside.defined() ? outside.logical_or(late) : late;
  }
  return outside;
}

// In place score -> scale * score + mask.
void mask_scores_(at::Tensor scores, const AttentionCall& call, int64_t first) {
  scores.mul_(precise(call.scale));
  if (call.mask.has_value()) {
    const at::Tensor mask = mask_rows(*call.mask, first, scores.size(2));
    if (mask.scalar_type() == at::kBool) {
      scores.masked_fill_(mask.logical_not(), kNothing);
    } else {
      scores.add_(mask);
    }
  }
  const at::Tensor outside = outside_window(call, first, scores.size(2), scores.size(3), scores.device());
  if (outside.defined()) scores.masked_fill_(outside, kNothing);
}

at::Tensor masked_scores(const at::Tensor& query, const at::Tensor& key, const AttentionCall& call,
                         int64_t first, int64_t rows) {
  at::Tensor scores = at::matmul(query.narrow(2, first, rows), key.transpose(-2, -1));
  mask_scores_(scores, call, first);
  return scores;
}

// dz summed over the axes along which the mask was broadcast.
at::Tensor sum_broadcast(const at::Tensor& dz, const at::Tensor& mask) {
  std::vector<int64_t> broadcast;
  for (int64_t d = 0; d < 4; ++d) {
    if (mask.size(d) == 1) broadcast.push_back(d);
  }
  return broadcast.empty() ? dz : dz.sum(broadcast, true);
}

void accumulate_mask_gradient(at::Tensor& grad_mask, const at::Tensor& dz, int64_t first) {
  mask_rows(grad_mask, first, dz.size(2)).add_(sum_broadcast(dz, grad_mask));
}

}  // namespace

at::Tensor composite_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const AttentionCall& call, const at::Tensor& seed,
                             AttentionResiduals& residuals) {
  const auto type = accumulation_type(query.scalar_type());
  const AttentionCall wide_call = widen_mask(call, type);
  const int64_t heads = query.size(1);
  const int64_t queries = query.size(2);
  const int64_t keys = key.size(2);
  const at::Tensor q = query.to(type);
  const at::Tensor k = repeat_heads(key.to(type), heads);
  const at::Tensor v = repeat_heads(value.to(type), heads);
  at::Tensor output = empty_heads(query.size(0), heads, queries, value.size(3), query.options());
  if (keys == 0) {
    residuals.lse.fill_(kNothing);
    residuals.table.zero_();
    return output.zero_();
  }
  const bool tiles = call.policy.kind == PolicyKind::sampled;
  const int64_t block = (tiles ? rows_of_tiles : rows_of_block)(query.size(0) * heads, queries, keys);
  for (int64_t first = 0; first < queries; first += block) {
    const int64_t rows = std::min(block, queries - first);
    const at::Tensor scores = masked_scores(q, k, wide_call, first, rows);
    const at::Tensor lse = scores.logsumexp({-1});
    at::Tensor p = probabilities_from(scores, lse, call);
    const auto keep_rows = [&](at::Tensor& whole, const at::Tensor& part) {
      if (whole.dim() > 1) whole.narrow(2, first, rows).copy_(part);
    };
    switch (call.policy.kind) {
      case PolicyKind::exact:
        break;
      case PolicyKind::recompute:
        keep_rows(residuals.lse, lse);
        break;
      case PolicyKind::curve:
        if (residuals.codes.dim() > 1) {
          const auto [codes, table] = curve_encode(scores, p, call.policy.m);
          keep_rows(residuals.codes, codes);
          keep_rows(residuals.table, table);
        }
        break;
      case PolicyKind::quantized:
        if (residuals.codes.dim() > 1) {
          const int64_t blocks = (keys + kernels::kRoundingColumns - 1) / kernels::kRoundingColumns;
          const at::Tensor random = random_words(seed, static_cast<uint32_t>(kernels::Stream::rounding),
                                                 query.size(0) * heads, first, rows, blocks)
                                        .narrow(-1, 0, keys)
                                        .view(p.sizes());
          const auto [codes, highest] = quantize(p, call.policy.bits, random);
          keep_rows(residuals.codes, codes);
          keep_rows(residuals.table, highest);
        }
        break;
      case PolicyKind::sampled:
        if (residuals.codes.dim() > 1) {
          keep_rows(residuals.lse, lse_of_few(lse));
          const int64_t tile = first / kernels::kSampleRows;
          const auto [codes, table] = draw_keys(p, call.policy.m, seed, tile);
          residuals.codes.narrow(2, tile, codes.size(2)).copy_(codes);
          residuals.table.narrow(2, tile, table.size(2)).copy_(table);
        }
        break;
      case PolicyKind::top:
        if (residuals.codes.dim() > 1) {
          keep_rows(residuals.lse, lse_of_few(lse));
          keep_rows(residuals.codes, top_keys(scores, p, call.policy.m));
        }
        break;
    }
    if (call.dropout > 0) apply_dropout_(p, seed, call.dropout, first);
    output.narrow(2, first, rows).copy_(at::matmul(p, v));
  }
  return output;
}

BackwardResult composite_backward(const BackwardInputs& inputs, const AttentionCall& call) {
  if (call.policy.kind == PolicyKind::sampled) return sampled_backward(inputs, call);
  if (call.policy.kind == PolicyKind::top) return top_backward(inputs, call);
  const auto type = accumulation_type(inputs.grad_output.scalar_type());
  const auto out_type = inputs.grad_output.scalar_type();
  const AttentionCall wide_call = widen_mask(call, type);
  const bool needs_scores = inputs.needs[0] || inputs.needs[1] || inputs.needs[3];
  const at::Tensor g = inputs.grad_output.to(type);
  const int64_t batch = g.size(0);
  const int64_t heads = g.size(1);
  const int64_t queries = g.size(2);
  const int64_t keys = inputs.keys;
  const at::Tensor q = widen(inputs.query, type);
  const at::Tensor k = inputs.key.defined() ? repeat_heads(inputs.key.to(type), heads) : at::Tensor();
  const at::Tensor v = inputs.value.defined() ? repeat_heads(inputs.value.to(type), heads) : at::Tensor();
  const at::Tensor o = widen(inputs.output, type);
  const auto options = g.options();
  at::Tensor grad_query, grad_key, grad_value, grad_mask;
  if (inputs.needs[0]) grad_query = empty_heads(batch, heads, queries, k.size(3), options);
  if (inputs.needs[1]) grad_key = at::zeros({batch, heads, keys, q.size(3)}, options);
  if (inputs.needs[2]) grad_value = at::zeros({batch, heads, keys, g.size(3)}, options);
  if (inputs.needs[3]) grad_mask = at::zeros(call.mask->sizes(), options);
  if (keys == 0 && grad_query.defined()) grad_query.zero_();
  const int64_t block = rows_of_block(batch * heads, queries, keys);
  for (int64_t first = 0; keys > 0 && first < queries; first += block) {
    const int64_t rows = std::min(block, queries - first);
    const auto part = [&](const at::Tensor& x) { return x.narrow(2, first, rows); };
    at::Tensor p;
    if (call.policy.kind == PolicyKind::recompute) {
      p = probabilities_from(masked_scores(q, k, wide_call, first, rows), part(inputs.kept.lse), call);
    } else if (call.policy.kind == PolicyKind::curve) {
      p = curve_decode(part(inputs.kept.codes), part(inputs.kept.table), keys, call.policy.m,
                       call.policy.paper_text);
    } else {
      p = dequantize(part(inputs.kept.codes), part(inputs.kept.table), call.policy.bits, keys);
    }
    at::Tensor drop;
    if (call.dropout > 0) {
      drop = dropout_mask(inputs.kept.seed, call.dropout, batch, heads, first, rows, keys, options);
    }
    const at::Tensor g_rows = part(g);
    if (needs_scores) {
      at::Tensor dz = at::matmul(g_rows, v.transpose(-2, -1));
      if (drop.defined()) dz.mul_(drop);
      const at::Tensor delta = o.defined() ? g_rows.mul(part(o)).sum(-1, true) : p.mul(dz).sum(-1, true);
      dz.sub_(delta).mul_(p);
      if (inputs.needs[3]) accumulate_mask_gradient(grad_mask, dz, first);
      dz.mul_(call.scale);
      if (inputs.needs[0]) part(grad_query).copy_(at::matmul(dz, k));
      if (inputs.needs[1]) grad_key.add_(at::matmul(dz.transpose(-2, -1), part(q)));
    }
    if (inputs.needs[2]) {
      if (drop.defined()) p.mul_(drop);
      grad_value.add_(at::matmul(p.transpose(-2, -1), g_rows));
    }
  }
  if (inputs.needs[1]) grad_key = sum_heads(grad_key, inputs.kv_heads);
  if (inputs.needs[2]) grad_value = sum_heads(grad_value, inputs.kv_heads);
  return {merged(grad_query, out_type), merged(grad_key, out_type), merged(grad_value, out_type), grad_mask};
}

at::Tensor exact_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const AttentionCall& call, const at::Tensor& seed, AttentionResiduals& residuals) {
  const int64_t heads = query.size(1);
  const int64_t queries = query.size(2);
  const int64_t keys = key.size(2);
  at::Tensor output = empty_heads(query.size(0), heads, queries, value.size(3), query.options());
  if (keys == 0) return output.zero_();
  at::Tensor p = at::matmul(query, repeat_heads(key, heads).transpose(-2, -1));
  const AttentionCall own_type = widen_mask(call, query.scalar_type());
  // The window's mask is made for a block of rows at a time: no [Nq, Nk] mask is materialised for it.
  const int64_t block = std::min<int64_t>(std::max<int64_t>(queries, 1), 128);
  for (int64_t first = 0; first < queries; first += block) {
    mask_scores_(p.narrow(2, first, std::min(block, queries - first)), own_type, first);
  }
  at::Tensor empty_rows;
  if (may_empty_rows(call)) empty_rows = p.amax({-1}, true).eq(kNothing);
  p = at::softmax(p, -1);
  if (empty_rows.defined()) p.masked_fill_(empty_rows, 0);
  at::Tensor dropped = p;
  if (call.dropout > 0) {
    dropped = p.clone();
    apply_dropout_(dropped, seed, call.dropout, 0);
  }
  output.copy_(at::matmul(dropped, repeat_heads(value, heads)));
  if (residuals.probabilities.dim() > 1) residuals.probabilities = p;
  return output;
}

BackwardResult exact_backward(const BackwardInputs& inputs, const AttentionCall& call) {
  const at::Tensor& g = inputs.grad_output;
  const at::Tensor& p = inputs.kept.probabilities;
  const int64_t heads = g.size(1);
  const bool needs_scores = inputs.needs[0] || inputs.needs[1] || inputs.needs[3];
  at::Tensor grad_query, grad_key, grad_value, grad_mask;
  if (needs_scores) {
    at::Tensor dp = at::matmul(g, repeat_heads(inputs.value, heads).transpose(-2, -1));
    if (call.dropout > 0) apply_dropout_(dp, inputs.kept.seed, call.dropout, 0);
    at::Tensor dz = at::_softmax_backward_data(dp, p, -1, p.scalar_type());
    if (inputs.needs[3]) {
      grad_mask = at::zeros(call.mask->sizes(), g.options());
      accumulate_mask_gradient(grad_mask, dz, 0);
    }
    dz.mul_(precise(call.scale));
    if (inputs.needs[0]) grad_query = at::matmul(dz, repeat_heads(inputs.key, heads));
    if (inputs.needs[1]) {
      // As autograd multiplies for key's transpose: in some libraries the order of factors decides the last
      // bit.
      const at::Tensor transposed = at::matmul(inputs.query.transpose(-2, -1), dz);
      grad_key = sum_heads(transposed.transpose(-2, -1).contiguous(), inputs.kv_heads);
    }
  }
  if (inputs.needs[2]) {
    at::Tensor dropped = p;
    if (call.dropout > 0) {
      dropped = p.clone();
      apply_dropout_(dropped, inputs.kept.seed, call.dropout, 0);
    }
    grad_value = sum_heads(at::matmul(dropped.transpose(-2, -1), g), inputs.kv_heads);
  }
  const auto type = g.scalar_type();
  return {merged(grad_query, type), merged(grad_key, type), merged(grad_value, type), grad_mask};
}

BackwardResult exact_backward_differentiable(const BackwardInputs& inputs, const AttentionCall& call) {
  const at::Tensor& g = inputs.grad_output;
  const int64_t heads = g.size(1);
  const bool needs_scores = inputs.needs[0] || inputs.needs[1] || inputs.needs[3];
  at::Tensor p = inputs.kept.probabilities;
  if (needs_scores) {
    const at::Tensor key = repeat_heads(inputs.key, heads);
    at::Tensor scores = at::matmul(inputs.query, key.transpose(-2, -1)).mul(precise(call.scale));
    at::Tensor blocked = outside_window(call, 0, g.size(2), inputs.keys, g.device());
    if (call.mask.has_value()) {
      if (call.mask->scalar_type() == at::kBool) {
        const at::Tensor forbidden = call.mask->logical_not();
        blocked = blocked.defined() ? blocked.logical_or(forbidden) : forbidden;
      } else {
        scores = scores.add(*call.mask);
      }
    }
    if (blocked.defined()) scores = scores.masked_fill(blocked, kNothing);
    if (may_empty_rows(call)) {
      // Rows that attend nothing get finite scores first: NaN would survive the fill below in the gradient.
      const at::Tensor empty_rows = scores.detach().amax({-1}, true).eq(kNothing);
      p = at::softmax(scores.masked_fill(empty_rows, 0), -1).masked_fill(empty_rows, 0);
    } else {
      p = at::softmax(scores, -1);
    }
  }
  at::Tensor drop;
  if (call.dropout > 0) {
    drop = dropout_mask(inputs.kept.seed, call.dropout, g.size(0), heads, 0, g.size(2), inputs.keys,
                        g.options());
  }
  at::Tensor grad_query, grad_key, grad_value, grad_mask;
  if (needs_scores) {
    at::Tensor a = at::matmul(g, repeat_heads(inputs.value, heads).transpose(-2, -1));
    if (drop.defined()) a = a.mul(drop);
    const at::Tensor dz = p.mul(a.sub(p.mul(a).sum(-1, true)));
    if (inputs.needs[0])
      grad_query = at::matmul(dz, repeat_heads(inputs.key, heads)).mul(precise(call.scale));
    if (inputs.needs[1]) {
      grad_key =
          sum_heads(at::matmul(dz.transpose(-2, -1), inputs.query).mul(precise(call.scale)), inputs.kv_heads);
    }
    if (inputs.needs[3]) grad_mask = sum_broadcast(dz, *call.mask);
  }
  if (inputs.needs[2]) {
    const at::Tensor dropped = drop.defined() ? p.mul(drop) : p;
    grad_value = sum_heads(at::matmul(dropped.transpose(-2, -1), g), inputs.kv_heads);
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

at::Tensor composite_weights(const at::Tensor& query, const at::Tensor& key, const AttentionCall& call) {
  const auto type = accumulation_type(query.scalar_type());
  const AttentionCall wide_call = widen_mask(call, type);
  const at::Tensor q = query.to(type);
  const at::Tensor k = repeat_heads(key.to(type), query.size(1));
  at::Tensor weights = at::empty({q.size(0), q.size(1), q.size(2), k.size(2)}, query.options());
  if (k.size(2) == 0) return weights;
  const int64_t block = rows_of_block(q.size(0) * q.size(1), q.size(2), k.size(2));
  for (int64_t first = 0; first < q.size(2); first += block) {
    const int64_t rows = std::min(block, q.size(2) - first);
    const at::Tensor scores = masked_scores(q, k, wide_call, first, rows);
    weights.narrow(2, first, rows).copy_(probabilities_from(scores, scores.logsumexp({-1}), call));
  }
  return weights;
}

}  // namespace remnant::ops
