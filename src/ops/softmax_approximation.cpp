#include <remnant/ops/softmax_approximation.h>

#include "kernels/cpu/attention_kernels.h"
#include "ops/attention_common.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <torch/library.h>

#include <limits>

namespace remnant {

namespace ops {

namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& energy, const std::optional<at::Tensor>& mask, int64_t m) {
  TORCH_CHECK(energy.dim() >= 1,
              "softmax_approximation: energy must have at least one dimension, got a scalar");
  TORCH_CHECK(at::isFloatingType(energy.scalar_type()),
              "softmax_approximation: energy must be floating point, got ", toString(energy.scalar_type()));
  TORCH_CHECK(m >= 1, "softmax_approximation: m must be at least 1, got ", m);
  if (!mask.has_value()) return;
  TORCH_CHECK(mask->scalar_type() == at::kBool,
              "softmax_approximation: mask must be boolean (true = keep), got ",
              toString(mask->scalar_type()), "; for a 0/1 mask pass mask.bool()");
  TORCH_CHECK(mask->dim() <= energy.dim(), "softmax_approximation: mask has ", mask->dim(),
              " dimensions, energy only ", energy.dim());
  for (int64_t d = 1; d <= mask->dim(); ++d) {
    const auto have = mask->sym_size(mask->dim() - d);
    const auto want = energy.sym_size(energy.dim() - d);
    TORCH_CHECK(have == 1 || have == want, "softmax_approximation: mask of shape ", mask->sym_sizes(),
                " does not broadcast to energy's ", energy.sym_sizes());
  }
}

std::tuple<at::Tensor, at::Tensor> empty_kept(const at::Tensor& energy, int64_t m, bool keep) {
  const auto wide = energy.options().dtype(accumulation_type(energy.scalar_type()));
  const auto bytes = energy.options().dtype(at::kByte);
  if (!keep) return {at::empty({0}, bytes), at::empty({0}, wide)};
  const int64_t keys = energy.sym_size(-1).guard_int(__FILE__, __LINE__);
  auto shape = energy.sym_sizes().vec();
  shape.back() = kernels::rank_bytes(keys);
  const at::Tensor codes = at::empty_symint(shape, bytes);
  shape.back() = kernels::curve_width(keys, m);
  return {codes, at::empty_symint(shape, wide)};
}

at::Tensor masked(const at::Tensor& energy, const std::optional<at::Tensor>& mask) {
  const at::Tensor z = energy.to(accumulation_type(energy.scalar_type())).contiguous();
  return mask.has_value() ? z.masked_fill(mask->logical_not(), kNothing) : z;
}

template <typename T>
void run_rows(const kernels::CurveRows<T>& rows,
              void (*kernel)(const kernels::CurveRows<T>&, int64_t, int64_t, void*)) {
  const int64_t bytes = (kernels::curve_scratch_bytes<T>(rows.keys) + 63) / 64 * 64;
  const int64_t threads =
      std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), rows.rows * rows.keys / 4096));
  const at::Tensor scratch = at::empty({threads, bytes}, at::kByte);
  uint8_t* const memory = scratch.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernel(rows, rows.rows * t / threads, rows.rows * (t + 1) / threads, memory + t * bytes);
    }
  });
}

template <typename T>
void encode_cpu(const at::Tensor& z, at::Tensor& p, const at::Tensor& codes, const at::Tensor& table,
                int64_t m) {
  kernels::CurveRows<T> rows;
  rows.keys = z.size(-1);
  rows.rows = z.numel() / rows.keys;
  rows.m = m;
  rows.input = z.const_data_ptr<T>();
  rows.output = p.mutable_data_ptr<T>();
  if (codes.dim() == z.dim() && table.numel() > 0) {
    rows.codes = codes.mutable_data_ptr<uint8_t>();
    rows.table = table.mutable_data_ptr<T>();
  }
  if constexpr (std::is_same_v<T, float>) {
    run_rows(rows, kernels::cpu_kernels().curve_encode_float);
  } else {
    run_rows(rows, kernels::cpu_kernels().curve_encode_double);
  }
}

template <typename T>
void decode_cpu(const at::Tensor& codes, const at::Tensor& table, at::Tensor& p, int64_t m, bool paper_text) {
  kernels::CurveRows<T> rows;
  rows.keys = p.size(-1);
  rows.rows = p.numel() / rows.keys;
  rows.m = m;
  rows.paper_text = paper_text;
  rows.output = p.mutable_data_ptr<T>();
  rows.codes = const_cast<uint8_t*>(codes.const_data_ptr<uint8_t>());
  rows.table = const_cast<T*>(table.const_data_ptr<T>());
  if constexpr (std::is_same_v<T, float>) {
    run_rows(rows, kernels::cpu_kernels().curve_decode_float);
  } else {
    run_rows(rows, kernels::cpu_kernels().curve_decode_double);
  }
}

