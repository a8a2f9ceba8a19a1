#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace remnant::app {

/// A user's mistake or a failure of the outside world, as one sentence for the terminal. Exit code 1.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A wrong command line. Exit code 2.
struct UsageError : Error {
  using Error::Error;
};

/// The candidate nearest to `word` in edit distance, or "" when none is near enough to suggest.
std::string nearest(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace remnant::app
