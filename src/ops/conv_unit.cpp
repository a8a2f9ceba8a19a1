#include "ops/conv_unit.h"

#include "kernels/cpu/step_kernels.h"
#include "ops/attention_common.h"
#include "ops/seed.h"
#include "ops/shortcut.h"
#include "ops/step_common.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/signbit.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <functional>
#include <vector>

namespace remnant::ops {

namespace {

using kernels::ConvUnit;

at::MemoryFormat last_format(int64_t dims) {
  return dims == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}
bool is_channels_last(const at::Tensor& x) {
  return !x.is_contiguous() && (x.dim() == 4 || x.dim() == 5) && x.is_contiguous(last_format(x.dim()));
}

bool fused(const at::Tensor& x) { return x.device().is_cpu() && fused_on_cpu(); }

ConvUnit layout_of(const at::Tensor& x, int64_t sets) {
  ConvUnit p;
  p.element = element_of(x.scalar_type());
  p.planes = !is_channels_last(x);
  p.channels = x.size(1);
  p.positions = x.numel() / std::max<int64_t>(x.size(0) * x.size(1), 1);
  p.sets = sets;
  return p;
}

const void* read(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }

// [sets, C] of the accumulation type; [C] is one set.
at::Tensor as_sets(const at::Tensor& parameter, int64_t sets, const at::Tensor& like) {
  if (!parameter.defined()) return parameter;
  const auto wide = accumulation_type(like.scalar_type());
  return parameter.to(like.options().dtype(wide)).reshape({-1, like.size(1)}).expand({sets, -1}).contiguous();
}
// The same, to be broadcast against `like`.
at::Tensor as_columns(const at::Tensor& parameter, const at::Tensor& like) {
  std::vector<int64_t> shape(static_cast<size_t>(like.dim()), 1);
  shape[0] = parameter.numel() / like.size(1);
  shape[1] = like.size(1);
  return parameter.to(accumulation_type(like.scalar_type())).reshape(shape);
}
// Sums over what a parameter's number stands for: double [sets, C].
at::Tensor sum_sets(const at::Tensor& x, int64_t sets) {
  const at::Tensor each = x.to(at::kDouble).flatten(2).sum(2);
  return sets == 1 ? each.sum(0, true) : each;
}

// Work by the chunk: a part of flat memory that stays in the cache while it is read, encoded or decoded.
struct Chunks {
  int64_t total, size, count;
  Chunks(int64_t elements, int64_t channels) : total(elements) {
    size = (std::max<int64_t>(32 * channels, kernels::kFlatChunk) + kernels::kFlatChunk - 1) /
           kernels::kFlatChunk * kernels::kFlatChunk;
    count = (total + size - 1) / size;
  }
  template <typename F>
  void run(F&& f) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i * size, std::min((i + 1) * size, total));
    });
  }
};

kernels::LowBits code_problem(const at::Tensor& like, const Codes& codes, int64_t bits, bool kinked) {
  kernels::LowBits p;
  p.element = element_of(like.scalar_type());
  p.size = like.numel();
  p.bits = bits;
  p.kinked = kinked;
  p.codes = static_cast<uint8_t*>(codes.codes.data_ptr());
  p.table = static_cast<uint16_t*>(codes.table.data_ptr());
  return p;
}

Codes empty_codes(const at::Tensor& like, int64_t bits) {
  return {at::empty({kernels::code_bytes(like.numel(), bits)}, like.options().dtype(at::kByte)),
          at::empty({kernels::code_groups(like.numel()), 2}, like.options().dtype(at::kBFloat16))};
}

// Two buffers of a chunk for each thread.
struct Scratch {
  at::Tensor memory;
  int64_t bytes;
  Scratch(const at::Tensor& like, const Chunks& chunks, bool wanted)
      : bytes(wanted ? chunks.size * static_cast<int64_t>(like.element_size()) : 0) {
    memory = at::empty({at::get_num_threads(), 2, bytes}, like.options().dtype(at::kByte));
  }
  uint8_t* at(int64_t which) const {
    return memory.mutable_data_ptr<uint8_t>() + (at::get_thread_num() * 2 + which) * bytes;
  }
};

}  // namespace

