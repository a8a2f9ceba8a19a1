#pragma once

#include "report/run.h"

#include <string>
#include <vector>

namespace remnant::app::report {

/// How every page begins: a file that does so may be replaced.
extern const char* const kPageMark;

/// One HTML page about the runs, complete in itself. Throws Error where a run's file is damaged.
std::string page(const std::vector<Run>& runs);

}  // namespace remnant::app::report
