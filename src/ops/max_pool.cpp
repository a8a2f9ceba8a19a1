#include <remnant/ops/max_pool.h>

#include "kernels/cpu/step_kernels.h"
#include "ops/attention_common.h"
#include "ops/step_common.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

namespace remnant {

namespace ops {

namespace {

using Pair = std::tuple<at::Tensor, at::Tensor>;

struct Windows {
  std::array<int64_t, 2> kernel{}, stride{}, padding{}, dilation{};
};

std::array<int64_t, 2> both(const char* name, at::IntArrayRef numbers, int64_t least) {
  TORCH_CHECK(numbers.size() == 1 || numbers.size() == 2, "max_pool2d: ", name,
              " should be one number or two, got ", numbers);
  const std::array<int64_t, 2> result{numbers[0], numbers.back()};
  TORCH_CHECK(std::min(result[0], result[1]) >= least, "max_pool2d: ", name, " should be at least ", least,
              ", got ", numbers);
  return result;
}

Windows windows_of(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation) {
  Windows w;
  w.kernel = both("kernel_size", kernel, 1);
  w.stride = stride.empty() ? w.kernel : both("stride", stride, 1);
  w.padding = both("padding", padding, 0);
  w.dilation = both("dilation", dilation, 1);
  for (size_t i = 0; i < 2; ++i) {
    TORCH_CHECK(2 * w.padding[i] <= w.kernel[i], "max_pool2d: padding should be at most half of kernel_size ",
                kernel, ", got ", padding);
  }
  TORCH_CHECK(w.kernel[0] * w.kernel[1] <= kernels::kMostTaps, "max_pool2d: a window should have at most ",
              kernels::kMostTaps, " elements, got kernel_size ", kernel, "; use torch's max_pool2d");
  return w;
}

c10::SymInt outputs(const c10::SymInt& size, const Windows& w, size_t i, bool ceil_mode) {
  const c10::SymInt room = size + 2 * w.padding[i] - w.dilation[i] * (w.kernel[i] - 1) - 1;
  c10::SymInt count = (room + (ceil_mode ? w.stride[i] - 1 : 0)) / w.stride[i] + 1;
  // The last window begins inside the input or its left padding.
  if (ceil_mode && (count - 1) * w.stride[i] >= size + w.padding[i]) count = count - 1;
  TORCH_CHECK(room >= 0 && count > 0, "max_pool2d: a window is larger than input, of size ", size);
  return count;
}

std::vector<c10::SymInt> output_sizes(const at::Tensor& input, const Windows& w, bool ceil_mode) {
  check_floating("max_pool2d", "input", input);
  TORCH_CHECK(input.dim() == 4, "max_pool2d: input must be [N, C, H, W], got ", input.sym_sizes());
  return {input.sym_size(0), input.sym_size(1), outputs(input.sym_size(2), w, 0, ceil_mode),
          outputs(input.sym_size(3), w, 1, ceil_mode)};
}

at::Tensor empty_like_input(const at::Tensor& like, c10::SymIntArrayRef sizes, at::ScalarType type) {
  return at::empty_symint(sizes, like.options().dtype(type).memory_format(like.suggest_memory_format()));
}

kernels::MaxPool problem_of(const at::Tensor& x, at::IntArrayRef input, at::IntArrayRef output,
                            const Windows& w) {
  kernels::MaxPool p;
  p.element = element_of(x.scalar_type());
  p.channels_last = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  p.channels = input[1];
  p.height = input[2];
  p.width = input[3];
  p.out_height = output[2];
  p.out_width = output[3];
  for (size_t i = 0; i < 2; ++i) {
    p.kernel[i] = w.kernel[i];
    p.stride[i] = w.stride[i];
    p.padding[i] = w.padding[i];
    p.dilation[i] = w.dilation[i];
  }
  return p;
}

// f of rows [begin, end) of all samples' or planes' `height` rows, in multiples of `least`.
template <typename F>
void each_row(const kernels::MaxPool& p, int64_t samples, int64_t height, int64_t least, const F& f) {
  const int64_t parts = samples * (p.channels_last ? 1 : p.channels) * height / least;
  const int64_t elements = least * p.width * (p.channels_last ? p.channels : 1);
  at::parallel_for(0, parts, std::max<int64_t>(1, 8192 / std::max<int64_t>(elements, 1)),
                   [&](int64_t begin, int64_t end) { f(begin * least, end * least); });
}

// Any device: from the positions that torch's pooling gives.
Pair forward_composite(const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  const Windows w = windows_of(kernel, stride, padding, dilation);
  output_sizes(input, w, ceil_mode);
  const auto [y, positions] =
      at::max_pool2d_with_indices(input, w.kernel, w.stride, w.padding, w.dilation, ceil_mode);
  const auto first = [&](size_t i) {
    return at::arange(y.size(static_cast<int64_t>(i) + 2), positions.options()) * w.stride[i] - w.padding[i];
  };
  const int64_t width = input.size(3);
  const at::Tensor row = (positions.floor_divide(width) - first(0).unsqueeze(1)).floor_divide(w.dilation[0]);
  const at::Tensor column = (positions.remainder(width) - first(1)).floor_divide(w.dilation[1]);
  return {y, (row * w.kernel[1] + column).to(at::kByte).contiguous(y.suggest_memory_format())};
}

Pair forward_cpu(const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
                 at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  if (!fused_on_cpu()) return forward_composite(input, kernel, stride, padding, dilation, ceil_mode);
  const Windows w = windows_of(kernel, stride, padding, dilation);
  const auto sizes = output_sizes(input, w, ceil_mode);
  const at::Tensor x = input.contiguous(input.suggest_memory_format());
  at::Tensor y = empty_like_input(x, sizes, x.scalar_type()), places = empty_like_input(x, sizes, at::kByte);
  if (y.numel() == 0) return {y, places};
  kernels::MaxPool p = problem_of(x, x.sizes(), y.sizes(), w);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.new_places = places.mutable_data_ptr<uint8_t>();
  each_row(p, x.size(0), p.out_height, 1,
           [&](int64_t begin, int64_t end) { kernels::step_kernels().max_pool_forward(p, begin, end); });
  return {y, places};
}

Pair forward_meta(const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  const Windows w = windows_of(kernel, stride, padding, dilation);
  const auto sizes = output_sizes(input, w, ceil_mode);
  return {empty_like_input(input, sizes, input.scalar_type()), empty_like_input(input, sizes, at::kByte)};
}

void check_backward(const at::Tensor& grad_output, const at::Tensor& places, c10::SymIntArrayRef sizes) {
  TORCH_CHECK(sizes.size() == 4 && grad_output.dim() == 4 && places.sym_sizes() == grad_output.sym_sizes() &&
                  places.scalar_type() == at::kByte,
              "max_pool2d_backward: places must be bytes of grad_output's shape ", grad_output.sym_sizes(),
              ", and input_sizes four numbers");
}

at::Tensor backward_composite(const at::Tensor& grad_output, const at::Tensor& places,
                              c10::SymIntArrayRef sizes, at::IntArrayRef kernel, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_backward(grad_output, places, sizes);
  const Windows w = windows_of(kernel, stride, padding, dilation);
  const auto input = C10_AS_INTARRAYREF_SLOW(sizes);
  const at::Tensor place = places.to(at::kLong);
  const auto first = [&](size_t i) {
    return at::arange(grad_output.size(static_cast<int64_t>(i) + 2), place.options()) * w.stride[i] -
           w.padding[i];
  };
  const at::Tensor row = place.floor_divide(w.kernel[1]) * w.dilation[0] + first(0).unsqueeze(1);
  const at::Tensor column = place.remainder(w.kernel[1]) * w.dilation[1] + first(1);
  return at::zeros({input[0], input[1], input[2] * input[3]}, grad_output.options())
      .scatter_add(2, (row * input[3] + column).flatten(2), grad_output.flatten(2))
      .view(input)
      .contiguous(places.suggest_memory_format());
}

at::Tensor backward_cpu(const at::Tensor& grad_output, const at::Tensor& places, c10::SymIntArrayRef sizes,
                        at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                        at::IntArrayRef dilation) {
  if (!fused_on_cpu()) {
    return backward_composite(grad_output, places, sizes, kernel, stride, padding, dilation);
  }
  check_backward(grad_output, places, sizes);
  const Windows w = windows_of(kernel, stride, padding, dilation);
  const auto format = places.suggest_memory_format();
  const at::Tensor g = grad_output.contiguous(format), kept = places.contiguous(format);
  at::Tensor grad_input = empty_like_input(kept, sizes, g.scalar_type());
  if (grad_input.numel() == 0) return grad_input;
  kernels::MaxPool p = problem_of(g, grad_input.sizes(), g.sizes(), w);
  p.channels_last = format == at::MemoryFormat::ChannelsLast;
  p.grad_y = g.const_data_ptr();
  p.places = kept.const_data_ptr<uint8_t>();
  p.grad_x = grad_input.mutable_data_ptr();
  each_row(p, grad_input.size(0), p.height, p.channels_last ? 1 : p.height,
           [&](int64_t begin, int64_t end) { kernels::step_kernels().max_pool_backward(p, begin, end); });
  return grad_input;
}

at::Tensor backward_meta(const at::Tensor& grad_output, const at::Tensor& places, c10::SymIntArrayRef sizes,
                         at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation) {
  check_backward(grad_output, places, sizes);
  return empty_like_input(places, sizes, grad_output.scalar_type());
}

at::Tensor max_pool2d_op(const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("remnant::max_pool2d_forward", "")
                             .typed<Pair(const at::Tensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                                         at::IntArrayRef, bool)>();
  return std::get<0>(op.call(input, kernel, stride, padding, dilation, ceil_mode));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(remnant, m) {
  m.impl("max_pool2d", c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(max_pool2d_op));
  m.impl("max_pool2d_forward", c10::DispatchKey::CPU, TORCH_FN(forward_cpu));
  m.impl("max_pool2d_forward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(forward_composite));
  m.impl("max_pool2d_forward", c10::DispatchKey::Meta, TORCH_FN(forward_meta));
  m.impl("max_pool2d_backward", c10::DispatchKey::CPU, TORCH_FN(backward_cpu));
  m.impl("max_pool2d_backward", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(backward_composite));
  m.impl("max_pool2d_backward", c10::DispatchKey::Meta, TORCH_FN(backward_meta));
}

}  // namespace ops

at::Tensor max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  return ops::max_pool2d_op(input, kernel_size, stride, padding, dilation, ceil_mode);
}

}  // namespace remnant
