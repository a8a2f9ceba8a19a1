#include "ops/attention_common.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/where.h>

namespace remnant::ops {

std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& p, int64_t bits, const at::Tensor& random) {
  const auto levels = static_cast<double>((1 << bits) - 1);
  const at::Tensor highest = p.amax({-1}, true);
  const at::Tensor factor = highest.gt(0).to(p.scalar_type()).div(highest.clamp_min(1e-300)).mul_(levels);
  const at::Tensor u = random.bitwise_right_shift(8).to(p.scalar_type()).add_(0.5).mul_(1.0 / 16777216.0);
  at::Tensor code = p.mul(factor).add_(u).clamp_max_(levels).nan_to_num(levels).to(at::kLong);
  const int64_t per_byte = 8 / bits;
  const int64_t keys = p.size(-1);
  const int64_t bytes = (keys * bits + 7) / 8;
  code = at::constant_pad_nd(code, {0, bytes * per_byte - keys}).unflatten(-1, {bytes, per_byte});
  const at::Tensor shifts = at::arange(0, 8, bits, code.options());
  return {code.bitwise_left_shift(shifts).sum(-1).to(at::kByte), highest};
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& highest, int64_t bits, int64_t keys) {
  const at::Tensor shifts = at::arange(0, 8, bits, codes.options().dtype(at::kLong));
  const at::Tensor code =
      codes.to(at::kLong).unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_((int64_t{1} << bits) - 1);
  const at::Tensor step = highest.div(static_cast<double>((1 << bits) - 1));
  return code.flatten(-2).narrow(-1, 0, keys).to(highest.scalar_type()).mul_(step);
}

}  // namespace remnant::ops
