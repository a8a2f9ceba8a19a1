#include <remnant/ops/dropout_add.h>

#include "kernels/cpu/step_kernels.h"
#include "ops/attention_common.h"
#include "ops/seed.h"
#include "ops/step_common.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace remnant {

namespace ops {

at::Tensor flat_dropout_mask(const at::Tensor& like, const at::Tensor& seed, double p,
                             const at::TensorOptions& options) {
  const int64_t chunks = (like.numel() + kernels::kFlatChunk - 1) / kernels::kFlatChunk;
  // A flat tensor's chunk is what the masks of attention call a row.
  const at::Tensor mask = dropout_mask(seed, p, 1, 1, 0, chunks, kernels::kFlatChunk, options);
  return mask.flatten().narrow(0, 0, like.numel()).view(like.sizes());
}

at::Tensor dropout_add_cpu(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& seed,
                           double p) {
  if (!fused_on_cpu()) return dropout_add_composite(input, residual, seed, p);
  const at::Tensor x = input.contiguous();
  const at::Tensor added = residual.defined() ? residual.contiguous() : residual;
  at::Tensor y = at::empty_like(x);
  kernels::DropoutAdd problem;
  problem.element = element_of(x.scalar_type());
  problem.x = x.const_data_ptr();
  if (added.defined()) problem.residual = added.const_data_ptr();
  problem.y = y.mutable_data_ptr();
  problem.drop_threshold = kernels::dropout_threshold(p);
  problem.seed = seed_of(seed);
  at::parallel_for(0, x.numel(), 4 * kernels::kFlatChunk, [&](int64_t begin, int64_t end) {
    kernels::step_kernels().dropout_add(problem, begin, end);
  });
  return y;
}

at::Tensor dropout_add_composite(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& seed,
                                 double p) {
  const at::Tensor x = input.contiguous();
  const auto wide = accumulation_type(x.scalar_type());
  at::Tensor y = x.to(wide).mul(flat_dropout_mask(x, seed, p, x.options().dtype(wide)));
  if (residual.defined()) y.add_(residual);
  return y.to(x.scalar_type());
}

namespace {

void check(const at::Tensor& input, const at::Tensor& residual, double p) {
  check_floating("dropout_add", "input", input);
  TORCH_CHECK(p >= 0 && p < 1, "dropout_add: p must be in [0, 1), got ", p);
  TORCH_CHECK(residual.scalar_type() == input.scalar_type() && residual.device() == input.device(),
              "dropout_add: residual must have input's dtype and device, got ",
              toString(residual.scalar_type()), " on ", residual.device(), " beside ",
              toString(input.scalar_type()), " on ", input.device());
  TORCH_CHECK(residual.sym_sizes() == input.sym_sizes(), "dropout_add: residual must have input's shape ",
              input.sym_sizes(), ", got ", residual.sym_sizes());
}

at::Tensor forward_cpu(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& seed,
                       double p) {
  check(input, residual, p);
  return dropout_add_cpu(input, residual, seed, p);
}

at::Tensor forward_composite(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& seed,
                             double p) {
  check(input, residual, p);
  return dropout_add_composite(input, residual, seed, p);
}

at::Tensor forward_meta(const at::Tensor& input, const at::Tensor& residual, const at::Tensor& seed,
                        double p) {
  check(input, residual, p);
  return at::empty_symint(input.sym_sizes(), input.options());
}

at::Tensor draw_seed_op(const at::Tensor& like, const std::optional<at::Generator>& generator) {
  return draw_seed(like, generator);
}

at::Tensor draw_seed_meta(const at::Tensor& like, const std::optional<at::Generator>& generator) {
  return at::empty({2}, like.options().dtype(at::kLong));
}

at::Tensor dropout_add_op(const at::Tensor& input, const at::Tensor& residual, double p,
                          const std::optional<at::Generator>& generator) {
  check(input, residual, p);
  if (p == 0) return residual.add(input);
  static const auto draw = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("remnant::draw_seed", "")
                               .typed<decltype(draw_seed_op)>();
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::dropout_add_forward", "")
                             .typed<decltype(forward_cpu)>();
  return op.call(input, residual, draw.call(input.detach(), generator), p);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("draw_seed", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(draw_seed_op));
  m.impl("draw_seed", c10::DispatchKey::Meta, TORCH_FN(draw_seed_meta));
  m.impl("dropout_add", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(dropout_add_op));
  m.impl("dropout_add_forward", c10::DispatchKey::CPU, TORCH_FN(forward_cpu));
  m.impl("dropout_add_forward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(forward_composite));
  m.impl("dropout_add_forward", c10::DispatchKey::Meta, TORCH_FN(forward_meta));
}

}  // namespace ops

at::Tensor dropout_add(const at::Tensor& input, const at::Tensor& residual, double p,
                       const std::optional<at::Generator>& generator) {
  // Through the dispatcher, where autocast sees it.
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::dropout_add", "")
                             .typed<decltype(ops::dropout_add_op)>();
  return op.call(input, residual, p, generator);
}

}  // namespace remnant
