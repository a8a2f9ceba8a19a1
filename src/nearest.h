#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace remnant {

/// " (did you mean 'name'?)" with the name that takes the fewest edits to reach, or "" where none is near.
std::string suggestion(std::string_view word, const std::vector<std::string>& names);

}  // namespace remnant
