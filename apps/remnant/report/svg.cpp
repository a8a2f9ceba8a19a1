#include "report/svg.h"

#include "common/run_folder.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <tuple>

namespace remnant::app::report {
namespace {

// Wide enough for two columns on a desk, and readable when a phone shrinks it.
constexpr double kWidth = 440;
constexpr size_t kMostMarks = 40;
constexpr double kMost = std::numeric_limits<double>::max();

std::string px(double value) {
  std::string text = format_fixed(value, 1);
  if (text.ends_with(".0")) text.resize(text.size() - 2);
  return text == "-0" ? "0" : text;
}

std::string text_at(double x, double y, const std::string& style, const std::string& text) {
  return "<text x=\"" + px(x) + "\" y=\"" + px(y) + "\"" + (style.empty() ? "" : " class=\"" + style + "\"") +
         ">" + escape(text) + "</text>";
}

std::string open_svg(const Words& words, double height) {
  const std::string id = escape(words.id);
  return "<svg viewBox=\"0 0 " + px(kWidth) + " " + px(height) + "\" role=\"img\" aria-labelledby=\"" + id +
         "-t " + id + "-d\"><title id=\"" + id + "-t\">" + escape(words.title) + "</title><desc id=\"" + id +
         "-d\">" + escape(words.description) + "</desc>\n";
}

/// From numbers to places in the frame of a chart with axes.
struct Frame {
  double left = 56, right = kWidth - 14, top = 14, bottom = 210;
  double x_low = 0, x_high = 1, y_low = 0, y_high = 1;
  bool y_logarithmic = false;

  double x(double value) const { return left + (value - x_low) / (x_high - x_low) * (right - left); }
  double y(double value) const {
    const double share = y_logarithmic
                             ? (std::log(value) - std::log(y_low)) / (std::log(y_high) - std::log(y_low))
                             : (value - y_low) / (y_high - y_low);
    return bottom - share * (bottom - top);
  }

  std::string axes(const Format& x_text, const Format& y_text, const std::string& x_title) const {
    std::string svg = "<g class=\"axes\">";
    for (const double tick :
         y_logarithmic ? logarithmic_ticks(y_low, y_high) : round_ticks(y_low, y_high, 5)) {
      svg += "<path d=\"M" + px(left) + " " + px(y(tick)) + "H" + px(right) + "\"/>";
      svg += text_at(left - 6, y(tick) + 4, "end", y_text(tick));
    }
    for (const double tick : round_ticks(x_low, x_high, 5)) {
      const double place = x(tick);
      svg += "<path d=\"M" + px(place) + " " + px(bottom) + "v5\"/>";
      svg += text_at(place, bottom + 18, place > right - 12 ? "end" : "middle", x_text(tick));
    }
    svg += "<path d=\"M" + px(left) + " " + px(bottom) + "H" + px(right) + "\"/>";
    svg += text_at((left + right) / 2, bottom + 34, "middle", x_title);
    return svg + "</g>\n";
  }
};

/// Apart, also where all values are the same or differ in their last digits.
std::pair<double, double> range(double low, double high) {
  if (low > high) return {0, 1};
  double margin = std::max((high - low) * 0.05, std::max(std::abs(low), std::abs(high)) * 1e-12);
  if (low == high) margin = std::max(std::abs(high) * 0.1, 1e-9);
  return {low >= 0 ? std::max(0.0, low - margin) : low - margin, high + margin};
}

/// A mark around (x, y) whose shape tells runs apart without colours.
std::string mark(size_t run, double x, double y) {
  switch (run % 4) {
    case 0:
      return "<circle cx=\"" + px(x) + "\" cy=\"" + px(y) + "\" r=\"3.4\">";
    case 1:
      return "<rect x=\"" + px(x - 3) + "\" y=\"" + px(y - 3) + "\" width=\"6\" height=\"6\">";
    case 2:
      return "<path d=\"M" + px(x) + " " + px(y - 4) + "l4 7h-8z\">";
    default:
      return "<path d=\"M" + px(x) + " " + px(y - 4.4) + "l4.4 4.4l-4.4 4.4l-4.4-4.4z\">";
  }
}

const char* mark_end(size_t run) { return run % 4 == 0 ? "</circle>" : run % 4 == 1 ? "</rect>" : "</path>"; }

std::string run_class(size_t run) {
  constexpr size_t colours = 7;
  return "c" + std::to_string(run % colours) + (run / colours % 2 == 1 ? " dashed" : "");
}

std::string curve_svg(const Curve& curve, const Frame& frame) {
  const std::vector<Stretch> parts = stretches(curve.points, kMostStretches);
  std::string line, up, down, marks;
  bool band = false;
  for (const Stretch& part : parts) {
    const std::string x = px(frame.x(part.x));
    line += (line.empty() ? "M" : "L") + x + " " + px(frame.y(part.mean));
    up += (up.empty() ? "M" : "L") + x + " " + px(frame.y(part.high));
    down.insert(0, "L" + x + " " + px(frame.y(part.low)));
    band = band || part.high > part.low;
  }
  std::string svg =
      "<g class=\"" + run_class(curve.run) + "\" data-run=\"" + std::to_string(curve.run) + "\">";
  if (band) svg += "<path class=\"band\" d=\"" + up + down + "z\"/>";
  svg += "<path class=\"line\" d=\"" + line + "\"/>";
  if (curve.points.size() <= kMostMarks) {
    for (const auto& [x, y] : curve.points) {
      svg += mark(curve.run, frame.x(x), frame.y(y)) + "<title>" +
             escape(curve.name + ", step " + short_number(x, 12) + ": " + short_number(y, 5)) + "</title>" +
             mark_end(curve.run);
    }
  }
  return svg + "</g>\n";
}

}  // namespace

std::string escape(std::string_view text) {
  std::string escaped;
  escaped.reserve(text.size());
  for (const char c : text) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      case '\'':
        escaped += "&#39;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

std::vector<double> round_ticks(double low, double high, int count) {
  if (!(high > low) || count < 1) return {low};
  const double rough = (high - low) / count;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double factor : {5.0, 2.0, 1.0}) {
    if (factor * power >= rough * 0.999) step = factor * power;
  }
  std::vector<double> ticks;
  const double first = std::ceil(low / step - 1e-9), last = std::floor(high / step + 1e-9);
  // Never more, also where low and high are one number to `step`.
  const double most = std::min(last - first, count + 1.0);
  for (double i = 0; i <= most; ++i) ticks.push_back((first + i) * step + 0.0);  // not -0
  return ticks;
}

std::vector<double> logarithmic_ticks(double low, double high) {
  std::vector<double> ticks;
  const double last = std::min(std::log10(high), 308.0);  // of what a double holds
  for (double power = std::floor(std::log10(low)); power <= last; ++power) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double tick = factor * std::pow(10, power);
      if (tick >= low && tick <= high) ticks.push_back(tick);
    }
  }
  return ticks;
}

