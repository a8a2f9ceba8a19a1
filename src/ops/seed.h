#pragma once

#include "kernels/philox.h"

#include <ATen/core/Tensor.h>

namespace remnant::ops {

/// A seed as the kernels take it, under the RoundingSalt that lives.
kernels::Seed seed_of(const at::Tensor& seed);

/// Whether a NoRounding lives: who would keep codes draws their seeds and keeps its tensors.
bool keeps_whole();

}  // namespace remnant::ops