Forward forward_cpu(const at::Tensor& energy, const std::optional<at::Tensor>& mask, int64_t m, bool keep) {
  check(energy, mask, m);
  const at::Tensor z = masked(energy, mask);
  const auto [codes, table] = empty_kept(energy, m, keep);
  at::Tensor p = at::empty_like(z);
  if (p.numel() > 0) {
    if (z.scalar_type() == at::kDouble) {
      encode_cpu<double>(z, p, codes, table, m);
    } else {
      encode_cpu<float>(z, p, codes, table, m);
    }
  }
  return {p.to(energy.scalar_type()), codes, table};
}

Forward forward_composite(const at::Tensor& energy, const std::optional<at::Tensor>& mask, int64_t m,
                          bool keep) {
  check(energy, mask, m);
  const at::Tensor z = masked(energy, mask);
  if (z.numel() == 0) {
    const auto [codes, table] = empty_kept(energy, m, keep);
    return {energy.clone(), codes, table};
  }
  const at::Tensor lse = z.logsumexp({-1}, true);
  const at::Tensor p = z.sub(lse.masked_fill(lse.eq(kNothing), 0)).exp_();
  const auto [codes, table] = keep ? curve_encode(z, p, m) : empty_kept(energy, m, keep);
  return {p.to(energy.scalar_type()), codes, table};
}

Forward forward_meta(const at::Tensor& energy, const std::optional<at::Tensor>& mask, int64_t m, bool keep) {
  check(energy, mask, m);
  const auto [codes, table] = empty_kept(energy, m, keep);
  return {at::empty_symint(energy.sym_sizes(), energy.options()), codes, table};
}

// O(n) a row: dz = p (g - sum(p g)).
at::Tensor gradient(const at::Tensor& grad_output, const at::Tensor& p) {
  const at::Tensor g = grad_output.to(p.scalar_type());
  return g.sub(p.mul(g).sum(-1, true)).mul_(p).to(grad_output.scalar_type());
}

at::Tensor backward_cpu(const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& table,
                        int64_t m, bool paper_text) {
  at::Tensor p = at::empty(grad_output.sizes(), table.options());
  if (p.numel() == 0) return at::empty(grad_output.sizes(), grad_output.options());
  if (p.scalar_type() == at::kDouble) {
    decode_cpu<double>(codes, table, p, m, paper_text);
  } else {
    decode_cpu<float>(codes, table, p, m, paper_text);
  }
  return gradient(grad_output, p);
}

at::Tensor backward_composite(const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& table,
                              int64_t m, bool paper_text) {
  if (grad_output.numel() == 0) return grad_output.clone();
  return gradient(grad_output, curve_decode(codes, table, grad_output.size(-1), m, paper_text)).contiguous();
}

at::Tensor backward_meta(const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& table,
                         int64_t m, bool paper_text) {
  return at::empty_symint(grad_output.sym_sizes(), grad_output.options());
}

at::Tensor softmax_input(const at::Tensor& output, const at::Tensor& lse) {
  return softmax_input_from_output(output, lse);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("softmax_approximation_forward", c10::DispatchKey::CPU, TORCH_FN(forward_cpu));
  m.impl("softmax_approximation_forward", c10::DispatchKey::CompositeExplicitAutograd,
         TORCH_FN(forward_composite));
  m.impl("softmax_approximation_forward", c10::DispatchKey::Meta, TORCH_FN(forward_meta));
  m.impl("softmax_approximation_backward", c10::DispatchKey::CPU, TORCH_FN(backward_cpu));
  m.impl("softmax_approximation_backward", c10::DispatchKey::CompositeExplicitAutograd,
         TORCH_FN(backward_composite));
  m.impl("softmax_approximation_backward", c10::DispatchKey::Meta, TORCH_FN(backward_meta));
  m.impl("softmax_input_from_output", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(softmax_input));
}

}  // namespace ops

at::Tensor softmax_approximation(const at::Tensor& energy, const std::optional<at::Tensor>& mask, int64_t m,
                                 bool paper_text) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("remnant::softmax_approximation", "")
          .typed<at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&, int64_t, bool)>();
  return op.call(energy, mask, m, paper_text);
}

at::Tensor softmax_input_from_output(const at::Tensor& output, const at::Tensor& lse) {
  TORCH_CHECK(
      output.dim() == lse.dim() + 1 && output.sizes().slice(0, lse.dim()) == lse.sizes(),
      "softmax_input_from_output: lse must have the output's shape without its last dimension, got output ",
      output.sizes(), " and lse ", lse.sizes());
  return output.log().add(lse.unsqueeze(-1));
}

}  // namespace remnant
