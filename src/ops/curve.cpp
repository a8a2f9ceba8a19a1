#include "kernels/cpu/attention_kernels.h"
#include "ops/attention_common.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

namespace remnant::ops {

namespace {

// The element at a rank that differs from row to row; ranks outside are clamped (their value is unused).
at::Tensor at_rank(const at::Tensor& sorted, const at::Tensor& rank) {
  return sorted.gather(-1, rank.clamp(0, sorted.size(-1) - 1));
}

at::Tensor pack(const at::Tensor& ranks, int64_t keys) {
  const int64_t bits = kernels::rank_bits(keys);
  const int64_t bytes = kernels::rank_bytes(keys);
  const at::Tensor shifts = at::arange(bits, ranks.options());
  at::Tensor stream = ranks.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1).flatten(-2);
  stream = at::constant_pad_nd(stream, {0, bytes * 8 - keys * bits}).unflatten(-1, {bytes, 8});
  return stream.bitwise_left_shift(at::arange(8, ranks.options())).sum(-1).to(at::kByte);
}

at::Tensor unpack(const at::Tensor& codes, int64_t keys) {
  const int64_t bits = kernels::rank_bits(keys);
  const auto options = codes.options().dtype(at::kLong);
  const at::Tensor stream = codes.to(at::kLong)
                                .unsqueeze(-1)
                                .bitwise_right_shift(at::arange(8, options))
                                .bitwise_and_(1)
                                .flatten(-2);
  return stream.narrow(-1, 0, keys * bits)
      .unflatten(-1, {keys, bits})
      .bitwise_left_shift(at::arange(bits, options))
      .sum(-1);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> curve_encode(const at::Tensor& z, const at::Tensor& p, int64_t m) {
  const int64_t keys = z.size(-1);
  const int64_t slots = kernels::curve_width(keys, m) - 2;
  const auto type = p.scalar_type();
  const auto [sorted_z, order] = z.sort(/*stable=*/true, -1, /*descending=*/true);
  const at::Tensor sorted_p = p.gather(-1, order);
  const at::Tensor index = at::arange(keys, order.options());
  const at::Tensor ranks = at::empty_like(order).scatter_(-1, order, index.expand_as(order));
  const at::Tensor valid = z.ne(-std::numeric_limits<double>::infinity()).sum(-1, true);
  const at::Tensor few = valid.le(2 * m);

  // Slot s holds rank s, or rank valid - 2m + s from m on when the row has a middle.
  const at::Tensor slot = at::arange(slots, order.options());
  const at::Tensor rank = at::where(few.logical_or(slot.lt(m)), slot, valid.sub(2 * m).add(slot));
  at::Tensor table = at_rank(sorted_p, rank).masked_fill(few.logical_and(slot.ge(valid)), 0);

  at::Tensor beta = at::zeros_like(valid, at::TensorOptions().dtype(type));
  if (2 * m < keys) {
    const at::Tensor count = valid.sub(2 * m - 2).clamp_min(1).to(type);
    const at::Tensor highest = sorted_p.narrow(-1, m - 1, 1);
    const at::Tensor fall = sorted_z.narrow(-1, m - 1, 1).sub(at_rank(sorted_z, valid.sub(m)));
    const at::Tensor rest = highest.neg().add_(1).clamp_min_(1.0 / 16777216.0);
    const at::Tensor slope = highest.sub(sorted_p.narrow(-1, m, 1)).mul_(2);
    beta = at::where(few, beta, fall.add(slope).div(count.mul(rest)).clamp_max_(1e30));
  }
  return {pack(ranks, keys), at::cat({table, beta, valid.to(type)}, -1)};
}

at::Tensor curve_decode(const at::Tensor& codes, const at::Tensor& table, int64_t keys, int64_t m,
                        bool paper_text) {
  const int64_t slots = table.size(-1) - 2;
  const auto type = table.scalar_type();
  const at::Tensor values = table.narrow(-1, 0, slots);
  const at::Tensor beta = table.narrow(-1, slots, 1);
  const at::Tensor valid = table.narrow(-1, slots + 1, 1).to(at::kLong);
  const at::Tensor few = valid.le(2 * m);
  const at::Tensor rank = at::arange(keys, valid.options());
  const at::Tensor end = valid.sub(m);
  const at::Tensor slot = at::where(few.logical_or(rank.lt(m)), rank, rank.sub(end).add(m));
  at::Tensor by_rank = at_rank(values, slot);
  if (2 * m < keys) {
    const at::Tensor alpha = values.narrow(-1, m - 1, 1);
    const at::Tensor middle = few.logical_not().logical_and(rank.ge(m)).logical_and(rank.lt(end));
    // Relative to its first element, so that the sum that rescales it never underflows.
    at::Tensor curve = beta.neg().mul(rank.sub(m).to(type)).exp();
    if (paper_text) {
      curve = curve.mul(alpha.mul(beta.neg().exp()));
      by_rank = at::where(few.logical_not().logical_and(rank.eq(end)), curve, by_rank);
    } else {
      curve = at::where(alpha.eq(0), curve.new_ones({}), curve);
      const at::Tensor sum = curve.masked_fill(middle.logical_not(), 0).sum(-1, true);
      curve = curve.mul(values.sum(-1, true).neg().add_(1).clamp_min_(0).div(sum));
    }
    by_rank = at::where(middle, curve, by_rank);
  }
  by_rank = by_rank.masked_fill(rank.ge(valid), 0);
  return by_rank.gather(-1, unpack(codes, keys));
}

}  // namespace remnant::ops
