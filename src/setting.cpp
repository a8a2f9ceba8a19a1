#include <remnant/setting.h>

#include "nearest.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <utility>
#include <vector>

namespace remnant {

namespace {

constexpr const char* kForms = "eager, exact, unbiased:bits=4, budget=60MB";

constexpr std::array<std::pair<const char*, double>, 7> kUnits{
    {{"B", 1}, {"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"KiB", 1024}, {"MiB", 1048576}, {"GiB", 1073741824}}};

int64_t parse_bytes(std::string_view text) {
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const std::string_view unit(end, static_cast<size_t>(text.data() + text.size() - end));
  const auto found =
      std::find_if(kUnits.begin(), kUnits.end(), [&](const auto& known) { return unit == known.first; });
  TORCH_CHECK(
      error == std::errc() && found != kUnits.end(),
      "memory setting: a budget is a number and B, kB, MB, GB, KiB, MiB or GiB, as in budget=60MB, got '",
      text, "'");
  const double bytes = number * found->second;
  TORCH_CHECK(bytes >= 1 && bytes < 9e18, "memory setting: a budget must be at least 1 B, got '", text, "'");
  return std::llround(bytes);
}

}  // namespace

Memory Memory::eager() { return {.kind = Kind::eager}; }

Memory Memory::exact() { return {.kind = Kind::exact}; }

Memory Memory::unbiased(int64_t bits) {
  TORCH_CHECK(bits == 2 || bits == 4 || bits == 8, "memory setting unbiased: bits must be 2, 4 or 8, got ",
              bits);
  return {.kind = Kind::unbiased, .bits = bits};
}

Memory Memory::budget(int64_t bytes) {
  TORCH_CHECK(bytes > 0, "memory setting: a budget must be at least 1 B, got ", bytes);
  return {.kind = Kind::budget, .bytes = bytes};
}

Memory Memory::parse(std::string_view text) {
  if (text == "eager") return eager();
  if (text == "exact") return exact();
  if (text == "unbiased") return unbiased();
  constexpr std::string_view bits_form = "unbiased:bits=", budget_form = "budget=";
  if (text.starts_with(bits_form)) {
    const std::string_view number = text.substr(bits_form.size());
    int64_t bits = 0;
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), bits);
    TORCH_CHECK(error == std::errc() && end == number.data() + number.size(),
                "memory setting unbiased: bits must be 2, 4 or 8, got '", number, "'");
    return unbiased(bits);
  }
  if (text.starts_with(budget_form)) return budget(parse_bytes(text.substr(budget_form.size())));
  const std::string_view name = text.substr(0, text.find_first_of(":="));
  TORCH_CHECK(false, "unknown memory setting '", text, "'",
              suggestion(name, {"eager", "exact", "unbiased", "budget"}), "; settings are written ", kForms);
}

std::string Memory::str() const {
  switch (kind) {
    case Kind::eager:
      return "eager";
    case Kind::exact:
      return "exact";
    case Kind::unbiased:
      return "unbiased:bits=" + std::to_string(bits);
    case Kind::budget:
      break;
  }
  for (auto unit = kUnits.rbegin(); unit != kUnits.rend(); ++unit) {
    const auto size = static_cast<int64_t>(unit->second);
    if (bytes % size == 0) return "budget=" + std::to_string(bytes / size) + unit->first;
  }
  return {};
}

LayerMemory::LayerMemory(const Memory& memory) {
  TORCH_CHECK(memory.kind != Memory::Kind::budget, "a layer cannot take the setting ", memory.str(),
              ": remnant::plan chooses for each layer what fits it");
  if (memory.kind == Memory::Kind::eager) {
    attention = AttentionKeep::eager;
    noise = true;
    return;
  }
  attention = AttentionKeep::automatic;
  hidden = false;
  norm_input = false;
  if (memory.kind == Memory::Kind::unbiased) bits = memory.bits;
}

std::string LayerMemory::str() const {
  if (checkpoint) return "checkpoint";
  constexpr std::array<const char*, 5> names{"eager", "projections", "output", "input", "automatic"};
  std::string text = std::string("attention=") + names[static_cast<size_t>(attention)];
  text += hidden ? ",hidden=keep" : ",hidden=recompute";
  text += noise ? ",dropout=noise" : ",dropout=seed";
  text += norm_input ? ",norm=input" : ",norm=output";
  if (bits > 0) text += ",bits=" + std::to_string(bits);
  return text;
}

}  // namespace remnant
