#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

/// Low-bit storage of any floating tensor: groups of 64 elements in memory order, the last of any size, at 8,
/// 4 or 2 bits by stochastic rounding. kernels::LowBits has the layout.
namespace remnant::ops {

struct Codes {
  at::Tensor codes;  ///< uint8 [ceil(n bits / 8)]
  at::Tensor table;  ///< bfloat16 [ceil(n / 64), 2]: a group's minimum and step
};

/// E[decode(encode(x))] = x, up to 2^-17 of a step. Draws a seed from the generator.
Codes encode(const at::Tensor& x, int64_t bits, const std::optional<at::Generator>& generator);
/// The same, or the codes that a living reader of x has already: x's storage, place, version and bits. Draws
/// a seed in either case.
Codes shared_codes(const at::Tensor& x, int64_t bits, const std::optional<at::Generator>& generator);
/// Draws the seeds of `count` tensors that are not encoded. Random state then moves alike whether an op keeps
/// codes or not, and a checkpoint's second run drops what its first did.
void skip_seeds(const at::Tensor& like, int64_t count, const std::optional<at::Generator>& generator);
/// Elements [first, first + out.numel()) of a tensor of `size` into `out`, contiguous; `first` a multiple of
/// 64.
void decode_into(const Codes& kept, int64_t bits, int64_t size, int64_t first, at::Tensor& out);

/// Codes, int64 [groups, size of a group], to bytes as kernels::LowBits lays them out and back.
at::Tensor pack_groups(const at::Tensor& codes, int64_t bits);
at::Tensor unpack_groups(const at::Tensor& bytes, int64_t groups, int64_t size, int64_t bits);
/// The nearest bfloat16 that is no less (up) or no greater. Finite numbers, and NaN.
at::Tensor narrow_to_bfloat16(const at::Tensor& x, bool up);

/// The whole of it.
at::Tensor decode(const Codes& kept, int64_t bits, c10::SymIntArrayRef shape, at::ScalarType dtype);

}  // namespace remnant::ops
