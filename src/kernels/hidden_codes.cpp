#include "kernels/hidden_codes.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

namespace remnant::kernels {

namespace {

// x Phi(x) and its derivatives.
struct Gelu {
  double value, slope, curvature, change;
  explicit Gelu(double x) {
    const double density = std::exp(-x * x / 2) / std::sqrt(8 * std::atan(1.0));
    const double cdf = 0.5 * std::erfc(-x / std::sqrt(2.0));
    value = x * cdf;
    slope = cdf + x * density;
    curvature = (2 - x * x) * density;
    change = (x * x * x - 4 * x) * density;
  }
  // Positive where the curve (value, slope) bends to the left.
  double bend() const { return slope * change - curvature * curvature; }
};

struct Point {
  double value, slope;
};

// Where the tangents of the curve at a and b meet.
Point meeting(const Gelu& a, const Gelu& b) {
  const double determinant = -a.slope * b.curvature + b.slope * a.curvature;
  const double right = b.value - a.value, up = b.slope - a.slope;
  const double along = (-right * b.curvature + b.slope * up) / determinant;
  return {a.value + along * a.slope, a.slope + along * a.curvature};
}

// Ends of arcs in units of places from -edge. Variance of a narrow arc goes with its length squared: the best
// density of ends is the third root of what a unit of length costs, here for x that is N(0, 1) with a floor;
// a' counts twice, and what turns the curve keeps a few wide arcs below half a turn.
std::vector<int64_t> place_ends(int64_t arcs) {
  constexpr int64_t places = HiddenGrid<double>::places;
  constexpr double edge = HiddenGrid<double>::edge, width = 2 * edge / places;
  double low = 1, high = 3;  // the one inflection
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (Gelu(middle).bend() < 0 ? low : high) = middle;
  }
  const auto inflection = std::lround((low + edge) / width);
  std::vector<double> cost(places + 1), turn(places + 1);
  for (int64_t i = 0; i < places; ++i) {
    const double x = -edge + (static_cast<double>(i) + 0.5) * width;
    const Gelu g(x);
    const double length = g.slope * g.slope + g.curvature * g.curvature;
    const double weighted = g.slope * g.slope + 4 * g.curvature * g.curvature;
    cost[i + 1] = cost[i] + std::cbrt((std::exp(-x * x / 2) + 0.003) * weighted + 1e-5);
    turn[i + 1] = turn[i] + std::abs(g.bend()) / length * width;
  }
  const auto number = static_cast<double>(arcs);
  std::vector<double> measure(places + 1);
  for (int64_t i = 0; i <= places; ++i) {
    measure[i] = number * cost[i] / cost[places] + 5 / number * turn[i];
  }
  const double before = measure[inflection], all = measure[places];
  const int64_t early = std::clamp<int64_t>(std::lround(number * before / all), 1, arcs - 1);
  std::vector<int64_t> ends{0};
  const auto split = [&](double from, double to, int64_t count, int64_t last) {
    for (int64_t i = 1; i < count; ++i) {
      const double wanted = from + (to - from) * static_cast<double>(i) / static_cast<double>(count);
      const auto at = std::lower_bound(measure.begin(), measure.end(), wanted) - measure.begin();
      ends.push_back(std::clamp<int64_t>(at, ends.back() + 1, last - (count - i)));
    }
    ends.push_back(last);
  };
  split(0, before, early, inflection);
  split(before, all, arcs - early, places);
  return ends;
}

// Multiples of edge, close where values are likely; the last is beyond float16's range.
std::vector<double> far_multiples(int64_t bits) {
  if (bits == 4) return {2, 8, 64, 16384};
  if (bits == 6) return {1.25, 1.6, 2.2, 3.2, 6.4, 25, 200, 16384};
  std::vector<double> multiples;
  for (double m = 1.125; m < 16384; m *= m < 16 ? 1.125 : (m < 256 ? 1.5 : 4)) multiples.push_back(m);
  multiples.push_back(16384);
  return multiples;
}

template <typename T>
HiddenGrid<T> build(int64_t bits) {
  using Grid = HiddenGrid<T>;
  constexpr double edge = Grid::edge, width = 2 * edge / static_cast<double>(Grid::places);
  HiddenGrid<T> grid{};
  grid.bits = bits;
  const std::vector<double> far = far_multiples(bits);
  const auto far_points = static_cast<int64_t>(far.size());
  // Of 2 arcs + 1 points on and beside the curve, those far away, and NaN.
  const int64_t arcs = ((int64_t{1} << bits) - 2 - far_points) / 2;
  const std::vector<int64_t> ends = place_ends(arcs);
  std::fill(std::begin(grid.value), std::end(grid.value), std::numeric_limits<T>::quiet_NaN());
  std::fill(std::begin(grid.slope), std::end(grid.slope), std::numeric_limits<T>::quiet_NaN());
  const auto set = [&](int64_t code, Point p) {
    grid.value[code] = static_cast<T>(p.value);
    grid.slope[code] = static_cast<T>(p.slope);
  };
  // Far left the curve ends in (0, 0).
  const auto end_of = [&](int64_t i) -> Point {
    if (i == 0) return {0, 0};
    const Gelu g(-edge + static_cast<double>(ends[i]) * width);
    return {g.value, g.slope};
  };
  // The corner's weight is 0 on the line through the other two and 1 in itself.
  const auto weight = [](T(&out)[3][Grid::most_arcs], int64_t arc, Point corner, Point a, Point b) {
    const double right = b.value - a.value, up = b.slope - a.slope;
    const double scale = 1 / (up * (corner.value - a.value) - right * (corner.slope - a.slope));
    out[0][arc] = static_cast<T>(up * scale);
    out[1][arc] = static_cast<T>(-right * scale);
    out[2][arc] = static_cast<T>((right * a.slope - up * a.value) * scale);
  };
  // The share of the way from a to b, and what is left of it.
  const auto line = [&](int64_t arc, Point a, Point b) {
    const double right = b.value - a.value, up = b.slope - a.slope, square = right * right + up * up;
    grid.last[0][arc] = static_cast<T>(right / square);
    grid.last[1][arc] = static_cast<T>(up / square);
    grid.last[2][arc] = static_cast<T>(-(right * a.value + up * a.slope) / square);
    grid.first[0][arc] = -grid.last[0][arc];
    grid.first[1][arc] = -grid.last[1][arc];
    grid.first[2][arc] = static_cast<T>(1 + (right * a.value + up * a.slope) / square);
  };
  for (int64_t arc = 0; arc < arcs; ++arc) {
    const Gelu from(-edge + static_cast<double>(ends[arc]) * width);
    const Gelu to(-edge + static_cast<double>(ends[arc + 1]) * width);
    const Point a = end_of(arc), b = end_of(arc + 1), corner = meeting(from, to);
    const double right = b.value - a.value, up = b.slope - a.slope;
    const double height =
        std::abs(up * (corner.value - a.value) - right * (corner.slope - a.slope)) / std::hypot(right, up);
    set(2 * arc, a);
    set(2 * arc + 1, corner);
    grid.code[arc] = static_cast<T>(2 * arc);
    // So flat that rounding would decide between the corners.
    if (height < 1e-4) {
      line(arc, a, b);
    } else {
      weight(grid.first, arc, a, corner, b);
      weight(grid.last, arc, b, a, corner);
    }
    for (int64_t i = ends[arc]; i < ends[arc + 1]; ++i) grid.arc_of[i] = static_cast<int32_t>(arc);
  }
  set(2 * arcs, end_of(arcs));
  grid.far_arc = arcs;
  grid.far_points = far_points;
  grid.far[0] = static_cast<T>(edge);
  for (int64_t i = 0; i < far_points; ++i) {
    const double from = grid.far[i], to = edge * far[i];
    grid.far[i + 1] = static_cast<T>(to);
    set(2 * arcs + 1 + i, {to, 1});
    grid.code[arcs + i] = static_cast<T>(2 * arcs + i);
    line(arcs + i, {from, 1}, {to, 1});
  }
  return grid;
}

}  // namespace

template <typename T>
const HiddenGrid<T>& hidden_grid(int64_t bits) {
  static const std::array<HiddenGrid<T>, 3> grids{build<T>(4), build<T>(6), build<T>(8)};
  return grids[static_cast<size_t>(bits / 2 - 2)];
}
template const HiddenGrid<float>& hidden_grid(int64_t);
template const HiddenGrid<double>& hidden_grid(int64_t);

}  // namespace remnant::kernels
