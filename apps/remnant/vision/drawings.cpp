#include "vision/drawings.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <random>

namespace remnant::app::vision {
namespace {

using Colour = std::array<double, 3>;

constexpr double kPi = 3.14159265358979323846;
constexpr size_t kDisc = 0, kRing = 1, kSquare = 2, kTriangle = 3, kCross = 4, kStar = 5, kStripes = 6,
                 kChecks = 7, kDots = 8, kWaves = 9, kClasses = 10;

double distance(const Colour& a, const Colour& b) {
  return std::hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2]);
}

/// Whether (u, v) is inside a five-pointed star whose points are at a distance of 1.
bool in_star(double u, double v) {
  constexpr double sector = kPi / 5, inner = 0.42;
  double angle = std::fmod(std::atan2(v, u) + 2 * kPi, 2 * sector);
  if (angle > sector) angle = 2 * sector - angle;
  const double radius = std::hypot(u, v), x = radius * std::cos(angle), y = radius * std::sin(angle);
  const double corner_x = inner * std::cos(sector), corner_y = inner * std::sin(sector);
  // On the centre's side of the edge from the point (1, 0) to the corner.
  return (corner_x - 1) * y - corner_y * (x - 1) > 0;
}

/// Whether (u, v) is inside a shape that a circle of radius 1 holds.
bool in_shape(size_t shape, double u, double v) {
  const double high = std::max(std::abs(u), std::abs(v)), low = std::min(std::abs(u), std::abs(v));
  const double square = u * u + v * v;
  switch (shape) {
    case kRing:
      return square < 1 && square > 0.36;
    case kSquare:
      return high < 0.78;
    case kTriangle:
      return v > -0.5 && std::sqrt(3.0) * std::abs(u) + v < 1;
    case kCross:
      return high < 1 && low < 0.3;
    case kStar:
      return in_star(u, v);
    default:
      return square < 1;
  }
}

/// Which of a texture's two colours is at (x, y), for a period of 1.
bool first_colour(size_t texture, double x, double y) {
  const double in_x = x - std::floor(x), in_y = y - std::floor(y);
  switch (texture) {
    case kStripes:
      return in_x < 0.5;
    case kChecks:
      return (in_x < 0.5) == (in_y < 0.5);
    case kDots:
      return std::hypot(in_x - 0.5, in_y - 0.5) < 0.33;
    default: {
      const double radius = std::hypot(x, y);
      return radius - std::floor(radius) < 0.5;
    }
  }
}

/// One image's random choices.
class Painter {
 public:
  explicit Painter(std::mt19937_64& random) : random_(random) {}

  void paint(size_t label, uint8_t* image) {
    const Colour ground = colour();
    const Colour front = far_from(ground), second = far_from(front);
    const Colour tilt_x = shade(), tilt_y = shade();
    for (size_t c = 0; c < 3; ++c) {
      for (int64_t y = 0; y < kSide; ++y) {
        for (int64_t x = 0; x < kSide; ++x) {
          canvas_[c][y][x] = ground[c] + tilt_x[c] * (static_cast<double>(x) / kSide - 0.5) +
                             tilt_y[c] * (static_cast<double>(y) / kSide - 0.5);
        }
      }
    }
    clutter(1 + below(4));
    const bool texture = label >= kStripes;
    Figure figure;
    figure.shape = texture ? below(kStripes) : label;
    // A texture's patch has any shape, but no hole or thin arm that would hide it.
    if (texture && (figure.shape == kRing || figure.shape >= kCross)) figure.shape = kSquare;
    figure.radius = texture ? between(9, 14) : between(7, 12);
    figure.x = between(11, kSide - 11);
    figure.y = between(11, kSide - 11);
    figure.angle = between(0, 2 * kPi);
    const double period = between(4, 7), phase = between(0, 1);
    const bool swap = below(2) == 1;
    draw(figure, [&](double u, double v) -> const Colour& {
      if (!texture) return front;
      const double scale = figure.radius / period;
      return first_colour(label, u * scale + phase, v * scale + phase) == swap ? second : front;
    });
    clutter(below(3));
    finish(image);
  }

