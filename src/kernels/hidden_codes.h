#pragma once

#include <cstdint>

// Codes of a feed-forward block's hidden layer, from which its backward has both the activation a(x) and its
// derivative a'(x), each without bias. Torch-free.

namespace remnant::kernels {

enum class HiddenActivation : uint8_t { relu, gelu };  // gelu: by the normal distribution's own function

/// Codes of gelu. As x runs, (a(x), a'(x)) draws a curve in the plane. It is cut into arcs without
/// inflection; an arc lies in the triangle of its two ends and the point where the tangents at these meet, so
/// that every point of it is a mean of the three corners with weights that are linear in (a, a'). The code is
/// one of the corners, drawn by these weights: E[decoded] = (a, a'), and one code serves both numbers. Beyond
/// `edge`, where a(x) is x and a'(x) is 1 up to 1e-5, codes are points on that line, ever further apart.
template <typename T>
struct HiddenGrid {
  static constexpr double edge = 5;
  static constexpr int64_t places = 1024, most_arcs = 152, most_far = 48;

  int64_t bits = 0;
  /// What a code stands for; the last one, 2^bits - 1, is NaN, which what exceeds the last point becomes.
  T value[256], slope[256];
  /// The arc of x: arc_of[(x + edge) places / (2 edge)], as numbers of T's size.
  int32_t arc_of[places];
  /// Weights of an arc's first and last corner: [0] a + [1] a' + [2].
  T first[3][most_arcs], last[3][most_arcs];
  /// Code of its first corner. The tangents' point and the last corner follow; beyond edge there is no
  /// point in between.
  T code[most_arcs];
  /// Points beyond edge, ascending, the first at edge itself; arc `far_arc` + i lies behind far[i].
  T far[most_far + 1];
  int64_t far_points = 0, far_arc = 0;
};

/// Bits that a hidden layer's code has at a setting's 8, 4 or 2: relu the same, gelu 8, 6, 4.
constexpr int64_t hidden_code_bits(HiddenActivation activation, int64_t bits) {
  return activation == HiddenActivation::relu || bits == 8 ? bits : bits + 2;
}

/// Built once a process for gelu at 8, 6 and 4 bits.
template <typename T>
const HiddenGrid<T>& hidden_grid(int64_t bits);

/// A row's layout: its codes' low 4 bits (8 and 2: all of them) in groups of 64 as LowBits has them, behind
/// the last group at 6 bits the codes' upper 2 bits in the same way, and for relu behind the codes a step a
/// group, bfloat16. relu: code 0 is what is not above 0, code c > 0 is (c - 1) steps; a group with NaN or Inf
/// has step NaN.
constexpr int64_t hidden_low_bytes(int64_t bits, int64_t columns) {
  return (columns * (bits == 6 ? 4 : bits) + 7) / 8;
}
constexpr int64_t hidden_row_bytes(HiddenActivation activation, int64_t bits, int64_t columns) {
  return hidden_low_bytes(bits, columns) + (bits == 6 ? (columns * 2 + 7) / 8 : 0) +
         (activation == HiddenActivation::relu ? (columns + 63) / 64 * 2 : 0);
}

}  // namespace remnant::kernels
