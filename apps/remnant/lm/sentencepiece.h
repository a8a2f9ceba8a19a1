#pragma once

#include "lm/tokens.h"

namespace remnant::app::lm {

// Of the two sources that define these, CMake takes the one for a machine with the library or the one
// without.
std::unique_ptr<Tokenizer> make_sentencepiece(int64_t vocabulary, std::string_view text);
std::unique_ptr<Tokenizer> load_sentencepiece(const std::filesystem::path& run);

}  // namespace remnant::app::lm
