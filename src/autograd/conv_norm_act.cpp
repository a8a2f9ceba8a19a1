#include "ops/attention_common.h"
#include "ops/conv_settings.h"
#include "ops/conv_unit.h"
#include "ops/step_common.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <memory>
#include <utility>

namespace remnant::autograd {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using OptionalTensor = std::optional<at::Tensor>;
using OptionalGenerator = std::optional<at::Generator>;

// The sum is rounded to one part in 2^24 (2^53, 2^9, 2^12), so x^ is off by that times what stands beside
// norm_weight x^ in it, over norm_weight: norm_bias as it is, the residual by its root mean square.
constexpr double kMostBias = 16, kMostBiasOfHalf = 1;
// Deviations up to which codes of x^ are shifted so that the activation's kink is at 0.
constexpr double kNearKink = 4;
constexpr double kMostResidual = 64, kMostResidualOfHalf = 2;
constexpr int64_t kSampleStride = 7;
constexpr double kLeastWeight = 0x1p-64, kMostWeight = 0x1p64;
// A leaky output gives its sum back where the slope leaves room for the exponent.
constexpr double kLeastSlope = 0x1p-10;

struct Call {
  at::Tensor input, weight, bias, norm_weight, norm_bias, running_mean, running_var, residual;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  ops::UnitSettings settings;
  bool training;
  double momentum, eps;
  OptionalGenerator generator;
  bool recompute;

