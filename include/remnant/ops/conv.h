#pragma once

#include <remnant/export.h>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <cstdint>
#include <optional>
#include <string>

namespace remnant {

/// torch.nn.functional.conv2d: input [N, C, H, W], weight [O, C / groups, kh, kw], bias [O] or absent, zero
/// padding; returns [N, O, H', W']. Weight's gradient is linear in the input; what is kept of it is the
/// policy's:
///
/// "exact": all of it, as torch does.
/// "quantized:bits=8", 4 or 2: linear_code_bytes(n, bits) for its n elements; weight's gradient is unbiased,
/// the
///   others are exact. Readers of one tensor share one copy of codes.
/// "invert": the output, and what it does not tell of the input: for a kernel above 1 x 1 the ring, the
/// outputs that
///   wider padding would give; the coordinates in which the convolution is singular or nearly so (singular
///   values below 0.05 of their root mean square; all that a convolution to fewer channels loses); 4 random
///   sums a sample. The backward rebuilds the input from these and checks it by the sums: gradients are exact
///   up to rounding times the inverse's amplification, or an error is thrown. Where rebuilding would keep
///   more than 0.75 of the input, where one sample rebuilt in the forward is off by more than 1e-3 (float64:
///   1e-7), and for depthwise convolutions and half types, the input is kept as under "exact";
///   conv2d_inversion and the memory report say so. A 1 x 1 convolution's weight gradient comes from the
///   output directly, without the input.
/// "min_norm": as "invert" without those coordinates and sums. BIASED: weight's gradient is
///   projected on the directions that the weight sees, which it then never leaves (docs/convolution.md).
///
/// The output must not be changed in place before backward under "invert" and "min_norm"; PyTorch's version
/// check says so. Under torch.compile both keep the input.
///
/// float32, float64, bfloat16 or float16; input, weight and bias of one dtype. Double backward raises an
/// error under all but "exact". Throws c10::Error.
REMNANT_API at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias = std::nullopt,
                              at::IntArrayRef stride = {1, 1}, at::IntArrayRef padding = {0, 0},
                              at::IntArrayRef dilation = {1, 1}, int64_t groups = 1,
                              c10::string_view policy = "exact",
                              const std::optional<at::Generator>& generator = std::nullopt);

/// What "invert" would do, for people: "invert: keeps 0.129 of the input, amplification 9.2", or "exact: "
/// and why. From weight's values and the input's size [H, W] alone; the forward may still keep the input when
/// its trial fails.
REMNANT_API std::string conv2d_inversion(const at::Tensor& weight, at::IntArrayRef input_size,
                                         at::IntArrayRef stride = {1, 1}, at::IntArrayRef padding = {0, 0},
                                         at::IntArrayRef dilation = {1, 1}, int64_t groups = 1);

/// What rebuilding did so far, in the whole process.
struct InversionCounters {
  int64_t rebuilt = 0;   ///< inputs rebuilt in a backward
  int64_t kept = 0;      ///< inputs kept instead, by decision of the forward
  int64_t failed = 0;    ///< rebuilt inputs that failed their check
  int64_t repeated = 0;  ///< layers whose forward ran again because of that
};
REMNANT_API InversionCounters inversion_counters();
REMNANT_API void reset_inversion_counters();

}  // namespace remnant
