#pragma once

#include <functional>

namespace CLI {
class App;
}

namespace remnant::app::report {

/// Adds `report`. Parsing it sets `action`.
void add_command(CLI::App& program, std::function<int()>& action);

}  // namespace remnant::app::report