  bool of_batch() const { return settings.norm == ops::UnitNorm::batch && training; }
  bool own_statistics() const { return of_batch() || settings.norm == ops::UnitNorm::group; }
};

at::Tensor unwrap(const OptionalTensor& x) { return x.has_value() ? *x : at::Tensor(); }
OptionalTensor optional(const at::Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

std::vector<int64_t> each_dimension(const char* name, at::IntArrayRef given, int64_t spatial) {
  TORCH_CHECK(given.size() == 1 || static_cast<int64_t>(given.size()) == spatial, "conv_norm_act: ", name,
              " must have 1 or ", spatial, " numbers, got ", given);
  return given.size() == 1 ? std::vector<int64_t>(static_cast<size_t>(spatial), given[0]) : given.vec();
}

void check(const Call& c) {
  ops::check_floating("conv_norm_act", "input", c.input);
  const int64_t dims = c.input.dim();
  TORCH_CHECK(dims >= 3 && dims <= 5,
              "conv_norm_act: input must be [N, C, L], [N, C, H, W] or [N, C, D, H, W], got ",
              c.input.sym_sizes());
  TORCH_CHECK(c.weight.dim() == dims, "conv_norm_act: weight must have input's ", dims,
              " dimensions, [C_out, C_in / groups, kernel...], got ", c.weight.sym_sizes());
  TORCH_CHECK(c.groups > 0 && c.weight.sym_size(1) * c.groups == c.input.sym_size(1) &&
                  c.weight.sym_size(0) % c.groups == 0,
              "conv_norm_act: weight ", c.weight.sym_sizes(), " with groups ", c.groups, " expects ",
              c.weight.sym_size(1) * c.groups, " input channels, got ", c.input.sym_size(1));
  TORCH_CHECK(c.weight.scalar_type() == c.input.scalar_type(),
              "conv_norm_act: weight must have input's dtype ", toString(c.input.scalar_type()), ", got ",
              toString(c.weight.scalar_type()));
  const auto parameter = [&](const char* name, const at::Tensor& x) {
    if (!x.defined()) return;
    TORCH_CHECK(x.dim() == 1 && x.sym_size(0) == c.weight.sym_size(0), "conv_norm_act: ", name, " must be [",
                c.weight.sym_size(0), "], the output's channels, got ", x.sym_sizes());
  };
  parameter("bias", c.bias);
  parameter("norm_weight", c.norm_weight);
  parameter("norm_bias", c.norm_bias);
  parameter("running_mean", c.running_mean);
  parameter("running_var", c.running_var);
  TORCH_CHECK(c.settings.norm != ops::UnitNorm::none || !(c.norm_weight.defined() || c.norm_bias.defined()),
              "conv_norm_act: norm 'none' takes no norm_weight or norm_bias");
  TORCH_CHECK(c.settings.norm != ops::UnitNorm::batch || c.training ||
                  (c.running_mean.defined() && c.running_var.defined()),
              "conv_norm_act: training = false needs running_mean and running_var");
  TORCH_CHECK(c.running_mean.defined() == c.running_var.defined(),
              "conv_norm_act: running_mean and running_var go together, got one of them");
  TORCH_CHECK(c.settings.norm != ops::UnitNorm::group || c.weight.sym_size(0) % c.settings.norm_groups == 0,
              "conv_norm_act: the norm's groups must divide the output's channels, got ",
              c.settings.norm_groups, " for ", c.weight.sym_size(0));
}

void check_residual(const Call& c, const at::Tensor& z) {
  if (!c.residual.defined()) return;
  TORCH_CHECK(c.residual.sym_sizes() == z.sym_sizes() && c.residual.scalar_type() == z.scalar_type(),
              "conv_norm_act: residual must have the output's shape and dtype, ", z.sym_sizes(), " of ",
              toString(z.scalar_type()), ", got ", c.residual.sym_sizes(), " of ",
              toString(c.residual.scalar_type()));
}

at::Tensor convolve(const Call& c) {
  return at::convolution(c.input, c.weight, optional(c.bias), c.stride, c.padding, c.dilation, false,
                         std::vector<int64_t>(c.stride.size(), 0), c.groups);
}

// PyTorch's own operations.
at::Tensor plain(const Call& c) {
  at::Tensor y = convolve(c);
  check_residual(c, y);
  if (c.settings.norm == ops::UnitNorm::batch) {
    y = at::batch_norm(y, optional(c.norm_weight), optional(c.norm_bias), optional(c.running_mean),
                       optional(c.running_var), c.training, c.momentum, c.eps, false);
  } else if (c.settings.norm == ops::UnitNorm::group) {
    y = at::group_norm(y, c.settings.norm_groups, optional(c.norm_weight), optional(c.norm_bias), c.eps);
  }
  if (c.residual.defined()) y = y + c.residual;
  if (c.settings.silu) return at::silu(y);
  if (c.settings.slope == 0) return at::relu(y);
  return c.settings.slope == 1 ? y : at::leaky_relu(y, c.settings.slope);
}

// Double, [sets, C].
struct Statistics {
  at::Tensor mean, variance;
  int64_t count = 0;
};

Statistics statistics_of(const Call& c, const at::Tensor& z) {
  const int64_t samples = z.size(0), channels = z.size(1), positions = z.numel() / (samples * channels);
  if (!c.own_statistics()) {
    return {c.running_mean.to(at::kDouble).view({1, -1}), c.running_var.to(at::kDouble).view({1, -1}), 0};
  }
  // Squares of differences from a value that occurs lose no digits to a large mean.
  at::Tensor pivot = z;
  while (pivot.dim() > 2) pivot = pivot.select(2, 0);
  if (c.of_batch()) pivot = pivot.narrow(0, 0, 1);
  pivot = pivot.to(ops::accumulation_type(z.scalar_type())).contiguous();
  const int64_t count = c.of_batch() ? samples * positions : positions;
  const at::Tensor moments = ops::unit_moments(z, pivot) / static_cast<double>(count);
  at::Tensor mean = moments.select(0, 0);
  at::Tensor variance = (moments.select(0, 1) - mean * mean).clamp_min(0);
  mean = mean + pivot;
  if (c.of_batch()) {
    TORCH_CHECK(count > 1,
                "conv_norm_act: batch norm needs more than one value a channel in training, got an "
                "output of shape ",
                z.sizes());
    return {mean, variance, count};
  }
  const auto grouped = [&](const at::Tensor& x) { return x.view({samples, c.settings.norm_groups, -1}); };
  const at::Tensor means = grouped(mean), of_group = means.mean({2}, true);
  const at::Tensor spread = (grouped(variance) + (means - of_group).square()).mean({2}, true);
  const auto all = [&](const at::Tensor& x) { return x.expand(means.sizes()).reshape({samples, channels}); };
  return {all(of_group), all(spread), count * (channels / c.settings.norm_groups)};
}

void update_running(const Call& c, const Statistics& s) {
  if (!c.of_batch() || !c.running_mean.defined()) return;
  const double unbiased = static_cast<double>(s.count) / static_cast<double>(s.count - 1);
  const auto update = [&](at::Tensor running, const at::Tensor& now) {
    running.mul_(1 - c.momentum).add_(now.view({-1}).to(running.scalar_type()), c.momentum);
  };
  update(c.running_mean, s.mean);
  update(c.running_var, s.variance * unbiased);
}

double root_mean_square(const at::Tensor& moments, int64_t channel, int64_t count) {
  const at::Tensor squares = moments.select(0, 1).sum(0);
  return std::sqrt(squares.const_data_ptr<double>()[channel] / static_cast<double>(count));
}

// Channels whose x^ the sum does not give back well enough.
std::vector<int64_t> hidden_channels(const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& z,
                                     const at::Tensor& residual) {
  const at::Tensor w = weight.cpu().contiguous(), b = bias.cpu().contiguous();
  const bool half = z.element_size() == 2;
  at::Tensor moments;
  int64_t count = 0;
  if (residual.defined()) {
    // Of every seventh sample: the limit is a rough one, and reading them all would be a pass by itself.
    const at::Tensor some = residual.size(0) < 2 * kSampleStride
                                ? residual
                                : ops::in_order_of(residual.slice(0, {}, {}, kSampleStride), residual);
    moments = ops::unit_moments(some, at::zeros({1, z.size(1)}, weight.options())).cpu();
    count = some.numel() / z.size(1);
  }
  std::vector<int64_t> hidden;
  for (int64_t c = 0; c < w.numel(); ++c) {
    const double size = std::abs(w.const_data_ptr<double>()[c]),
                 of_bias = std::abs(b.const_data_ptr<double>()[c]);
    const double beside = residual.defined() ? root_mean_square(moments, c, count) : 0;
    // Written so that NaN is hidden.
    const bool seen = size >= kLeastWeight && size <= kMostWeight &&
                      of_bias <= (half ? kMostBiasOfHalf : kMostBias) * size &&
                      beside <= (half ? kMostResidualOfHalf : kMostResidual) * size;
    if (!seen) hidden.push_back(c);
  }
  return hidden;
}

// Whether x^ crosses 0 = x^ + kink in one of the channels `far`. Codes of x^ + kink would have the kink
// exact, but groups of channels-last memory share their steps: so far a shift would spoil the neighbours.
bool reaches_kink(const at::Tensor& z, const at::Tensor& mean, const at::Tensor& rstd, const at::Tensor& kink,
                  const at::Tensor& far) {
  const at::Tensor list = far.nonzero().flatten();
  if (list.numel() == 0 || z.numel() == 0) return false;
  std::vector<int64_t> shape(static_cast<size_t>(z.dim()), 1);
  shape[0] = rstd.size(0);
  shape[1] = list.numel();
  const auto chosen = [&](const at::Tensor& x) { return x.index_select(1, list).view(shape); };
  const at::Tensor normal = (z.index_select(1, list) - chosen(mean)) * chosen(rstd);
  shape[0] = 1;
  const at::Tensor at_kink = normal + kink.index_select(0, list).view(shape);
  const at::Tensor planes = at_kink.transpose(0, 1).flatten(1);
  return planes.amin(1).lt(0).logical_and_(planes.amax(1).gt(0)).any().item<bool>();
}

at::Tensor index_of(const std::vector<int64_t>& list, const at::Tensor& like) {
  return at::tensor(list, like.options().dtype(at::kLong));
}

// Places of what is saved; the tensors of recipes follow.
enum Saved {
  kWeight,
  kValue,
  kNormal,
  kNormalTable,
  kSum,
  kSumTable,
  kFactor,
  kOffset,
  kResidual,
  kParameters,
  kAside,
  kSaved
};

// Rows of the parameters that a backward needs, double [4 or 2 + ..., sets, C]: norm_weight, rstd, and x^ = u
// slope + start.
enum Row { kRowWeight, kRowRstd, kRowSlope, kRowStart };

struct UnitFunction : torch::autograd::Function<UnitFunction> {
  // Residuals are found by address, which a tracer could not repeat; tracers get PyTorch's operations.
  static constexpr bool is_traceable = false;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& norm_weight,
                            const OptionalTensor& norm_bias, const OptionalTensor& residual, const Call& call,
                            std::array<bool, 6> needs) {
    variable_list saved(kSaved);
    Statistics statistics;
    at::Tensor y;
    std::vector<int64_t> hidden;
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      y = run(ctx, call, needs, saved, statistics, hidden);
    }
    if (statistics.mean.defined()) update_running(call, statistics);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["hidden"] = hidden;
    ctx->saved_data["policy"] = call.settings.memory.str();
    ctx->saved_data["needs"] = std::vector<bool>(needs.begin(), needs.end());
    ctx->saved_data["stride"] = call.stride;
    ctx->saved_data["padding"] = call.padding;
    ctx->saved_data["dilation"] = call.dilation;
    ctx->saved_data["groups"] = call.groups;
    ctx->saved_data["own"] = call.own_statistics();
    ctx->saved_data["norm"] = static_cast<int64_t>(call.settings.norm);
    ctx->saved_data["norm_groups"] = call.settings.norm_groups;
    ctx->saved_data["slope"] = call.settings.slope;
    ctx->saved_data["bits"] = call.settings.memory.bits;
    ctx->saved_data["input_sizes"] = call.input.sizes().vec();
    return y;
  }

