#pragma once

#include <remnant/export.h>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <cstdint>
#include <optional>

namespace remnant {

/// input weight^T + bias. input [..., K], weight [N, K], bias [N] or absent; returns [..., N].
///
/// policy "exact": torch's linear, which keeps the input. "quantized:bits=8", 4 or 2: keeps the input in
/// that many bits by stochastic rounding instead, linear_code_bytes(n, bits) for its n elements, where
/// weight's gradient is wanted, and weight where input's is. grad_weight = grad^T decode(codes) is unbiased,
/// its noise reaches no other gradient; grad_input and grad_bias are exact. Groups of 64 elements
/// (consecutive in memory order) with NaN or Inf among them decode to NaN.
///
/// Readers of one tensor (q, k and v of one layer; a memory that every decoder layer reads) share one copy of
/// codes as long as one of them lives: same storage, place, version and bits. The first draws the seed.
/// torch.compile shares nothing.
///
/// float32, float64, bfloat16 or float16; weight and bias of one dtype, in which products are computed; under
/// "quantized" input may have another. Double backward raises an error under "quantized". Throws c10::Error.
REMNANT_API at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias = std::nullopt,
                              c10::string_view policy = "exact",
                              const std::optional<at::Generator>& generator = std::nullopt);

/// Bytes of `elements` numbers at 8, 4 or 2 bits: ceil(elements bits / 8) of codes and 4 for every 64 of
/// them, a minimum and a step in bfloat16. Throws c10::Error for other bits.
REMNANT_API int64_t linear_code_bytes(int64_t elements, int64_t bits);

}  // namespace remnant
