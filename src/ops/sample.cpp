// Policy sampled: which keys a tile of query rows draws, and the gradient over them alone.

#include "kernels/philox.h"
#include "ops/attention_composite.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

namespace remnant::ops {

namespace {

constexpr int64_t kTile = kernels::kSampleRows;

// A number in (0, 1) for each tile, [B, H, tiles, 1]; see kernels/philox.h.
at::Tensor tile_uniforms(const at::Tensor& seed, int64_t batch, int64_t heads, int64_t first, int64_t tiles) {
  const at::Tensor words =
      random_words(seed, static_cast<uint32_t>(kernels::Stream::rounding), batch * heads, first, tiles, 1);
  return words.select(-1, 0)
      .bitwise_left_shift(20)
      .bitwise_or_(words.select(-1, 1).bitwise_right_shift(12))
      .to(at::kDouble)
      .add_(0.5)
      .mul_(0x1p-52)
      .view({batch, heads, tiles, 1});
}

// How the drawn keys of some tiles lie in the problem. Every tile of a block has the same number of rows:
// the last, shorter one is a block of its own.
struct Tiles {
  int64_t first = 0, tiles = 0, rows = 0;
  at::Tensor index;  // [B, H, tiles, slots], int64, 0 in unused slots

  int64_t count() const { return tiles * rows; }
  at::Tensor split(const at::Tensor& x) const {
    return x.narrow(2, first, count()).unflatten(2, {tiles, rows});
  }
  at::Tensor row_numbers() const {
    return at::arange(first, first + count(), index.options()).view({tiles, rows, 1});
  }
  // index for each row, [B, H, tiles, rows, slots]
  at::Tensor by_row() const {
    return index.unsqueeze(3).expand({index.size(0), index.size(1), tiles, rows, index.size(3)});
  }
};

void mask_drawn_(at::Tensor& scores, const AttentionCall& call, const Tiles& part, int64_t keys) {
  if (call.mask.has_value()) {
    const at::Tensor rows = mask_rows(*call.mask, part.first, part.count())
                                .expand({scores.size(0), scores.size(1), part.count(), keys})
                                .unflatten(2, {part.tiles, part.rows});
    const at::Tensor mask = rows.gather(-1, part.by_row());
    if (mask.scalar_type() == at::kBool) {
      scores.masked_fill_(mask.logical_not(), kNothing);
    } else {
      scores.add_(mask);
    }
  }
  const at::Tensor i = part.row_numbers();
  const at::Tensor j = part.index.unsqueeze(3);
  if (call.left >= 0) scores.masked_fill_(j.lt(i.sub(call.left)), kNothing);
  if (call.right >= 0) scores.masked_fill_(j.gt(i.add(call.right)), kNothing);
}

// Adds dz [B, H, tiles, rows, slots] where it belongs in the mask's own shape.
void scatter_mask_gradient(at::Tensor& grad_mask, const at::Tensor& dz, const Tiles& part) {
  const auto stride = [&](int64_t d) { return grad_mask.size(d) == 1 ? 0 : grad_mask.stride(d); };
  const auto along = [&](int64_t size, int64_t step, at::IntArrayRef shape) {
    return at::arange(size, part.index.options()).mul_(step).view(shape);
  };
  const at::Tensor place = part.index.unsqueeze(3)
                               .mul(stride(3))
                               .add(part.row_numbers().mul(stride(2)))
                               .add_(along(dz.size(0), stride(0), {dz.size(0), 1, 1, 1, 1}))
                               .add_(along(dz.size(1), stride(1), {dz.size(1), 1, 1, 1}));
  grad_mask.view(-1).index_add_(0, place.flatten(), dz.flatten());
}

}  // namespace

at::Tensor lse_of_few(const at::Tensor& lse) {
  return lse.masked_fill(lse.eq(-kNothing), std::numeric_limits<double>::quiet_NaN());
}

std::tuple<at::Tensor, at::Tensor> draw_keys(const at::Tensor& p, int64_t m, const at::Tensor& seed,
                                             int64_t first_tile) {
  const int64_t keys = p.size(3);
  const int64_t tiles = (p.size(2) + kTile - 1) / kTile;
  const int64_t slots = std::min(m, keys);
  const at::Tensor whole = at::constant_pad_nd(p, {0, 0, 0, tiles * kTile - p.size(2)});
  at::Tensor w = whole.unflatten(2, {tiles, kTile}).square().sum(3).to(at::kDouble).sqrt_();
  // A row of NaN must show in the gradient whatever is drawn: any keys do.
  w = at::where(w.sum(-1, true).isnan(), 1.0, w);

  // Water-filling: of the k largest, k = 0, 1, ..., the next is certain too while its share of the m - k
  // draws left reaches 1. One draw is left for the others, however little they weigh.
  const auto [sorted, order] = w.sort(-1, /*descending=*/true);
  const at::Tensor rest = sorted.flip(-1).cumsum(-1).flip(-1);
  const at::Tensor rank = at::arange(keys, order.options());
  const at::Tensor reaches =
      sorted.mul(rank.neg().add(m)).ge(rest.mul(1 - 1e-12)).logical_and_(rank.lt(m - 1));
  const at::Tensor positive = w.gt(0).sum(-1, true);
  const at::Tensor few = positive.le(m);
  const at::Tensor certain_count = at::where(few, positive, reaches.logical_and(sorted.gt(0)).sum(-1, true));
  const at::Tensor certain =
      at::zeros_like(w, w.options().dtype(at::kBool)).scatter(-1, order, rank.lt(certain_count));

  // The others lie side by side on [0, draws], each as long as its probability; those that hold one of the
  // points u, u + 1, ... are drawn. Between them the certain ones would take whole steps, so they are left
  // out. The end is `draws` exactly: no more than that many points fall inside.
  const at::Tensor draws = positive.clamp_max(m).sub(certain_count).to(at::kDouble);
  const at::Tensor others = w.masked_fill(certain, 0);
  const at::Tensor reached = others.cumsum(-1);
  const at::Tensor total = at::where(draws.gt(0), reached.narrow(-1, keys - 1, 1), 1.0);
  const at::Tensor points = reached.div(total)
                                .mul_(draws)
                                .sub_(tile_uniforms(seed, p.size(0), p.size(1), first_tile, tiles))
                                .floor_();
  const at::Tensor before = at::constant_pad_nd(points.narrow(-1, 0, keys - 1), {1, 0}, -1.0);
  const at::Tensor drawn = points.gt(before).logical_or_(certain);
  const at::Tensor probability = others.div(total).mul_(draws).clamp_max_(1).masked_fill_(certain, 1);

  const at::Tensor index = std::get<0>(at::where(drawn, rank, keys).sort(-1)).narrow(-1, 0, slots);
  const at::Tensor unused = index.eq(keys);
  // What was drawn has a probability of at least half an ulp of u: its inverse is finite in float32 too.
  const at::Tensor table =
      probability.gather(-1, index.clamp_max(keys - 1)).reciprocal_().masked_fill_(unused, 0);
  return {index.masked_fill(unused, -1).to(at::kInt), table.to(p.scalar_type())};
}

BackwardResult sampled_backward(const BackwardInputs& inputs, const AttentionCall& call) {
  const auto out_type = inputs.grad_output.scalar_type();
  const auto type = accumulation_type(out_type);
  const AttentionCall wide_call = widen_mask(call, type);
  const bool needs_scores = inputs.needs[0] || inputs.needs[1] || inputs.needs[3];
  const at::Tensor g = inputs.grad_output.to(type);
  const auto options = g.options();
  const int64_t batch = g.size(0), heads = g.size(1), queries = g.size(2);
  const int64_t kv_heads = inputs.kv_heads, keys = inputs.keys;
  const int64_t dim = inputs.query.size(3), value_dim = g.size(3);
  const int64_t slots = inputs.kept.codes.size(3);
  const at::Tensor q = inputs.query.to(type);
  const at::Tensor o = widen(inputs.output, type);
  // Keys of all heads below each other: a drawn key is a row.
  const at::Tensor k = inputs.key.to(type).reshape({batch * kv_heads * keys, dim});
  const at::Tensor v =
      needs_scores ? inputs.value.to(type).reshape({batch * kv_heads * keys, value_dim}) : at::Tensor();
  at::Tensor grad_query, grad_key, grad_value, grad_mask;
  if (inputs.needs[0]) grad_query = empty_heads(batch, heads, queries, dim, options).zero_();
  if (inputs.needs[1]) grad_key = at::zeros({batch * kv_heads * keys, dim}, options);
  if (inputs.needs[2]) grad_value = at::zeros({batch * kv_heads * keys, value_dim}, options);
  if (inputs.needs[3]) grad_mask = at::zeros(call.mask->sizes(), options);

  const int64_t per_tile = batch * heads * slots * std::max({kTile, dim, value_dim});
  const int64_t block = std::max<int64_t>(1, (int64_t{1} << 20) / std::max<int64_t>(1, per_tile));
  const bool empty = batch == 0 || heads == 0 || keys == 0;
  const int64_t whole_tiles = queries / kTile;
  for (int64_t first = 0; !empty && first < queries;) {
    Tiles part;
    const int64_t tile = first / kTile;
    part.first = first;
    part.tiles = std::clamp<int64_t>(whole_tiles - tile, 1, block);
    part.rows = std::min(kTile, queries - first);
    first += part.count();
    part.index = inputs.kept.codes.narrow(2, tile, part.tiles).to(at::kLong).clamp_min_(0);
    const auto heads_of = [&](int64_t size, at::IntArrayRef shape) {
      return at::arange(size, part.index.options()).view(shape);
    };
    const at::Tensor kv = heads_of(batch, {batch, 1, 1, 1})
                              .mul(kv_heads)
                              .add(heads_of(heads, {heads, 1, 1}).div(heads / kv_heads, "floor"));
    const at::Tensor rows = kv.mul(keys).add(part.index).flatten();
    const auto take = [&](const at::Tensor& x) {
      return x.index_select(0, rows).view({batch, heads, part.tiles, slots, x.size(1)});
    };
    const at::Tensor keys_drawn = take(k);
    const at::Tensor q_rows = part.split(q);
    const at::Tensor g_rows = part.split(g);
    at::Tensor p = at::matmul(q_rows, keys_drawn.transpose(-2, -1)).mul_(call.scale);
    mask_drawn_(p, wide_call, part, keys);
    p = probabilities_from(p, part.split(inputs.kept.lse), call);
    p.mul_(inputs.kept.table.narrow(2, tile, part.tiles).unsqueeze(3));
    at::Tensor drop;
    if (call.dropout > 0) {
      const at::Tensor head = heads_of(batch * heads, {batch, heads, 1, 1, 1});
      drop =
          dropout_mask_at(inputs.kept.seed, call.dropout, head, part.row_numbers(), part.by_row(), options);
    }
    if (needs_scores) {
      at::Tensor dz = at::matmul(g_rows, take(v).transpose(-2, -1));
      if (drop.defined()) dz.mul_(drop);
      dz.sub_(g_rows.mul(part.split(o)).sum(-1, true)).mul_(p);
      if (inputs.needs[3]) scatter_mask_gradient(grad_mask, dz, part);
      dz.mul_(call.scale);
      if (inputs.needs[0]) part.split(grad_query).copy_(at::matmul(dz, keys_drawn));
      if (inputs.needs[1])
        grad_key.index_add_(0, rows, at::matmul(dz.transpose(-2, -1), q_rows).flatten(0, 3));
    }
    if (inputs.needs[2]) {
      if (drop.defined()) p.mul_(drop);
      grad_value.index_add_(0, rows, at::matmul(p.transpose(-2, -1), g_rows).flatten(0, 3));
    }
  }
  const auto by_head = [&](const at::Tensor& x) {
    return x.defined() ? x.view({batch, kv_heads, keys, x.size(1)}) : x;
  };
  return {merged(grad_query, out_type), merged(by_head(grad_key), out_type),
          merged(by_head(grad_value), out_type), grad_mask};
}

}  // namespace remnant::ops