  // What gives back a tensor that others may keep already; itself, if nothing does.
  static ops::Derived source_of(const at::Tensor& x, bool exact) {
    auto found = ops::find_derived(x);
    if (found.has_value() && (!exact || found->exact())) return *std::move(found);
    ops::Derived whole;
    whole.value = x;
    return whole;
  }

  static ops::Derived input_of(const Call& call, bool exact) {
    ops::Derived from = source_of(call.input, exact);
    const int64_t bits = call.settings.memory.bits;
    if (bits > 0 && from.value.is_same(call.input)) {
      const at::Tensor input = ops::dense(call.input);
      from.base = ops::Derived::Base::codes;
      from.value = at::Tensor();
      from.bits = bits;
      from.codes = ops::shared_codes(ops::in_memory_order(input), bits, call.generator);
      from.sizes = input.sizes().vec();
      from.format = ops::format_of(input);
      from.type = input.scalar_type();
    } else if (bits > 0) {
      ops::skip_seeds(call.input, 1, call.generator);
    }
    return from;
  }

  static void save(AutogradContext* ctx, const char* name, const ops::Derived& from, variable_list& saved) {
    ops::Recipe recipe = ops::pack(from);
    // Where its tensors begin, then its numbers.
    recipe.settings.insert(recipe.settings.begin(), static_cast<int64_t>(saved.size()));
    saved.insert(saved.end(), recipe.tensors.begin(), recipe.tensors.end());
    ctx->saved_data[name] = recipe.settings;
  }