at::Tensor dense(const at::Tensor& x) { return is_channels_last(x) ? x : x.contiguous(); }

at::Tensor in_memory_order(const at::Tensor& x) { return is_channels_last(x) ? x.movedim(1, -1) : x; }

at::Tensor in_order_of(const at::Tensor& x, const at::Tensor& like) {
  return is_channels_last(like) ? x.contiguous(last_format(like.dim())) : x.contiguous();
}

at::Tensor unit_moments(const at::Tensor& x, const at::Tensor& pivot) {
  const int64_t sets = pivot.size(0);
  if (!fused(x)) {
    const at::Tensor v = x.to(accumulation_type(x.scalar_type())) - as_columns(pivot, x);
    return at::stack({sum_sets(v, sets), sum_sets(v * v, sets)});
  }
  ConvUnit p = layout_of(x, sets);
  const at::Tensor pivots = as_sets(pivot, sets, x);
  const Chunks chunks(x.numel(), p.channels);
  const int64_t threads = at::get_num_threads();
  at::Tensor sums = at::zeros({threads, 2, sets, p.channels}, x.options().dtype(at::kDouble));
  p.x = x.const_data_ptr();
  p.shift = pivots.const_data_ptr();
  double* const all = sums.mutable_data_ptr<double>();
  chunks.run([&](int64_t begin, int64_t end) {
    ConvUnit part = p;
    const int64_t thread = at::get_thread_num();
    part.sums = all + thread * 2 * sets * p.channels;
    kernels::step_kernels().unit_moments(part, begin, end);
  });
  return sums.sum(0);
}

namespace {

// Numbers below and above 0, each rounded to levels of its own; kernels::LowBits has the layout.
Codes encode_kinked(const at::Tensor& x, int64_t bits, const at::Tensor& seed) {
  // Other devices go by way of the CPU.
  const at::Tensor host = in_memory_order(x).to(at::kCPU).contiguous();
  const at::Tensor words = seed.to(at::kCPU);
  Codes codes = empty_codes(host, bits);
  kernels::LowBits p = code_problem(host, codes, bits, true);
  p.x = host.const_data_ptr();
  p.seed = seed_of(words);
  kernels::step_kernels().encode(p, 0, host.numel());
  return {codes.codes.to(x.device()), codes.table.to(x.device())};
}

Codes encode_plain(const at::Tensor& x, int64_t bits, const at::Tensor& seed) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("remnant::encode", "")
          .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, int64_t)>();
  auto [codes, table] = op.call(in_memory_order(x).contiguous(), seed, bits);
  return {codes, table};
}

// All of it, laid out as `out`.
void decode_all(const Codes& codes, int64_t bits, bool kinked, at::Tensor& out) {
  at::Tensor flat = in_memory_order(out);
  if (!kinked) return decode_into(codes, bits, out.numel(), 0, flat);
  at::Tensor host = at::empty(flat.sizes(), flat.options().device(at::kCPU));
  const Codes here{codes.codes.to(at::kCPU), codes.table.to(at::kCPU)};
  kernels::LowBits p = code_problem(host, here, bits, true);
  p.y = host.mutable_data_ptr();
  kernels::step_kernels().decode(p, 0, host.numel());
  flat.copy_(host);
}

at::Tensor leak(const at::Tensor& v, double slope) {
  return slope == 1 ? v : at::where(v.gt(0), v, v * slope);
}

}  // namespace

