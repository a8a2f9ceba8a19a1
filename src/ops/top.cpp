// Policy top: p at the highest keys of each row, what is left of it spread evenly over the row's other keys.
//
// With rho_i the share of one such key, T_i the kept keys, V_i all keys of row i and b_ij = g_i . v_j:
//
//     e_ij = p_ij (D_ij b_ij - delta_i) - rho_i (b_ij - delta_i)          for j in T_i
//     dq_i = scale (sum_T e_ij k_j + rho_i (sum_V b_ij k_j - delta_i sum_V k_j))
//     dk_j = scale (sum_T e_ij q_i + sum_{i: j in V_i} rho_i (b_ij - delta_i) q_i)
//     dv_j = sum_T (D_ij p_ij - rho_i) g_i + sum_{i: j in V_i} rho_i g_i
//
// The sums over V are products with running sums over keys (or rows), as in linear attention.

#include "ops/attention_composite.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

namespace remnant::ops {

namespace {

constexpr int64_t kChunk = 64;

// [B, H, 1, x.size(2)] of sums over all rows, or of running sums up to each row.
at::Tensor sums_until(const at::Tensor& x, const std::optional<at::Tensor>& last) {
  return last.has_value() ? x.cumsum(2).index_select(2, *last) : x.sum(2, true);
}

// Row a of the result is the sum of (x_a . y_b) w_b over b <= a + offset; in chunks of rows, with the
// products y^T w of what all rows of a chunk see summed up on the way.
at::Tensor causal_products(const at::Tensor& x, const at::Tensor& y, const at::Tensor& w, int64_t offset) {
  const int64_t rows = x.size(2), columns = y.size(2);
  at::Tensor result = at::empty({x.size(0), x.size(1), rows, w.size(3)}, x.options());
  at::Tensor seen = at::zeros({x.size(0), x.size(1), y.size(3), w.size(3)}, x.options());
  int64_t count = 0;
  for (int64_t first = 0; first < rows; first += kChunk) {
    const int64_t size = std::min(kChunk, rows - first);
    const int64_t all = std::clamp<int64_t>(first + offset + 1, 0, columns);
    const int64_t any = std::clamp<int64_t>(first + size + offset, 0, columns);
    if (all > count) {
      const int64_t more = all - count;
      seen.add_(at::matmul(y.narrow(2, count, more).transpose(-2, -1), w.narrow(2, count, more)));
      count = all;
    }
    const at::Tensor part = x.narrow(2, first, size);
    at::Tensor sum = at::matmul(part, seen);
    if (any > all) {
      const auto options = x.options().dtype(at::kLong);
      const at::Tensor a = at::arange(first, first + size, options).unsqueeze(1);
      const at::Tensor late = at::arange(all, any, options).gt(a.add(offset));
      const at::Tensor products = at::matmul(part, y.narrow(2, all, any - all).transpose(-2, -1));
      sum.add_(at::matmul(products.masked_fill(late, 0), w.narrow(2, all, any - all)));
    }
    result.narrow(2, first, size).copy_(sum);
  }
  return result;
}

}  // namespace

at::Tensor top_keys(const at::Tensor& scores, const at::Tensor& p, int64_t m) {
  const auto [values, index] = scores.topk(std::min(m, scores.size(-1)));
  // A row of -Inf that no mask made has p = NaN; it must stay.
  const at::Tensor masked = values.eq(kNothing).logical_and_(p.gather(-1, index).isnan().logical_not_());
  return index.masked_fill(masked, -1).to(at::kInt);
}

BackwardResult top_backward(const BackwardInputs& inputs, const AttentionCall& call) {
  const auto out_type = inputs.grad_output.scalar_type();
  const auto type = accumulation_type(out_type);
  const bool needs_scores = inputs.needs[0] || inputs.needs[1];
  const at::Tensor g = inputs.grad_output.to(type);
  const auto options = g.options();
  const auto integers = options.dtype(at::kLong);
  const int64_t batch = g.size(0), heads = g.size(1), queries = g.size(2);
  const int64_t kv_heads = inputs.kv_heads, keys = inputs.keys;
  const int64_t dim = inputs.query.size(3), value_dim = g.size(3);
  const int64_t slots = inputs.kept.codes.size(3);
  const bool causal = call.right >= 0;
  const at::Tensor q = inputs.query.to(type);
  const at::Tensor k = inputs.key.to(type);
  const at::Tensor v = widen(inputs.value, type);
  at::Tensor grad_query, grad_key, grad_value;
  if (inputs.needs[0]) grad_query = empty_heads(batch, heads, queries, dim, options).zero_();
  if (inputs.needs[1]) grad_key = at::zeros({batch, kv_heads, keys, dim}, options);
  if (inputs.needs[2]) grad_value = at::zeros({batch, kv_heads, keys, value_dim}, options);
  if (batch == 0 || heads == 0 || queries == 0 || keys == 0) {
    return {merged(grad_query, out_type), merged(grad_key, out_type), merged(grad_value, out_type), {}};
  }

  // Keys that no row may attend are out of every sum.
  at::Tensor forbidden;
  if (call.mask.has_value()) forbidden = call.mask->logical_not().transpose(2, 3);
  const auto attended = [&](const at::Tensor& x) {
    const at::Tensor repeated = repeat_heads(x, heads);
    return forbidden.defined() ? repeated.masked_fill(forbidden, 0) : repeated;
  };
  std::optional<at::Tensor> last;  // a row's last key
  if (causal) last = at::arange(queries, integers).add_(call.right).clamp_max_(keys - 1);
  at::Tensor count = at::scalar_tensor(1, integers).expand({1, 1, keys, 1});
  if (forbidden.defined()) {
    count = forbidden.logical_not().to(at::kLong);
    count = count.expand({count.size(0), count.size(1), keys, 1});
  }
  count = sums_until(count, last).squeeze(-1).expand({batch, heads, queries});

  at::Tensor all_keys, all_values, products, key_sums, value_sums;
  if (needs_scores) {
    all_keys = attended(k);
    all_values = attended(v);
    value_sums = sums_until(all_values, last).expand({batch, heads, queries, value_dim});
  }
  if (inputs.needs[0]) {
    key_sums = sums_until(all_keys, last).expand({batch, heads, queries, dim});
    products = causal ? causal_products(g, all_values, all_keys, call.right)
                      : at::matmul(g, at::matmul(all_values.transpose(-2, -1), all_keys));
  }
  at::Tensor rho = at::empty({batch, heads, queries, 1}, options);
  at::Tensor delta = at::empty({batch, heads, queries, 1}, options);

  // The kept keys, gathered: rows of all heads below each other.
  const auto rows_of = [](const at::Tensor& x) {
    return x.reshape({x.size(0) * x.size(1) * x.size(2), x.size(3)});
  };
  const at::Tensor key_rows = rows_of(k);
  const at::Tensor value_rows = needs_scores ? rows_of(v) : at::Tensor();
  const at::Tensor head = at::arange(batch * heads, integers).view({batch, heads, 1, 1});
  const at::Tensor kv = head.div(heads / kv_heads, "floor");
  const int64_t per_row = batch * heads * slots * std::max(dim, value_dim);
  const int64_t block = std::max<int64_t>(1, (int64_t{1} << 22) / std::max<int64_t>(1, per_row));
  for (int64_t first = 0; first < queries; first += block) {
    const int64_t rows = std::min(block, queries - first);
    const auto part = [&](const at::Tensor& x) { return x.narrow(2, first, rows); };
    const at::Tensor codes = part(inputs.kept.codes);
    const at::Tensor unused = codes.lt(0);
    const at::Tensor index = codes.to(at::kLong).clamp_min_(0);
    const at::Tensor places = kv.mul(keys).add(index).flatten();
    const auto take = [&](const at::Tensor& x) {
      return x.index_select(0, places).view({batch, heads, rows, slots, x.size(1)});
    };
    // One row against its own keys.
    const auto against = [](const at::Tensor& x, const at::Tensor& own) {
      return at::matmul(x.unsqueeze(3), own.transpose(-2, -1)).squeeze(3);
    };
    const at::Tensor g_rows = part(g);
    const at::Tensor q_rows = part(q);
    const at::Tensor kept_keys = take(key_rows);
    const at::Tensor p = against(q_rows, kept_keys)
                             .mul_(call.scale)
                             .sub_(part(inputs.kept.lse).unsqueeze(-1))
                             .exp_()
                             .masked_fill_(unused, 0);
    const at::Tensor others = part(count).sub(unused.logical_not().sum(-1)).unsqueeze(-1);
    const at::Tensor rest = p.sum(-1, true).neg_().add_(1).clamp_min_(0);
    const at::Tensor share = at::where(others.gt(0), rest.div(others.clamp_min(1)), 0.0);
    part(rho).copy_(share);
    at::Tensor dropped = p;
    at::Tensor drop;
    if (call.dropout > 0) {
      const at::Tensor i = at::arange(first, first + rows, integers).unsqueeze(1);
      drop = dropout_mask_at(inputs.kept.seed, call.dropout, head, i, index, options);
      dropped = p.mul(drop);
    }
    if (needs_scores) {
      const at::Tensor b = against(g_rows, take(value_rows)).masked_fill_(unused, 0);
      const at::Tensor unkept = g_rows.mul(part(value_sums)).sum(-1, true).sub_(b.sum(-1, true));
      const at::Tensor d = dropped.mul(b).sum(-1, true).add_(share.mul(unkept));
      part(delta).copy_(d);
      const at::Tensor e =
          dropped.mul(b).sub_(p.mul(d)).sub_(share.mul(b.sub(d))).masked_fill_(unused, 0).mul_(call.scale);
      if (inputs.needs[0]) {
        const at::Tensor spread = part(products).sub(d.mul(part(key_sums))).mul_(share).mul_(call.scale);
        part(grad_query).copy_(at::matmul(e.unsqueeze(3), kept_keys).squeeze(3).add_(spread));
      }
      if (inputs.needs[1]) {
        const at::Tensor terms = e.unsqueeze(-1).mul(q_rows.unsqueeze(3));
        grad_key.flatten(0, 2).index_add_(0, places, terms.flatten(0, 3));
      }
    }
    if (inputs.needs[2]) {
      const at::Tensor terms =
          dropped.sub(share).masked_fill_(unused, 0).unsqueeze(-1).mul(g_rows.unsqueeze(3));
      grad_value.flatten(0, 2).index_add_(0, places, terms.flatten(0, 3));
    }
  }

  // The even share, summed over the rows that attend a key: over all, or from row j - right on.
  const at::Tensor shared = g.mul(rho);
  const int64_t offset = call.right + queries - keys;
  std::optional<at::Tensor> last_row;  // in reversed order; -1: no row attends the key
  if (causal) last_row = at::arange(keys, integers).add_(offset).clamp_max_(queries - 1);
  const auto over_rows = [&](const at::Tensor& x) {
    if (!causal) return x.sum(2, true).expand({batch, heads, keys, x.size(3)});
    const at::Tensor sums = x.flip(2).cumsum(2).index_select(2, last_row->clamp_min(0));
    return sums.masked_fill(last_row->lt(0).unsqueeze(1), 0).flip(2);
  };
  const auto add = [&](const at::Tensor& grad, const at::Tensor& terms) {
    grad.add_(sum_heads(forbidden.defined() ? terms.masked_fill(forbidden, 0) : terms, kv_heads));
  };
  if (inputs.needs[1]) {
    const at::Tensor terms =
        causal ? causal_products(all_values.flip(2), shared.flip(2), q.flip(2), offset).flip(2)
               : at::matmul(all_values, at::matmul(shared.transpose(-2, -1), q));
    add(grad_key, terms.sub(over_rows(q.mul(rho).mul_(delta))).mul_(call.scale));
  }
  if (inputs.needs[2]) add(grad_value, over_rows(shared));
  return {merged(grad_query, out_type), merged(grad_key, out_type), merged(grad_value, out_type), {}};
}

}  // namespace remnant::ops