  static std::optional<ops::Derived> saved_recipe(const AutogradContext* ctx, const char* name,
                                                  const variable_list& saved) {
    const auto found = ctx->saved_data.find(name);
    if (found == ctx->saved_data.end()) return std::nullopt;
    std::vector<int64_t> settings = found->second.toIntVector();
    ops::Recipe recipe{{saved.begin() + settings[0], saved.end()}, {settings.begin() + 1, settings.end()}};
    return ops::unpack(recipe);
  }

  static at::Tensor run(AutogradContext* ctx, const Call& call, const std::array<bool, 6>& needs,
                        variable_list& saved, Statistics& statistics, std::vector<int64_t>& hidden) {
    const bool of_input = needs[0] || needs[1] || needs[2];
    const bool normed = call.settings.norm != ops::UnitNorm::none;
    const bool want_normal = normed && (needs[3] || (of_input && call.own_statistics()));
    const int64_t bits = call.settings.memory.bits;
    const double slope = call.settings.slope;
    ctx->saved_data["input_format"] = static_cast<int64_t>(ops::format_of(ops::dense(call.input)));
    const bool active = slope != 1;
    ops::Derived source;
    bool again = call.recompute && bits == 0 && (want_normal || active);
    if (again) {
      source = source_of(call.input, false);
      again = source.exact();
    }
    if (!again && needs[1]) {
      save(ctx, "input", input_of(call, false), saved);
    } else if (bits > 0) {
      ops::skip_seeds(call.input, 1, call.generator);
    }
    if (needs[0] || needs[1]) saved[kWeight] = call.weight;

    at::Tensor z = ops::dense(convolve(call));
    check_residual(call, z);
    ctx->saved_data["format"] = static_cast<int64_t>(ops::format_of(z));
    ops::UnitKept kept;
    kept.slope = slope;
    kept.bits = bits;
    const at::Tensor residual = call.residual.defined() ? ops::in_order_of(call.residual, z) : at::Tensor();
    at::Tensor scale, shift, own, xslope, xstart, rstd;
    bool apart = false;  // codes of x^ and of the sum, as beside a residual
    if (normed) {
      statistics = statistics_of(call, z);
      const auto options = z.options().dtype(at::kDouble);
      // Copies: the parameters may change before the backward.
      own = call.norm_weight.defined() ? call.norm_weight.to(options, false, true)
                                       : at::ones({z.size(1)}, options);
      const at::Tensor bias = call.norm_bias.defined() ? call.norm_bias.to(options, false, true)
                                                       : at::zeros({z.size(1)}, options);
      rstd = (statistics.variance + call.eps).rsqrt();
      if ((bits == 0 && !again) || !want_normal) {
        scale = rstd * own;
        shift = bias - statistics.mean * scale;
        if (want_normal) {
          hidden = hidden_channels(own, bias, z, residual);
          xslope = own.reciprocal();
          xstart = -bias * xslope;
          if (!hidden.empty()) {
            const at::Tensor list = index_of(hidden, z);
            xslope = xslope.index_fill(0, list, 0);
            xstart = xstart.index_fill(0, list, 0);
            std::vector<int64_t> shape(static_cast<size_t>(z.dim()), 1);
            shape[0] = rstd.size(0);
            shape[1] = static_cast<int64_t>(hidden.size());
            const auto wide = ops::accumulation_type(z.scalar_type());
            const auto chosen = [&](const at::Tensor& x) {
              return x.index_select(1, list).to(wide).view(shape);
            };
            saved[kAside] =
                ((z.index_select(1, list) - chosen(statistics.mean)) * chosen(rstd)).to(z.scalar_type());
          }
        }
      } else {
        scale = rstd;
        shift = -statistics.mean * rstd;
        kept.factor = own;
        kept.offset = bias;
        xslope = at::ones({z.size(1)}, options);
        xstart = at::zeros({z.size(1)}, options);
        if (active && !residual.defined() && !again) {
          const at::Tensor steep = own.abs().ge(kLeastWeight);
          const at::Tensor near = bias.abs().le(own.abs() * kNearKink).logical_and(steep);
          apart = reaches_kink(z, statistics.mean, rstd, bias / own, steep.logical_and(near.logical_not()));
          // The kink at u = 0 in every channel where x^ comes near it; -0 keeps the sign of a -0.
          const at::Tensor zero = at::zeros({}, options);
          if (!apart) {
            const at::Tensor kink = at::where(near, bias / own, zero);
            shift = shift + kink;
            xstart = -kink;
            const double least = std::numeric_limits<float>::min();
            kept.offset = at::where(near, at::full_like(bias, -0.0),
                                    at::where(bias.eq(0), at::full_like(bias, -least), bias));
            kept.normal_kinked = true;
          }
        }
        const auto wide = ops::accumulation_type(z.scalar_type());
        kept.factor = kept.factor.to(wide).contiguous();
        kept.offset = kept.offset.to(wide).contiguous();
      }
    }
    at::Tensor normal_seed, sum_seed;
    bool keep_sum = false;
    if (bits > 0) {
      const bool alone = !residual.defined() && want_normal && !apart;
      // Drawn whether used or not, as ops::skip_seeds says.
      const at::Tensor first = ops::draw_seed(z, call.generator), second = ops::draw_seed(z, call.generator);
      if (want_normal) normal_seed = first;
      if (active && !alone) sum_seed = second;
    } else {
      // Where x^ is not wanted the output's sign is enough.
      keep_sum = slope < kLeastSlope && want_normal && !again;
    }
    at::Tensor y;
    ops::Derived whole;
    if (again) {
      whole = recipe_of(call, source, z, scale, shift, residual, kept);
      y = ops::finish(whole, z);
      save(ctx, "again", whole, saved);
    } else {
      y = ops::unit_forward(z, scale, shift, residual, kept, keep_sum, normal_seed, sum_seed);
    }
    if (!again && bits == 0 && (want_normal || active)) {
      saved[kValue] = keep_sum ? z : y;
      ctx->saved_data["inverse"] = keep_sum || !active || slope == 0 ? 1.0 : 1.0 / slope;
      if (want_normal && residual.defined()) keep_residual(ctx, call, z, residual, saved);
    }
    saved[kNormal] = kept.normal.codes;
    saved[kNormalTable] = kept.normal.table;
    saved[kSum] = kept.sum.codes;
    saved[kSumTable] = kept.sum.table;
    if (kept.normal.codes.defined()) {
      saved[kFactor] = kept.factor;
      saved[kOffset] = kept.offset;
    }
    ctx->saved_data["kinked"] = kept.normal_kinked;
    if (normed && (of_input || needs[3])) {
      const auto whole = [&](const at::Tensor& x) { return x.expand({rstd.size(0), -1}); };
      std::vector<at::Tensor> rows{whole(own), whole(rstd)};
      if (want_normal) {
        rows.push_back(whole(xslope));
        rows.push_back(whole(xstart));
      }
      saved[kParameters] = at::stack(rows);
    }
    if (again) {
      ops::note_derived(y, whole);
    } else {
      note(y, z, kept, keep_sum, residual.defined(), saved[kValue].defined());
    }
    return y;
  }