at::Tensor unit_forward(at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
                        const at::Tensor& residual, UnitKept& kept, bool keep_sum,
                        const at::Tensor& normal_seed, const at::Tensor& sum_seed) {
  at::Tensor y = keep_sum ? at::empty_like(x) : x;
  if (!fused(x)) {
    at::Tensor v = x.to(accumulation_type(x.scalar_type()));
    if (scale.defined()) v = v * as_columns(scale, x) + as_columns(shift, x);
    if (normal_seed.defined()) {
      kept.normal = kept.normal_kinked ? encode_kinked(v, kept.bits, normal_seed)
                                       : encode_plain(v, kept.bits, normal_seed);
    }
    if (kept.factor.defined()) v = v * as_columns(kept.factor, x) + as_columns(kept.offset, x);
    if (residual.defined()) v = v + residual;
    if (sum_seed.defined()) kept.sum = encode_kinked(v, kept.bits, sum_seed);
    y.copy_(leak(v, kept.slope));
    if (keep_sum) x.copy_(v);
    return y;
  }
  const int64_t sets = scale.defined() ? scale.numel() / x.size(1) : 1;
  ConvUnit p = layout_of(x, sets);
  const at::Tensor scales = as_sets(scale, sets, x), shifts = as_sets(shift, sets, x);
  const at::Tensor factors = as_sets(kept.factor, sets, x), offsets = as_sets(kept.offset, sets, x);
  p.scale = read(scales);
  p.shift = read(shifts);
  p.factor = read(factors);
  p.offset = read(offsets);
  p.slope = kept.slope;
  p.x = x.const_data_ptr();
  p.residual = read(residual);
  p.y = y.mutable_data_ptr();
  if (keep_sum) p.s = x.mutable_data_ptr();
  kernels::LowBits normal, sum;
  const auto prepare = [&](const at::Tensor& seed, bool kinked, Codes& codes, kernels::LowBits& problem) {
    if (!seed.defined()) return;
    codes = empty_codes(x, kept.bits);
    problem = code_problem(x, codes, kept.bits, kinked);
    problem.seed = seed_of(seed);
  };
  prepare(normal_seed, kept.normal_kinked, kept.normal, normal);
  prepare(sum_seed, true, kept.sum, sum);
  const bool coded = normal_seed.defined() || sum_seed.defined();
  const Chunks chunks(x.numel(), p.channels);
  const Scratch scratch(x, chunks, coded);
  chunks.run([&](int64_t begin, int64_t end) {
    ConvUnit part = p;
    if (coded) {
      part.kept_first = begin;
      if (normal_seed.defined()) part.u = scratch.at(0);
      if (sum_seed.defined()) part.s = scratch.at(1);
    }
    kernels::step_kernels().unit_forward(part, begin, end);
    const auto code = [&](kernels::LowBits problem, const void* from) {
      problem.x = from;
      problem.first = begin;
      kernels::step_kernels().encode(problem, begin, end);
    };
    if (normal_seed.defined()) code(normal, part.u);
    if (sum_seed.defined()) code(sum, part.s);
  });
  return y;
}

namespace {

// A backward's view of what was kept, in wide numbers: u and the slope at s.
std::tuple<at::Tensor, at::Tensor> read_kept(const at::Tensor& grad, const UnitKept& kept) {
  const auto wide = accumulation_type(grad.scalar_type());
  at::Tensor normal, sum;
  const auto decoded = [&](const Codes& codes, bool kinked) {
    at::Tensor out = at::empty_like(grad, grad.options().dtype(wide));
    decode_all(codes, kept.bits, kinked, out);
    return out;
  };
  if (kept.normal.codes.defined()) normal = decoded(kept.normal, kept.normal_kinked);
  if (kept.normal_value.defined()) normal = kept.normal_value.to(wide);
  if (kept.value.defined()) {
    sum = leak(kept.value.to(wide), kept.inverse_slope);
    if (!normal.defined())
      normal = kept.residual.defined() ? sum - leak(kept.residual.to(wide), kept.residual_slope) : sum;
  } else if (kept.sum.codes.defined()) {
    sum = decoded(kept.sum, true);
    if (!normal.defined()) normal = sum;
  } else if (normal.defined()) {
    sum = kept.factor.defined() ? normal * as_columns(kept.factor, grad) + as_columns(kept.offset, grad)
                                : normal;
  }
  if (kept.slope == 1) return {normal, at::Tensor()};
  const bool coded = kept.normal.codes.defined() || kept.sum.codes.defined();
  const at::Tensor passes = coded ? at::signbit(sum).logical_not_() : sum.gt(0);
  return {normal, passes.to(wide) * (1 - kept.slope) + kept.slope};
}

// Runs f over chunks with u and s where the kernels look for them.
void each_kept(const ConvUnit& p, const at::Tensor& grad, const UnitKept& kept,
               const std::function<void(const ConvUnit&, int64_t, int64_t)>& f) {
  ConvUnit problem = p;
  problem.slope = kept.slope;
  problem.inverse_slope = kept.inverse_slope;
  problem.residual_slope = kept.residual_slope;
  const at::Tensor factors = as_sets(kept.factor, p.sets, grad), offsets = as_sets(kept.offset, p.sets, grad);
  problem.factor = read(factors);
  problem.offset = read(offsets);
  problem.residual = read(kept.residual);
  const bool normal_coded = kept.normal.codes.defined(), sum_coded = kept.sum.codes.defined();
  const bool coded = normal_coded || sum_coded;
  problem.by_sign = coded;
  if (kept.normal_value.defined()) problem.u = kept.normal_value.data_ptr();
  if (kept.value.defined()) {
    problem.s = kept.value.data_ptr();
  } else if (!coded && !kept.normal_value.defined()) {
    problem.s = grad.data_ptr();  // nothing kept: every slope is 1 and no sum of products is wanted
  }
  kernels::LowBits normal, sum;
  if (normal_coded) normal = code_problem(grad, kept.normal, kept.bits, kept.normal_kinked);
  if (sum_coded) sum = code_problem(grad, kept.sum, kept.bits, true);
  const Chunks chunks(grad.numel(), p.channels);
  const Scratch scratch(grad, chunks, coded);
  chunks.run([&](int64_t begin, int64_t end) {
    ConvUnit part = problem;
    const auto decode = [&](kernels::LowBits from, void* to) {
      from.y = to;
      from.first = begin;
      kernels::step_kernels().decode(from, begin, end);
      return to;
    };
    if (coded) part.kept_first = begin;
    if (normal_coded) part.u = decode(normal, scratch.at(0));
    if (sum_coded) part.s = decode(sum, scratch.at(1));
    f(part, begin, end);
  });
}

}  // namespace

