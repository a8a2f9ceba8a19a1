#pragma once

#include <remnant/setting.h>

#include <c10/util/string_view.h>

#include <cstdint>

/// The written forms that conv_norm_act takes.
namespace remnant::ops {

enum class UnitNorm { none, batch, group };

struct UnitSettings {
  UnitNorm norm = UnitNorm::batch;
  int64_t norm_groups = 1;
  double slope = 0;   ///< identity: 1
  bool silu = false;  ///< then `slope` is 1
  Memory memory;
};

/// Throws one sentence for what does not parse, and for a budget.
UnitSettings parse_unit(c10::string_view norm, c10::string_view activation, c10::string_view memory);

}  // namespace remnant::ops