std::string short_number(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*g", digits, value);
  return text;
}

std::vector<Stretch> stretches(const std::vector<std::pair<double, double>>& points, size_t most) {
  const size_t length = points.empty() ? 1 : (points.size() + most - 1) / most;
  std::vector<Stretch> parts;
  for (size_t begin = 0; begin < points.size(); begin += length) {
    const size_t end = std::min(begin + length, points.size());
    Stretch part{0, 0, points[begin].second, points[begin].second};
    for (size_t i = begin; i < end; ++i) {
      part.x += points[i].first;
      part.mean += points[i].second;
      part.low = std::min(part.low, points[i].second);
      part.high = std::max(part.high, points[i].second);
    }
    part.x /= static_cast<double>(end - begin);
    part.mean /= static_cast<double>(end - begin);
    parts.push_back(part);
  }
  return parts;
}

namespace {

struct Bounds {
  double x_low = INFINITY, x_high = -INFINITY, y_low = INFINITY, y_high = -INFINITY;
};

Bounds bounds_of(const std::vector<Curve>& curves) {
  Bounds bounds;
  for (const Curve& curve : curves) {
    for (const auto& [x, y] : curve.points) {
      bounds.x_low = std::min(bounds.x_low, x);
      bounds.x_high = std::max(bounds.x_high, x);
      bounds.y_low = std::min(bounds.y_low, y);
      bounds.y_high = std::max(bounds.y_high, y);
    }
  }
  return bounds;
}

}  // namespace

bool far_apart(const std::vector<Curve>& curves) {
  const Bounds bounds = bounds_of(curves);
  return bounds.y_low > 0 && bounds.y_high > 20 * bounds.y_low;
}

std::string line_chart(const Words& words, const std::vector<Curve>& curves, bool logarithmic) {
  const Bounds bounds = bounds_of(curves);
  Frame frame;
  frame.y_logarithmic = logarithmic;
  std::tie(frame.y_low, frame.y_high) =
      frame.y_logarithmic ? std::pair(bounds.y_low / 1.2, std::min(bounds.y_high * 1.2, kMost))
                          : range(bounds.y_low, bounds.y_high);
  std::tie(frame.x_low, frame.x_high) = range(bounds.x_low, bounds.x_high);
  if (bounds.x_low < bounds.x_high) frame.x_low = 0;
  std::string svg = open_svg(words, frame.bottom + 40);
  svg += frame.axes([](double value) { return short_number(value, 6); },
                    [](double value) { return short_number(value, 4); }, "step");
  for (const Curve& curve : curves) {
    if (!curve.points.empty()) svg += curve_svg(curve, frame);
  }
  return svg + "</svg>";
}

