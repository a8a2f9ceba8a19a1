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

constexpr const char* kForms = "eager, exact, unbiased:bits=4, budget=60MB or budget=60MB,bits=4";

constexpr std::array<std::pair<const char*, double>, 7> kUnits{
    {{"B", 1}, {"kB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"KiB", 1024}, {"MiB", 1048576}, {"GiB", 1073741824}}};

constexpr std::array<std::string_view, 5> kAttention{"eager", "projections", "output", "input", "automatic"};

/// The setting nearest to a word, as it is written.
std::string nearest_form(std::string_view word) {
  std::string text = suggestion(word, {"eager", "exact", "unbiased", "budget"});
  const auto write = [&](const std::string& name, const char* form) {
    if (const size_t at = text.find("'" + name + "'"); at != std::string::npos) {
      text.replace(at + 1, name.size(), form);
    }
  };
  write("unbiased", "unbiased:bits=4");
  write("budget", "budget=60MB");
  return text;
}

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

bool codes_of(int64_t bits) { return bits == 8 || bits == 4 || bits == 2; }

// 0 for what is none.
int64_t parse_bits(std::string_view text) {
  return text.size() == 1 && codes_of(text.front() - '0') ? text.front() - '0' : 0;
}

}  // namespace

std::string_view name(AttentionKeep keep) { return kAttention[static_cast<size_t>(keep)]; }

Memory Memory::eager() { return {.kind = Kind::eager}; }

Memory Memory::exact() { return {.kind = Kind::exact}; }

Memory Memory::unbiased(int64_t bits) {
  TORCH_CHECK(codes_of(bits), "memory setting: unbiased takes 8, 4 or 2 bits, got ", bits);
  return {.kind = Kind::unbiased, .bits = bits};
}

Memory Memory::budget(int64_t bytes, int64_t bits) {
  TORCH_CHECK(bytes > 0, "memory setting: a budget must be at least 1 B, got ", bytes);
  TORCH_CHECK(bits == 0 || codes_of(bits), "memory setting: a budget takes codes of 8, 4 or 2 bits, got ",
              bits);
  return {.kind = Kind::budget, .bytes = bytes, .bits = bits};
}

Memory Memory::parse(std::string_view text) {
  if (text == "eager") return eager();
  if (text == "exact") return exact();
  constexpr std::string_view budget_form = "budget=";
  if (text.starts_with(budget_form)) {
    constexpr std::string_view bits_form = ",bits=";
    const std::string_view number = text.substr(budget_form.size());
    const size_t comma = std::min(number.find(','), number.size());
    const std::string_view codes = number.substr(comma);
    if (codes.empty()) return budget(parse_bytes(number));
    const int64_t bits = codes.starts_with(bits_form) ? parse_bits(codes.substr(bits_form.size())) : 0;
    TORCH_CHECK(bits > 0,
                "memory setting: what follows a budget is bits=8, 4 or 2, as in "
                "budget=60MB,bits=4, got '",
                text, "'");
    return budget(parse_bytes(number.substr(0, comma)), bits);
  }
  constexpr std::string_view unbiased_form = "unbiased:bits=";
  if (text.starts_with(unbiased_form)) {
    const int64_t bits = parse_bits(text.substr(unbiased_form.size()));
    TORCH_CHECK(bits > 0, "memory setting: unbiased takes 8, 4 or 2 bits, as in unbiased:bits=4, got '", text,
                "'");
    return unbiased(bits);
  }
  const std::string_view name = text.substr(0, text.find_first_of(":="));
  TORCH_CHECK(false, "unknown memory setting '", text, "'", nearest_form(name), "; settings are written ",
              kForms);
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
  int64_t number = bytes;
  size_t unit = 0;  // B, kB, MB, GB stand first
  for (; unit < 3 && number % 1000 == 0; ++unit) number /= 1000;
  const std::string codes = bits > 0 ? ",bits=" + std::to_string(bits) : "";
  return "budget=" + std::to_string(number) + kUnits[unit].first + codes;
}

LayerMemory::LayerMemory(const Memory& memory) {
  TORCH_CHECK(memory.kind != Memory::Kind::budget, "a layer cannot take the setting ", memory.str(),
              ": remnant::plan chooses for each layer what fits it");
  if (memory.kind == Memory::Kind::eager) {
    attention = AttentionKeep::eager;
    noise = true;
    return;
  }
  norm_input = false;
  if (memory.kind == Memory::Kind::unbiased) {
    bits = memory.bits;
    return;
  }
  attention = AttentionKeep::automatic;
  hidden = false;
}

LayerMemory LayerMemory::parse(std::string_view text) {
  LayerMemory memory;
  if (text == "checkpoint") {
    memory = LayerMemory(Memory::exact());
    memory.checkpoint = true;
    return memory;
  }
  const std::string_view word = text.substr(0, text.find_first_of(":=,"));
  const bool colon = word.size() < text.size() && text[word.size()] == ':';
  const bool setting = word.starts_with("unbias") || word == "budget";
  if (word == "recompute" || (colon && !setting)) {
    memory = LayerMemory(Memory::exact());
    memory.policy = Policy::parse(text);
    return memory;
  }
  if (setting || text.find('=') == std::string_view::npos) return Memory::parse(text);
  while (!text.empty()) {
    // A policy may hold commas itself.
    const bool last = text.starts_with("policy=");
    const std::string_view part = last ? text : text.substr(0, text.find(','));
    text.remove_prefix(std::min(text.size(), part.size() + 1));
    const std::string_view name = part.substr(0, part.find('='));
    const std::string_view value = part.substr(std::min(part.size(), name.size() + 1));
    const auto choose = [&](const char* no, const char* yes) {
      TORCH_CHECK(value == no || value == yes, "layer memory: ", name, " must be ", no, " or ", yes,
                  ", got '", value, "'");
      return value == yes;
    };
    if (name == "attention") {
      const auto found = std::find(kAttention.begin(), kAttention.end(), value);
      TORCH_CHECK(found != kAttention.end(),
                  "layer memory: attention must be eager, projections, output, input or automatic, got '",
                  value, "'", suggestion(value, {kAttention.begin(), kAttention.end()}));
      memory.attention = static_cast<AttentionKeep>(found - kAttention.begin());
    } else if (name == "hidden") {
      memory.hidden = choose("recompute", "keep");
    } else if (name == "dropout") {
      memory.noise = choose("seed", "noise");
    } else if (name == "norm") {
      memory.norm_input = choose("output", "input");
    } else if (name == "bits") {
      TORCH_CHECK(value == "0" || value == "2" || value == "4" || value == "8",
                  "layer memory: bits must be 0, 2, 4 or 8, got '", value, "'");
      memory.bits = value.front() - '0';
    } else if (name == "policy") {
      memory.policy = Policy::parse(value);
    } else {
      TORCH_CHECK(false, "layer memory: unknown part '", part, "'",
                  suggestion(name, {"attention", "hidden", "dropout", "norm", "bits", "policy"}),
                  "; written as in attention=input,hidden=recompute,dropout=seed,norm=output");
    }
  }
  TORCH_CHECK(!memory.policy.has_value() || memory.attention != AttentionKeep::eager,
              "layer memory: attention=eager keeps what PyTorch does and takes no policy, got '",
              memory.str(), "'");
  TORCH_CHECK(memory.bits == 0 || memory == LayerMemory(Memory::unbiased(memory.bits)),
              "layer memory: bits needs attention=projections, hidden=keep, dropout=seed, norm=output and no "
              "policy, got '",
              memory.str(), "'");
  return memory;
}

std::string LayerMemory::str() const {
  if (checkpoint) return "checkpoint";
  std::string text = "attention=" + std::string(name(attention));
  text += hidden ? ",hidden=keep" : ",hidden=recompute";
  text += noise ? ",dropout=noise" : ",dropout=seed";
  text += norm_input ? ",norm=input" : ",norm=output";
  if (bits > 0) text += ",bits=" + std::to_string(bits);
  if (policy.has_value()) text += ",policy=" + policy->str();
  return text;
}

}  // namespace remnant