  static void keep_residual(AutogradContext* ctx, const Call& call, const at::Tensor& z,
                            const at::Tensor& residual, variable_list& saved) {
    const ops::Derived from = source_of(call.residual, true);
    const bool made = from.base != ops::Derived::Base::value || from.silu;
    if (made) {
      save(ctx, "residual", from, saved);
      return;
    }
    const bool usable = from.value.strides() == z.strides();
    saved[kResidual] = usable ? from.value : residual;
    ctx->saved_data["residual_slope"] = usable ? from.slope : 1.0;
  }

  // How y comes from the input.
  static ops::Derived recipe_of(const Call& call, const ops::Derived& source, const at::Tensor& z,
                                const at::Tensor& scale, const at::Tensor& shift, const at::Tensor& residual,
                                const ops::UnitKept& kept) {
    ops::Derived from;
    from.sizes = z.sizes().vec();
    from.format = ops::format_of(z);
    from.type = z.scalar_type();
    from.base = ops::Derived::Base::convolution;
    from.source = std::make_shared<const ops::Derived>(source);
    from.weight = call.weight;
    from.bias = call.bias;
    from.stride = call.stride;
    from.padding = call.padding;
    from.dilation = call.dilation;
    from.groups = call.groups;
    const auto wide = [&](const at::Tensor& x) {
      return x.defined() ? x.to(ops::accumulation_type(z.scalar_type())).contiguous() : x;
    };
    from.scale = wide(scale);
    from.shift = wide(shift);
    from.factor = kept.factor;
    from.offset = kept.offset;
    from.slope = kept.slope;
    if (residual.defined()) {
      ops::Derived beside = source_of(call.residual, true);
      if (beside.value.is_same(call.residual)) beside.value = residual;
      from.residual = std::make_shared<const ops::Derived>(std::move(beside));
    }
    return from;
  }