std::string bar_chart(const Words& words, const std::vector<BarGroup>& groups) {
  constexpr double thick = 11, gap = 3, label = 17, between = 8, text_space = 84;
  double most = 0, height = 4;
  for (const BarGroup& group : groups) {
    height += label + static_cast<double>(group.bars.size()) * (thick + gap) + between;
    for (const Bar& bar : group.bars) {
      double sum = 0;
      for (const Bar::Part& part : bar.parts) sum += part.value;
      most = std::max(most, sum);
    }
  }
  const double scale = most > 0 ? (kWidth - text_space) / most : 0;
  std::string svg = open_svg(words, height);
  double y = 4;
  for (const BarGroup& group : groups) {
    svg += text_at(0, y + 12, "", group.label) + "\n";
    y += label;
    for (const Bar& bar : group.bars) {
      svg += "<g" + bar.attributes + "><title>" +
             escape(group.label + (bar.name.empty() ? "" : ", " + bar.name) + ": " + bar.text) + "</title>";
      double x = 0;
      for (const Bar::Part& part : bar.parts) {
        // At least a hair: what is there shows.
        const double width = part.value > 0 ? std::max(part.value * scale, 0.6) : 0;
        svg += "<rect class=\"" + part.style + "\" x=\"" + px(x) + "\" y=\"" + px(y) + "\" width=\"" +
               px(width) + "\" height=\"" + px(thick) + "\"/>";
        x += width;
      }
      svg += text_at(x + 4, y + thick - 1.5, "small", bar.text) + "</g>\n";
      y += thick + gap;
    }
    y += between;
  }
  return svg + "</svg>";
}

std::pair<double, int64_t> peak_of(const Timeline& timeline) {
  return *std::max_element(timeline.samples.begin(), timeline.samples.end(),
                           [](const auto& a, const auto& b) { return a.second < b.second; });
}

std::string phase_at(const Timeline& timeline, double seconds) {
  for (const Timeline::Phase& phase : timeline.phases) {
    if (seconds >= phase.begin && seconds <= phase.end) return phase.name;
  }
  return "";
}

std::string format_step_time(double seconds) {
  const auto significant = [](double value) {
    return format_fixed(value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
  };
  return seconds < 0.9995 ? significant(seconds * 1e3) + " ms" : significant(seconds) + " s";
}

std::string timeline_chart(const Words& words, const Timeline& timeline, size_t run, double seconds,
                           double bytes) {
  Frame frame;
  frame.top = 20;
  frame.bottom = 216;
  frame.x_high = seconds > 0 ? seconds : 1;
  const auto lowest = std::min_element(timeline.samples.begin(), timeline.samples.end(),
                                       [](const auto& a, const auto& b) { return a.second < b.second; });
  frame.y_low = std::min<double>(0, static_cast<double>(lowest->second));
  frame.y_high = bytes > 0 ? bytes * 1.12 : 1;
  std::string svg = open_svg(words, frame.bottom + 40);
  // Colours and not words, for which a phase may be too short.
  for (const Timeline::Phase& phase : timeline.phases) {
    const double left = frame.x(phase.begin), width = std::max(frame.x(phase.end) - left, 0.5);
    const auto rectangle = [&](const std::string& style, double top, double bottom) {
      return "<rect class=\"" + style + "\" x=\"" + px(left) + "\" y=\"" + px(top) + "\" width=\"" +
             px(width) + "\" height=\"" + px(bottom - top) + "\"/>";
    };
    svg += "<g><title>" + escape(phase.name + ": " + format_step_time(phase.end - phase.begin)) + "</title>" +
           rectangle(escape(phase.name), 6, 14);
    if (phase.name == "backward") svg += rectangle("shade", frame.top, frame.bottom);
    svg += "</g>\n";
  }
  const bool in_ms = frame.x_high < 0.9995;
  svg += frame.axes([&](double value) { return short_number(in_ms ? value * 1e3 : value, 4); },
                    [](double value) {
                      std::string text = format_bytes(std::llround(value));
                      if (const size_t zero = text.find(".0 "); zero != std::string::npos)
                        text.erase(zero, 2);
                      return text;
                    },
                    in_ms ? "milliseconds" : "seconds");
  std::string path;
  for (const auto& [time, live] : timeline.samples) {
    const std::string x = px(frame.x(time)), y = px(frame.y(static_cast<double>(live)));
    path += path.empty() ? "M" + x + " " + y : "H" + x + "V" + y;
  }
  const std::string end = px(frame.x(timeline.seconds));
  path += "H" + end;
  svg += "<g class=\"" + run_class(run) + "\"><path class=\"band\" d=\"" + path + "V" + px(frame.y(0)) + "H" +
         px(frame.x(timeline.samples.front().first)) + "z\"/><path class=\"line thin\" d=\"" + path + "\"/>";
  const auto [peak_time, peak] = peak_of(timeline);
  const double x = frame.x(peak_time), y = frame.y(static_cast<double>(peak));
  const bool to_the_left = x > (frame.left + frame.right) / 2;
  svg += "<circle cx=\"" + px(x) + "\" cy=\"" + px(y) + "\" r=\"4\"/></g>";
  svg += text_at(x + (to_the_left ? -8 : 8), y - 6, to_the_left ? "end strong" : "strong",
                 "peak " + format_bytes(peak));
  return svg + "</svg>";
}

}  // namespace remnant::app::report
