#pragma once

// Kernels of convolutions as small linear systems, one a frequency: the transform to frequencies and back, as
// products with small matrices, and the systems' inverses.

#include <cstdint>

namespace remnant::kernels {

/// Real samples [samples, height, width, groups channels] and their spectrum, in the order of the systems:
/// [half grid_width, groups][samples][(re, im), channels]. Matrices as GridTransform describes them, with
/// (re, im) outside of the position or frequency.
template <typename T>
struct Spectrum {
  int64_t samples = 0, height = 0, width = 0, groups = 1, channels = 0;
  int64_t grid_height = 0, grid_width = 0;
  const T* rows = nullptr;     // forward [2 half, grid_height]; inverse [grid_height, 2 half]
  const T* columns = nullptr;  // forward [2 grid_width, 2 grid_width], columns (re or im, position);
                               // inverse [2 grid_width, 2 grid_width], rows (re or im, position) and columns
                               // (re or im, frequency)
  const T* x = nullptr;        // forward
  T* spectrum = nullptr;       // written by the forward
  const T* z = nullptr;        // inverse: a spectrum
  T* out = nullptr;            // the inverse's samples
  int64_t half() const { return grid_height / 2 + 1; }
  /// Numbers of a row of the scratch: its own length does not put every row into the same set of the cache.
  int64_t scratch_row() const { return width * groups * channels + 16; }
  int64_t scratch_floats() const { return 2 * half() * scratch_row(); }
};

/// z [systems][rows][columns] = y [systems][rows][depth] times blocks [systems][depth][columns].
template <typename T>
struct SystemProducts {
  int64_t rows = 0, depth = 0, columns = 0;
  const T *y = nullptr, *blocks = nullptr;
  T* z = nullptr;
};

/// Inverses of complex n x n matrices, each lane of a vector a matrix of its own. A singular matrix, or one
/// with NaN or Inf, gets an inverse that is not finite, and its neighbours their own.
template <typename T>
struct SystemInverses {
  int64_t n = 0;
  const T* a = nullptr;  // [systems][n][n][2]
  T* inverse = nullptr;  // the same; null: not wanted
  // For a row (re, im) times it, [systems][2 n][2 n]: the inverse's transpose M as [re M, im M; -im M, re M];
  // null: not wanted.
  T* blocks = nullptr;
  /// Numbers of scratch that a range needs, on a machine with vectors of at most 64 bytes.
  int64_t scratch_floats() const { return 2 * n * n * (2 * most_lanes()) + 4 * n * most_lanes(); }
  static constexpr int64_t most_lanes() { return 64 / static_cast<int64_t>(sizeof(T)); }
};

}  // namespace remnant::kernels