  static void note(const at::Tensor& y, const at::Tensor& z, const ops::UnitKept& kept, bool keep_sum,
                   bool residual, bool keep_output) {
    ops::Derived from;
    from.slope = kept.slope;
    from.bits = kept.bits;
    if (keep_sum) {
      from.value = z;
    } else if (keep_output) {
      from.value = y;
      from.slope = 1;
    } else if (kept.sum.codes.defined()) {
      from.base = ops::Derived::Base::codes;
      from.codes = kept.sum;
      from.kinked = true;
    } else if (kept.normal.codes.defined() && !residual) {
      from.base = ops::Derived::Base::codes;
      from.codes = kept.normal;
      from.kinked = kept.normal_kinked;
      from.factor = kept.factor;
      from.offset = kept.offset;
    } else {
      return;
    }
    ops::note_derived(y, from);
  }

  // u, and with a residual the sum, as the forward had them.
  static void convolve_again(const ops::Derived& from, const at::Tensor& input, ops::UnitKept& kept) {
    at::Tensor normal = ops::convolve(from, input);
    ops::UnitKept plain;
    normal = ops::unit_forward(normal, from.scale, from.shift, {}, plain, false, {}, {});
    kept.factor = from.factor;
    kept.offset = from.offset;
    if (from.residual && kept.slope != 1) {
      plain.factor = from.factor;
      plain.offset = from.offset;
      at::Tensor sum = normal.clone();
      const at::Tensor residual = ops::in_order_of(ops::rebuild(*from.residual), sum);
      kept.value = ops::unit_forward(sum, {}, {}, residual, plain, false, {}, {});
    }
    kept.normal_value = normal;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "conv_norm_act has no gradient of its gradient; use memory 'eager' where you need one");
    variable_list result(8);
    const auto& data = ctx->saved_data;
    const auto list = [&](const char* name) { return data.at(name).toIntVector(); };
    const auto wanted = data.at("needs").toBoolList();
    const bool of_input = wanted[0] || wanted[1] || wanted[2];
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& parameters = saved[kParameters];

    ops::UnitKept kept;
    kept.value = saved[kValue];
    kept.normal = {saved[kNormal], saved[kNormalTable]};
    kept.sum = {saved[kSum], saved[kSumTable]};
    kept.normal_kinked = data.at("kinked").toBool();
    kept.bits = data.at("bits").toInt();
    kept.factor = saved[kFactor];
    kept.offset = saved[kOffset];
    kept.slope = data.at("slope").toDouble();
    kept.residual = saved[kResidual];
    if (kept.value.defined()) kept.inverse_slope = data.at("inverse").toDouble();
    if (kept.residual.defined()) kept.residual_slope = data.at("residual_slope").toDouble();
    const auto again = saved_recipe(ctx, "again", saved);
    at::Tensor input;
    if (again.has_value()) {
      input = ops::rebuild(*again->source);
      convolve_again(*again, input, kept);
    }
    if (const auto residual = saved_recipe(ctx, "residual", saved)) {
      kept.residual = ops::in_order_of(ops::rebuild(*residual), kept.value);
    }
    at::Tensor grad = ops::dense(grads[0]);
    if (kept.value.defined()) {
      grad = ops::in_order_of(grads[0], kept.value);
    } else if (again.has_value() || kept.normal.codes.defined() || kept.sum.codes.defined()) {
      grad = grads[0].contiguous(static_cast<at::MemoryFormat>(data.at("format").toInt()));
    }