at::Tensor unit_reduce(const at::Tensor& grad, const UnitKept& kept, int64_t sets) {
  if (!fused(grad)) {
    const auto [normal, slopes] = read_kept(grad, kept);
    const at::Tensor wide = grad.to(accumulation_type(grad.scalar_type()));
    const at::Tensor g = slopes.defined() ? wide * slopes : wide;
    return at::stack({sum_sets(g, sets), sum_sets(normal.defined() ? g * normal : g, sets)});
  }
  ConvUnit p = layout_of(grad, sets);
  p.grad = grad.const_data_ptr();
  const int64_t threads = at::get_num_threads();
  at::Tensor sums = at::zeros({threads, 2, sets, p.channels}, grad.options().dtype(at::kDouble));
  double* const all = sums.mutable_data_ptr<double>();
  each_kept(p, grad, kept, [&](const ConvUnit& problem, int64_t begin, int64_t end) {
    ConvUnit part = problem;
    const int64_t thread = at::get_thread_num();
    part.sums = all + thread * 2 * sets * p.channels;
    kernels::step_kernels().unit_reduce(part, begin, end);
  });
  return sums.sum(0);
}

std::tuple<at::Tensor, at::Tensor> unit_backward(const at::Tensor& grad, const UnitKept& kept,
                                                 const at::Tensor& of_grad, const at::Tensor& of_u,
                                                 const at::Tensor& constant, bool want_x,
                                                 bool want_residual) {
  if (!fused(grad)) {
    const auto [normal, slopes] = read_kept(grad, kept);
    const at::Tensor wide = grad.to(accumulation_type(grad.scalar_type()));
    const at::Tensor g = slopes.defined() ? wide * slopes : wide;
    at::Tensor d = of_grad.defined() ? g * as_columns(of_grad, grad) : g;
    if (of_u.defined()) d = d + normal * as_columns(of_u, grad) + as_columns(constant, grad);
    const auto narrow = [&](const at::Tensor& t) { return at::empty_like(grad).copy_(t); };
    return {want_x ? narrow(d) : at::Tensor(), want_residual ? narrow(g) : at::Tensor()};
  }
  const int64_t sets = of_grad.defined() ? of_grad.numel() / grad.size(1) : 1;
  ConvUnit p = layout_of(grad, sets);
  const at::Tensor a = as_sets(of_grad, sets, grad), b = as_sets(of_u, sets, grad);
  const at::Tensor c = as_sets(constant, sets, grad);
  at::Tensor grad_x = want_x ? at::empty_like(grad) : at::Tensor();
  at::Tensor grad_residual = want_residual ? at::empty_like(grad) : at::Tensor();
  p.grad = grad.const_data_ptr();
  p.of_grad = read(a);
  p.of_u = read(b);
  p.constant = read(c);
  if (want_x) p.grad_x = grad_x.mutable_data_ptr();
  if (want_residual) p.grad_residual = grad_residual.mutable_data_ptr();
  each_kept(p, grad, kept, [&](const ConvUnit& problem, int64_t begin, int64_t end) {
    kernels::step_kernels().unit_backward(problem, begin, end);
  });
  return {grad_x, grad_residual};
}

