#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace remnant::app::vision {

/// Height and width of all images, and bytes of one: red, green and blue planes.
inline constexpr int64_t kSide = 32, kPixels = 3 * kSide * kSide;

/// The classes of draw_images, in the order of their labels: six shapes and four textures.
const std::vector<std::string>& drawing_names();

/// `count` images of the class i % 10: one shape, or a patch with a texture, in two random colours at a
/// random place, size and angle, before and behind clutter, with noise. Colours, size and place say nothing
/// of the class. Deterministic from `seed`.
std::vector<uint8_t> draw_images(int64_t count, uint64_t seed = 1);

}  // namespace remnant::app::vision
