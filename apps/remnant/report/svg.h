#pragma once

#include "report/run.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace remnant::app::report {

/// Text for HTML and SVG, in elements and in quoted attributes.
std::string escape(std::string_view text);

/// Round numbers, one or two or five times a power of ten apart, inside of [low, high]; about `count`.
std::vector<double> round_ticks(double low, double high, int count);

/// One, two and five times the powers of ten inside of [low, high], low above 0.
std::vector<double> logarithmic_ticks(double low, double high);

/// A number as short as `digits` significant digits allow.
std::string short_number(double value, int digits);

/// A stretch of a curve: its mean place, and how far it goes up and down.
struct Stretch {
  double x = 0, mean = 0, low = 0, high = 0;
};
/// That many of a curve are drawn.
inline constexpr size_t kMostStretches = 220;
/// At most `most` stretches of as many points each (the last may have fewer).
std::vector<Stretch> stretches(const std::vector<std::pair<double, double>>& points, size_t most);

using Format = std::function<std::string(double)>;

/// A figure's title and description, for those who do not see it.
struct Words {
  std::string id, title, description;
};

struct Curve {
  size_t run = 0;  ///< its place in the report: decides colour and marks
  std::string name;
  std::vector<std::pair<double, double>> points;
};
/// Whether the values are all above 0 and too far apart for a linear axis.
bool far_apart(const std::vector<Curve>& curves);
/// Values by step. Points of short curves are marked; of long ones the means of stretches are drawn, over the
/// range of each.
std::string line_chart(const Words& words, const std::vector<Curve>& curves, bool logarithmic);

/// One bar: parts behind one another, each with the class that colours it.
struct Bar {
  struct Part {
    std::string style;
    double value;
  };
  std::vector<Part> parts;
  std::string name, text;
  std::string attributes;  ///< of its group
};
struct BarGroup {
  std::string label;
  std::vector<Bar> bars;
};
/// Horizontal bars below their group's label.
std::string bar_chart(const Words& words, const std::vector<BarGroup>& groups);

/// Live bytes over a step, with its phases and its peak; the axes reach `seconds` and `bytes`, so that charts
/// of several runs can be compared.
std::string timeline_chart(const Words& words, const Timeline& timeline, size_t run, double seconds,
                           double bytes);
/// The first sample of the highest.
std::pair<double, int64_t> peak_of(const Timeline& timeline);
/// The name of the phase at `seconds`, or "".
std::string phase_at(const Timeline& timeline, double seconds);

/// A time of a step: "5.92 ms", "1.24 s".
std::string format_step_time(double seconds);

}  // namespace remnant::app::report
