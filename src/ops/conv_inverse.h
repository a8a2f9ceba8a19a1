#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

/// What a convolution's input can be rebuilt from. With every output that zero padding could give ("full"), a
/// stride-1 convolution is circular on a grid of input + kernel - 1 positions: one small linear system for
/// each frequency. docs/convolution.md has the mathematics.
namespace remnant::ops {

using Pair = std::array<int64_t, 2>;

/// A convolution as a full one of stride 1 of which y is a window. A stride makes channels of the input's
/// phases, a dilation a kernel with zeros in it.
struct FullConvolution {
  FullConvolution(at::IntArrayRef input, at::IntArrayRef weight, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

  Pair stride, padding, dilation;
  int64_t groups;
  int64_t in_channels, out_channels;  ///< of a group, as the caller has them
  Pair given_kernel, size;            ///< as the caller has them: kernel, input positions
  Pair phases;                        ///< input positions of the full convolution
  Pair kernel;                        ///< its kernel
  Pair full;                          ///< phases + kernel - 1
  Pair first, last;                   ///< the window: positions [first, last) of the full output
  Pair skipped;                       ///< y's positions before the window: bias alone

  int64_t unknowns() const { return in_channels * stride[0] * stride[1]; }  ///< of a group and position
  int64_t ring_positions() const { return full[0] * full[1] - (last[0] - first[0]) * (last[1] - first[1]); }
  /// The input as [N, channels of phases, positions]; itself at stride 1.
  at::Tensor unfold(const at::Tensor& input) const;
  /// unfold's inverse, from [N, positions, channels] (channels last).
  at::Tensor fold(const at::Tensor& unfolded) const;
  /// The weight that belongs to unfold(input): [out, unknowns, kernel].
  at::Tensor unfold_weight(const at::Tensor& weight) const;
  /// The outputs outside of the window, without bias: [N, ring positions, out channels].
  at::Tensor ring(const at::Tensor& unfolded, const at::Tensor& unfolded_weight) const;
  /// The window of y without bias, and its ring, on the grid: [N, full, out channels].
  at::Tensor join(const at::Tensor& y, const at::Tensor& ring) const;
  /// The part of y that is the window.
  at::Tensor window(const at::Tensor& y) const;
};

/// The discrete Fourier transform of real [n, rows, columns, groups C] on a grid, as products with small
/// matrices, which leave each system's channels side by side: [(rows / 2 + 1) columns groups, n, (re, im) C],
/// rows and columns the grid's. Rounds like an FFT at these sizes, and needs no transposed copies.
class GridTransform {
 public:
  GridTransform(Pair grid, const at::TensorOptions& options);
  at::Tensor forward(const at::Tensor& x, int64_t groups) const;
  /// The first rows and columns of the grid: [n, rows, columns, groups C].
  at::Tensor inverse(const at::Tensor& z, int64_t groups, Pair size) const;
  int64_t frequencies() const { return half_ * grid_[1]; }
  int64_t half() const { return half_; }
  const Pair& grid() const { return grid_; }

 private:
  Pair grid_;
  int64_t half_;
  at::Tensor rows_, columns_, columns_back_, rows_back_;  // as kernels::Spectrum has them
};

/// The inverse of a full convolution's system at each frequency. Directions whose singular value is below tau
/// times the root mean square of all of them (of a wide system also those that no output sees) are not
/// inverted: their coordinates have to come from the input. tau = 0: none, for square and tall systems.
class FrequencyInverse {
 public:
  FrequencyInverse(const FullConvolution& shape, const GridTransform& transform,
                   const at::Tensor& unfolded_weight, double tau, bool keep_basis);
  /// Root mean square of the inverse's gain over white noise, relative to the convolution's own on white
  /// input; 0 where tau is.
  double amplification() const { return amplification_; }
  int64_t coordinates() const { return basis_.defined() ? basis_.size(0) : 0; }  ///< complex, a sample
  /// Of [n, positions, channels], zero outside of the positions: [n, coordinates(), 2].
  at::Tensor coordinates_of(const at::Tensor& unfolded) const;
  /// [n, positions, channels], from joined outputs [n, full, out channels] and kept coordinates (or
  /// undefined).
  at::Tensor solve(const at::Tensor& joined, const at::Tensor& kept) const;

 private:
  const FullConvolution& shape_;
  const GridTransform& transform_;
  at::Tensor blocks_;         // [frequencies groups, 2 out, 2 unknowns], real, for rows (re, im) times it
  at::Tensor basis_, place_;  // [K, unknowns] complex, conjugated directions; [K] frequency groups + group
  double amplification_ = 0;
};

/// Random signs, the same at each call: [elements, 4].
at::Tensor probe_signs(int64_t elements, const at::TensorOptions& options);
/// Relative error of what was rebuilt, from its products with probe_signs and those that were kept. 0 where
/// neither says anything; NaN where what was kept is finite and what was rebuilt is not.
double probe_error(const at::Tensor& rebuilt, const at::Tensor& kept);
/// The largest error that a rebuilt input may have.
double largest_error(at::ScalarType type);
/// Samples whose spectra make a few MB.
int64_t samples_at_once(int64_t elements_a_sample);

/// remnant::InversionCounters' fields, for the whole process.
enum class Inversion { rebuilt, kept, failed, repeated };
void count(Inversion what, int64_t by = 1);
int64_t counted(Inversion what);
void reset_counters();

}  // namespace remnant::ops
