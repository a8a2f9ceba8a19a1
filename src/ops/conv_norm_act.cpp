#include <remnant/ops/conv_norm_act.h>

#include "ops/conv_settings.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <charconv>
#include <string>

namespace remnant {

namespace ops {

namespace {

// The number behind `start`, all of the rest.
template <typename T>
bool number_after(std::string_view text, std::string_view start, T& number) {
  if (!text.starts_with(start)) return false;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data() + start.size(), end, number);
  return error == std::errc() && rest == end;
}

}  // namespace

UnitSettings parse_unit(c10::string_view norm, c10::string_view activation, c10::string_view memory) {
  UnitSettings settings;
  const std::string_view norms(norm.data(), norm.size()), acts(activation.data(), activation.size());
  if (norms == "none") {
    settings.norm = UnitNorm::none;
  } else if (number_after(norms, "group:groups=", settings.norm_groups) && settings.norm_groups > 0) {
    settings.norm = UnitNorm::group;
  } else {
    TORCH_CHECK(norms == "batch", "conv_norm_act: norm must be 'batch', 'group:groups=8' or 'none', got '",
                norm, "'");
  }
  if (acts == "identity" || acts == "silu") {
    settings.slope = 1;
    settings.silu = acts == "silu";
  } else if (acts == "leaky") {
    settings.slope = 0.01;
  } else if (acts != "relu") {
    TORCH_CHECK(
        number_after(acts, "leaky:slope=", settings.slope) && settings.slope >= 0 && settings.slope < 1e30,
        "conv_norm_act: activation must be 'relu', 'leaky:slope=0.01' with a slope of at least 0, "
        "'silu' or 'identity', got '",
        activation, "'");
  }
  settings.memory = Memory::parse(std::string_view(memory.data(), memory.size()));
  TORCH_CHECK(settings.memory.kind != Memory::Kind::budget,
              "conv_norm_act: memory must be 'eager', 'exact' or 'unbiased:bits=B', got '", memory,
              "'; a budget is for remnant::plan");
  return settings;
}

}  // namespace ops

at::Tensor conv_norm_act(const at::Tensor& input, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& norm_weight,
                         const std::optional<at::Tensor>& norm_bias,
                         const std::optional<at::Tensor>& running_mean,
                         const std::optional<at::Tensor>& running_var,
                         const std::optional<at::Tensor>& residual, const ConvNormActOptions& options) {
  using OptionalTensor = std::optional<at::Tensor>;
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("remnant::conv_norm_act", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, at::IntArrayRef, at::IntArrayRef,
                            at::IntArrayRef, int64_t, c10::string_view, bool, double, double,
                            c10::string_view, c10::string_view, const std::optional<at::Generator>&, bool)>();
  return op.call(input, weight, bias, norm_weight, norm_bias, running_mean, running_var, residual,
                 options.stride, options.padding, options.dilation, options.groups, options.norm,
                 options.training, options.momentum, options.eps, options.activation, options.memory.str(),
                 options.generator, options.recompute);
}

}  // namespace remnant
