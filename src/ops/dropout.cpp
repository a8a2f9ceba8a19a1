#include <remnant/ops/dropout.h>

#include "kernels/cpu/attention_kernels.h"
#include "ops/attention_common.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace remnant {

namespace ops {

namespace {

// A flat tensor is one row: a chunk is what the masks of attention call a row.
constexpr int64_t kBlocksOfChunk = 512;
constexpr int64_t kChunk = kBlocksOfChunk * kernels::kDropoutColumns;

void check(const at::Tensor& input, double p) {
  TORCH_CHECK(at::isFloatingType(input.scalar_type()), "dropout: input must be floating point, got ",
              toString(input.scalar_type()));
  TORCH_CHECK(p >= 0 && p < 1, "dropout: p must be in [0, 1), got ", p);
}

template <typename T>
void multiply(const T* x, T* y, int64_t size, const kernels::Seed& seed, int64_t threshold) {
  const auto scale = static_cast<T>(kernels::dropout_keep_scale(threshold));
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  at::parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
    uint16_t bits[kChunk];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t count = std::min(kChunk, size - chunk * kChunk);
      const int64_t blocks = (count + kernels::kDropoutColumns - 1) / kernels::kDropoutColumns;
      kernels::cpu_kernels().dropout_bits(seed, 0, chunk, 1, 0, blocks, bits);
      const T* from = x + chunk * kChunk;
      T* to = y + chunk * kChunk;
      for (int64_t e = 0; e < count; ++e) {
        to[e] = from[e] * (bits[e] >= threshold ? scale : static_cast<T>(0));
      }
    }
  });
}

at::Tensor apply_cpu(const at::Tensor& input, const at::Tensor& seed, double p) {
  const at::Tensor x = input.contiguous();
  at::Tensor y = at::empty_like(x);
  const auto parts = kernels::Seed::from(seed.const_data_ptr<int64_t>());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "dropout", [&] {
    multiply(x.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>(), x.numel(), parts,
             kernels::dropout_threshold(p));
  });
  return y;
}

at::Tensor apply_composite(const at::Tensor& input, const at::Tensor& seed, double p) {
  const at::Tensor x = input.contiguous();
  const int64_t chunks = (x.numel() + kChunk - 1) / kChunk;
  const at::Tensor mask = dropout_mask(seed, p, 1, 1, 0, chunks, kChunk, x.options());
  return x.mul(mask.flatten().narrow(0, 0, x.numel()).view(x.sizes()));
}

using Forward = std::tuple<at::Tensor, at::Tensor>;

Forward forward_cpu(const at::Tensor& input, double p, const std::optional<at::Generator>& generator) {
  check(input, p);
  const at::Tensor seed = draw_seed(input, generator);
  return {apply_cpu(input, seed, p), seed};
}

Forward forward_composite(const at::Tensor& input, double p, const std::optional<at::Generator>& generator) {
  check(input, p);
  const at::Tensor seed = draw_seed(input, generator);
  return {apply_composite(input, seed, p), seed};
}

Forward forward_meta(const at::Tensor& input, double p, const std::optional<at::Generator>& generator) {
  check(input, p);
  return {at::empty_symint(input.sym_sizes(), input.options()),
          at::empty({2}, input.options().dtype(at::kLong))};
}

at::Tensor backward_meta(const at::Tensor& grad_output, const at::Tensor& seed, double p) {
  return at::empty_symint(grad_output.sym_sizes(), grad_output.options());
}

at::Tensor dropout_op(const at::Tensor& input, double p, const std::optional<at::Generator>& generator) {
  check(input, p);
  if (p == 0) return input;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("remnant::dropout_forward", "")
          .typed<Forward(const at::Tensor&, double, const std::optional<at::Generator>&)>();
  return std::get<0>(op.call(input, p, generator));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("dropout", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(dropout_op));
  m.impl("dropout_forward", c10::DispatchKey::CPU, TORCH_FN(forward_cpu));
  m.impl("dropout_forward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(forward_composite));
  m.impl("dropout_forward", c10::DispatchKey::Meta, TORCH_FN(forward_meta));
  m.impl("dropout_backward", c10::DispatchKey::CPU, TORCH_FN(apply_cpu));
  m.impl("dropout_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(apply_composite));
  m.impl("dropout_backward", c10::DispatchKey::Meta, TORCH_FN(backward_meta));
}

}  // namespace ops

at::Tensor dropout(const at::Tensor& input, double p, const std::optional<at::Generator>& generator) {
  return ops::dropout_op(input, p, generator);
}

}  // namespace remnant