at::Tensor convolve(const Derived& from, const at::Tensor& source) {
  const at::Tensor z = at::convolution(
      source, from.weight, from.bias.defined() ? std::optional(from.bias) : std::nullopt, from.stride,
      from.padding, from.dilation, false, std::vector<int64_t>(from.stride.size(), 0), from.groups);
  return z.contiguous(from.format);
}

at::Tensor finish(const Derived& from, at::Tensor z) {
  UnitKept kept;
  kept.factor = from.factor;
  kept.offset = from.offset;
  kept.slope = from.slope;
  const at::Tensor residual = from.residual ? in_order_of(rebuild(*from.residual), z) : at::Tensor();
  const at::Tensor y = unit_forward(z, from.scale, from.shift, residual, kept, false, {}, {});
  return from.silu ? at::silu(y) : y;
}

namespace {

at::Tensor rebuild_kept(const Derived& from) {
  const bool coded = from.base == Derived::Base::codes;
  if (!coded && from.silu) return at::silu(from.value);
  if (!coded && from.slope == 1) return from.value;
  const at::Tensor& source = coded ? from.codes.codes : from.value;
  at::Tensor y = at::empty(from.sizes, source.options().dtype(from.type), from.format);
  if (!fused(y)) {
    at::Tensor v = from.value;
    if (coded) {
      v = at::empty_like(y, y.options().dtype(accumulation_type(from.type)));
      decode_all(from.codes, from.bits, from.kinked, v);
    }
    if (from.factor.defined()) v = v * as_columns(from.factor, y) + as_columns(from.offset, y);
    return y.copy_(leak(v, from.slope));
  }
  ConvUnit p = layout_of(y, 1);
  const at::Tensor factor = as_sets(from.factor, 1, y), offset = as_sets(from.offset, 1, y);
  p.scale = read(factor);
  p.shift = read(offset);
  p.slope = from.slope;
  p.y = y.mutable_data_ptr();
  const Chunks chunks(y.numel(), p.channels);
  const Scratch scratch(y, chunks, coded);
  kernels::LowBits codes;
  if (coded) codes = code_problem(y, from.codes, from.bits, from.kinked);
  chunks.run([&](int64_t begin, int64_t end) {
    ConvUnit part = p;
    if (coded) {
      kernels::LowBits problem = codes;
      problem.y = scratch.at(0);
      problem.first = begin;
      kernels::step_kernels().decode(problem, begin, end);
      part.x = problem.y;
      part.input_first = begin;
    } else {
      part.x = from.value.const_data_ptr();
    }
    kernels::step_kernels().unit_forward(part, begin, end);
  });
  return y;
}

}  // namespace

at::Tensor rebuild(const Derived& from) {
  if (from.base == Derived::Base::convolution) return finish(from, convolve(from, rebuild(*from.source)));
  if (from.base != Derived::Base::shortcut) return rebuild_kept(from);
  const auto shortcut = [&](const at::Tensor& x) {
    return shortcut_of(x, from.stride, from.sizes[1], from.average).contiguous(from.format);
  };
  if (from.average || from.source->base != Derived::Base::value) return shortcut(rebuild(*from.source));
  // An activation leaves 0 at 0: the same after the shortcut, where there is less to do.
  Derived taken = *from.source;
  taken.value = shortcut(taken.value);
  taken.sizes = from.sizes;
  taken.format = from.format;
  return rebuild_kept(taken);
}

}  // namespace remnant::ops