    at::Tensor of_grad, of_u, constant, grad_aside;
    const auto hidden = list("hidden");
    const bool own = data.at("own").toBool();
    const bool reduce = wanted[3] || wanted[4] || (of_input && own);
    if (parameters.defined()) of_grad = parameters[kRowWeight] * parameters[kRowRstd];
    if (reduce) {
      const int64_t sets = parameters.defined() ? parameters.size(1) : 1;
      const at::Tensor sums = ops::unit_reduce(grad, kept, sets);
      const at::Tensor of_g = sums[0];
      if (wanted[4]) result[4] = of_g.sum(0);
      if (wanted[3] || (of_input && own)) {
        at::Tensor of_product = parameters[kRowSlope] * sums[1] + parameters[kRowStart] * of_g;
        if (!hidden.empty()) {
          const at::Tensor chosen = index_of(hidden, grad);
          grad_aside = grad.index_select(1, chosen).to(at::kDouble);
          if (kept.slope != 1) {
            const at::Tensor passes = kept.value.index_select(1, chosen).gt(0);
            grad_aside = at::where(passes, grad_aside, grad_aside * kept.slope);
          }
          const at::Tensor each = (grad_aside * saved[kAside]).flatten(2).sum(2);
          of_product = of_product.index_copy(1, chosen, sets == 1 ? each.sum(0, true) : each);
        }
        if (wanted[3]) result[3] = of_product.sum(0);
        if (of_input && own) {
          const double count = static_cast<double>(grad.numel()) / static_cast<double>(sums[0].numel());
          const at::Tensor rstd = parameters[kRowRstd];
          at::Tensor first = parameters[kRowWeight] * of_g / count,
                     second = parameters[kRowWeight] * of_product / count;
          if (static_cast<ops::UnitNorm>(data.at("norm").toInt()) == ops::UnitNorm::group) {
            const auto over_group = [&](const at::Tensor& x) {
              const at::Tensor grouped = x.view({x.size(0), data.at("norm_groups").toInt(), -1});
              return grouped.mean({2}, true).expand(grouped.sizes()).reshape(x.sizes());
            };
            first = over_group(first);
            second = over_group(second);
          }
          second = second * rstd;
          of_u = -second * parameters[kRowSlope];
          constant = -first * rstd - second * parameters[kRowStart];
          if (!hidden.empty()) {
            const at::Tensor chosen = index_of(hidden, grad);
            std::vector<int64_t> shape(static_cast<size_t>(grad.dim()), 1);
            shape[0] = sets;
            shape[1] = chosen.numel();
            grad_aside = saved[kAside] * second.index_select(1, chosen).view(shape).neg();
          }
        }
      }
    }
    auto [grad_conv, grad_residual] =
        ops::unit_backward(grad, kept, of_grad, of_u, constant, of_input, wanted[5]);
    if (wanted[5]) result[5] = grad_residual;
    if (!of_input) return result;
    if (own && !hidden.empty()) {
      grad_conv.index_add_(1, index_of(hidden, grad), grad_aside.to(grad.scalar_type()));
    }
    if (!wanted[1]) {
      // Its shape and order alone are looked at.
      input = at::empty(list("input_sizes"), grad.options(),
                        static_cast<at::MemoryFormat>(data.at("input_format").toInt()));
    } else if (!input.defined()) {
      input = ops::rebuild(*saved_recipe(ctx, "input", saved));
    }
    const auto stride = list("stride");
    const at::Tensor weight = saved[kWeight].defined() ? saved[kWeight] : at::Tensor();
    if (!weight.defined()) {
      result[2] = grad_conv.flatten(2).sum(at::IntArrayRef{0, 2});
      return result;
    }
    auto [grad_input, grad_weight, grad_bias] = at::convolution_backward(
        grad_conv, input, weight, at::OptionalIntArrayRef(at::IntArrayRef{grad_conv.size(1)}), stride,
        list("padding"), list("dilation"), false, std::vector<int64_t>(stride.size(), 0),
        data.at("groups").toInt(), {wanted[0], wanted[1], wanted[2]});
    result[0] = grad_input;
    result[1] = grad_weight;
    result[2] = grad_bias;
    return result;
  }
};

Call make_call(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
               const OptionalTensor& running_mean, const OptionalTensor& running_var,
               const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
               at::IntArrayRef dilation, int64_t groups, c10::string_view norm, bool training,
               double momentum, double eps, c10::string_view activation, c10::string_view memory,
               const OptionalGenerator& generator, bool recompute) {
  Call c{input,
         weight,
         unwrap(bias),
         unwrap(norm_weight),
         unwrap(norm_bias),
         unwrap(running_mean),
         unwrap(running_var),
         unwrap(residual),
         {},
         {},
         {},
         groups,
         ops::parse_unit(norm, activation, memory),
         training,
         momentum,
         eps,
         generator,
         recompute};
  check(c);
  const int64_t spatial = input.dim() - 2;
  c.stride = each_dimension("stride", stride, spatial);
  c.padding = each_dimension("padding", padding, spatial);
  c.dilation = each_dimension("dilation", dilation, spatial);
  return c;
}

