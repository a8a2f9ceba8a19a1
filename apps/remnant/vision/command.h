#pragma once

#include <functional>

namespace CLI {
class App;
}

namespace remnant::app::vision {

/// Adds `vision` with train, evaluate, run and compare. Parsing sets `action` to what the command line asks
/// for; it returns the exit code.
void add_command(CLI::App& program, std::function<int()>& action);

}  // namespace remnant::app::vision
