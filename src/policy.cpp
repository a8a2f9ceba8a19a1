#include <remnant/policy.h>

#include "nearest.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <charconv>
#include <vector>

namespace remnant {

namespace {

constexpr const char* kForms =
    "exact, recompute, curve:m=4, curve:m=4,paper_text, quantized:bits=4, sampled:m=128, top:m=32";

int64_t parse_integer(std::string_view text, std::string_view policy, std::string_view name) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  TORCH_CHECK(error == std::errc() && end == text.data() + text.size(), "policy '", policy, "': parameter ",
              name, " must be a whole number, got '", text, "'");
  return value;
}

Policy with_m(PolicyKind kind, const char* name, int64_t m) {
  TORCH_CHECK(m >= 1, "policy ", name, ": m must be at least 1, got ", m);
  Policy policy;
  policy.kind = kind;
  policy.m = m;
  return policy;
}

}  // namespace

Policy Policy::exact() {
  Policy policy;
  policy.kind = PolicyKind::exact;
  return policy;
}

Policy Policy::recompute() { return {}; }

Policy Policy::curve(int64_t m, bool paper_text) {
  Policy policy = with_m(PolicyKind::curve, "curve", m);
  policy.paper_text = paper_text;
  return policy;
}

Policy Policy::quantized(int64_t bits) {
  TORCH_CHECK(bits == 2 || bits == 4 || bits == 8, "policy quantized: bits must be 2, 4 or 8, got ", bits);
  Policy policy;
  policy.kind = PolicyKind::quantized;
  policy.bits = bits;
  return policy;
}

Policy Policy::sampled(int64_t m) { return with_m(PolicyKind::sampled, "sampled", m); }

Policy Policy::top(int64_t m) { return with_m(PolicyKind::top, "top", m); }

Policy Policy::parse(std::string_view text) {
  const auto colon = text.find(':');
  const std::string name(text.substr(0, colon));
  const std::vector<std::string> names{"exact", "recompute", "curve", "quantized", "sampled", "top"};
  TORCH_CHECK(std::find(names.begin(), names.end(), name) != names.end(), "unknown attention policy '", text,
              "'", suggestion(name, names), "; policies are written ", kForms);
  int64_t m = name == "sampled" ? sampled().m : name == "top" ? top().m : Policy{}.m;
  int64_t bits = Policy{}.bits;
  bool paper_text = false;
  std::vector<std::string> allowed;
  if (name == "curve") {
    allowed = {"m", "paper_text"};
  } else if (name == "quantized") {
    allowed = {"bits"};
  } else if (name == "sampled" || name == "top") {
    allowed = {"m"};
  }
  std::string_view rest = colon == std::string_view::npos ? std::string_view{} : text.substr(colon + 1);
  TORCH_CHECK(colon == std::string_view::npos || !rest.empty(), "policy '", text, "': nothing after ':'");
  while (!rest.empty()) {
    const auto comma = rest.find(',');
    const std::string_view item = rest.substr(0, comma);
    const auto equals = item.find('=');
    const std::string key(item.substr(0, equals));
    TORCH_CHECK(std::find(allowed.begin(), allowed.end(), key) != allowed.end(), "policy '", text,
                "': unknown parameter '", key, "'", suggestion(key, allowed), "; policies are written ",
                kForms);
    const bool has_value = equals != std::string_view::npos;
    if (key == "paper_text") {
      TORCH_CHECK(!has_value, "policy '", text, "': paper_text takes no value");
      paper_text = true;
    } else {
      TORCH_CHECK(has_value, "policy '", text, "': parameter ", key, " needs a value, as in ", key, "=4");
      (key == "m" ? m : bits) = parse_integer(item.substr(equals + 1), text, key);
    }
    TORCH_CHECK(comma == std::string_view::npos || comma + 1 < rest.size(), "policy '", text,
                "': nothing after ','");
    rest = comma == std::string_view::npos ? std::string_view{} : rest.substr(comma + 1);
  }
  if (name == "exact") return exact();
  if (name == "recompute") return recompute();
  if (name == "curve") return curve(m, paper_text);
  if (name == "sampled") return sampled(m);
  if (name == "top") return top(m);
  return quantized(bits);
}

std::string Policy::str() const {
  switch (kind) {
    case PolicyKind::exact:
      return "exact";
    case PolicyKind::recompute:
      return "recompute";
    case PolicyKind::curve:
      return "curve:m=" + std::to_string(m) + (paper_text ? ",paper_text" : "");
    case PolicyKind::quantized:
      return "quantized:bits=" + std::to_string(bits);
    case PolicyKind::sampled:
      return "sampled:m=" + std::to_string(m);
    case PolicyKind::top:
      return "top:m=" + std::to_string(m);
  }
  return "";
}

}  // namespace remnant