// Keeps the sum, which the unit's output is, or codes of the derivative, in the sum's memory order.
struct SiluFunction : torch::autograd::Function<SiluFunction> {
  static constexpr bool is_traceable = false;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& sum, int64_t bits,
                            const OptionalGenerator& generator) {
    const at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor y = at::silu(sum);
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["format"] = static_cast<int64_t>(ops::format_of(sum));
    if (bits == 0) {
      ops::Derived from = UnitFunction::source_of(sum, true);
      variable_list saved;
      UnitFunction::save(ctx, "sum", from, saved);
      ctx->save_for_backward(std::move(saved));
      from.silu = true;
      ops::note_derived(y, from);
    } else {
      const at::Tensor slope = at::silu_backward(at::ones({1}, sum.options()).expand(sum.sizes()), sum);
      const ops::Codes kept =
          ops::encode(ops::in_memory_order(ops::in_order_of(slope, sum)), bits, generator);
      ctx->save_for_backward({kept.codes, kept.table});
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "conv_norm_act has no gradient of its gradient; use memory 'eager' where you need one");
    const variable_list saved = ctx->get_saved_variables();
    const int64_t bits = ctx->saved_data["bits"].toInt();
    variable_list result(3);
    if (bits == 0) {
      result[0] = at::silu_backward(grads[0], ops::rebuild(*UnitFunction::saved_recipe(ctx, "sum", saved)));
    } else {
      ops::Derived slope;
      slope.base = ops::Derived::Base::codes;
      slope.codes = {saved[0], saved[1]};
      slope.bits = bits;
      slope.sizes = grads[0].sizes().vec();
      slope.format = static_cast<at::MemoryFormat>(ctx->saved_data["format"].toInt());
      slope.type = grads[0].scalar_type();
      result[0] = ops::rebuild(slope).mul_(grads[0]);
    }
    return result;
  }
};

at::Tensor unit(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                const OptionalTensor& running_mean, const OptionalTensor& running_var,
                const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
                at::IntArrayRef dilation, int64_t groups, c10::string_view norm, bool training,
                double momentum, double eps, c10::string_view activation, c10::string_view memory,
                const OptionalGenerator& generator, bool recompute) {
  const Call c = make_call(input, weight, bias, norm_weight, norm_bias, running_mean, running_var, residual,
                           stride, padding, dilation, groups, norm, training, momentum, eps, activation,
                           memory, generator, recompute);
  const auto wants = [](const at::Tensor& x) { return x.defined() && x.requires_grad(); };
  const std::array<bool, 6> needs{wants(c.input),       wants(c.weight),    wants(c.bias),
                                  wants(c.norm_weight), wants(c.norm_bias), wants(c.residual)};
  const bool any = needs[0] || needs[1] || needs[2] || needs[3] || needs[4] || needs[5];
  if (!at::GradMode::is_enabled() || !any || c.settings.memory.kind == Memory::Kind::eager ||
      ops::is_traced(input) || ops::is_traced(weight) || input.sym_numel() == 0) {
    if (c.settings.memory.bits > 0 && !ops::is_traced(input)) {
      ops::skip_seeds(input, c.settings.silu ? 4 : 3, generator);
    }
    return plain(c);
  }
  const at::Tensor y = UnitFunction::apply(input, weight, bias, norm_weight, norm_bias, residual, c, needs);
  return c.settings.silu ? SiluFunction::apply(y, c.settings.memory.bits, generator) : y;
}

at::Tensor without_gradient(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                            const OptionalTensor& running_mean, const OptionalTensor& running_var,
                            const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups, c10::string_view norm, bool training,
                            double momentum, double eps, c10::string_view activation, c10::string_view memory,
                            const OptionalGenerator& generator, bool recompute) {
  return plain(make_call(input, weight, bias, norm_weight, norm_bias, running_mean, running_var, residual,
                         stride, padding, dilation, groups, norm, training, momentum, eps, activation, memory,
                         generator, recompute));
}

}  // namespace

TORCH_LIBRARY_IMPL(remnant, CompositeExplicitAutograd, m) {
  m.impl("conv_norm_act", TORCH_FN(without_gradient));
}
TORCH_LIBRARY_IMPL(remnant, Meta, m) { m.impl("conv_norm_act", TORCH_FN(without_gradient)); }
TORCH_LIBRARY_IMPL(remnant, Autograd, m) { m.impl("conv_norm_act", TORCH_FN(unit)); }

}  // namespace remnant::autograd