 private:
  struct Figure {
    size_t shape = kDisc;
    double x = 0, y = 0, radius = 1, angle = 0;
  };

  // The standard library's distributions may differ from one to the next.
  double unit() { return static_cast<double>(random_() >> 11) * 0x1p-53; }
  double between(double low, double high) { return low + (high - low) * unit(); }
  uint64_t below(uint64_t count) { return random_() % count; }

  Colour colour() {
    Colour drawn;
    for (double& each : drawn) each = between(20, 235);
    return drawn;
  }
  Colour shade() {
    Colour drawn;
    for (double& each : drawn) each = between(-45, 45);
    return drawn;
  }
  Colour far_from(const Colour& other) {
    constexpr double contrast = 110;
    Colour drawn = colour();
    while (distance(drawn, other) < contrast) drawn = colour();
    return drawn;
  }

  /// Covers pixels by as much of them as the figure covers.
  template <typename ColourAt>
  void draw(const Figure& figure, const ColourAt& colour_at) {
    constexpr int64_t fine = 3;
    const double cosine = std::cos(figure.angle), sine = std::sin(figure.angle);
    for (int64_t y = 0; y < kSide; ++y) {
      for (int64_t x = 0; x < kSide; ++x) {
        Colour sum{};
        int64_t inside = 0;
        for (int64_t i = 0; i < fine * fine; ++i) {
          const auto part = [](int64_t place, int64_t step) {
            return static_cast<double>(place) + (static_cast<double>(step) + 0.5) / fine;
          };
          const double dx = part(x, i % fine) - figure.x, dy = part(y, i / fine) - figure.y;
          const double u = (cosine * dx + sine * dy) / figure.radius;
          const double v = (cosine * dy - sine * dx) / figure.radius;
          if (!in_shape(figure.shape, u, v)) continue;
          ++inside;
          const Colour& here = colour_at(u, v);
          for (size_t c = 0; c < 3; ++c) sum[c] += here[c];
        }
        for (size_t c = 0; c < 3 && inside > 0; ++c) {
          const double share = static_cast<double>(inside) / (fine * fine);
          canvas_[c][y][x] = (1 - share) * canvas_[c][y][x] + sum[c] / (fine * fine);
        }
      }
    }
  }

  /// Small discs and bars anywhere.
  void clutter(uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) {
      Figure figure;
      figure.shape = below(2) == 0 ? kDisc : kSquare;
      figure.x = between(0, kSide);
      figure.y = between(0, kSide);
      figure.radius = between(1, 3);
      figure.angle = between(0, 2 * kPi);
      const Colour ink = colour();
      draw(figure, [&](double, double) -> const Colour& { return ink; });
    }
  }

  void finish(uint8_t* image) {
    const double noise = between(4, 20);
    for (const auto& plane : canvas_) {
      for (const auto& row : plane) {
        for (const double value : row) {
          // Four uniform numbers: near enough to a normal one, of variance 1 / 3.
          const double sum = unit() + unit() + unit() + unit() - 2;
          *image++ =
              static_cast<uint8_t>(std::lround(std::clamp(value + noise * std::sqrt(3.0) * sum, 0.0, 255.0)));
        }
      }
    }
  }

  std::mt19937_64& random_;
  std::array<std::array<std::array<double, kSide>, kSide>, 3> canvas_{};
};

}  // namespace

const std::vector<std::string>& drawing_names() {
  static const std::vector<std::string> names{"disc", "ring",    "square", "triangle", "cross",
                                              "star", "stripes", "checks", "dots",     "waves"};
  return names;
}

std::vector<uint8_t> draw_images(int64_t count, uint64_t seed) {
  std::vector<uint8_t> images(static_cast<size_t>(count * kPixels));
  std::mt19937_64 random(seed);
  Painter painter(random);
  for (int64_t i = 0; i < count; ++i) {
    painter.paint(static_cast<size_t>(i) % kClasses, images.data() + i * kPixels);
  }
  return images;
}

}  // namespace remnant::app::vision
