#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "common/run_folder.h"

namespace remnant::app {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto redraw_interval = std::chrono::milliseconds(100);
constexpr auto line_interval = std::chrono::seconds(10);
constexpr int64_t widest_bar = 24, narrowest_bar = 8;

static_assert(std::atomic<int>::is_always_lock_free, "a signal handler may touch no lock");
std::atomic<int> interrupt_signal{0};

constexpr int signals[] = {SIGINT, SIGTERM};
struct sigaction previous_actions[std::size(signals)];

void on_signal(int signal) {
  int none = 0;
  if (interrupt_signal.compare_exchange_strong(none, signal)) return;
  struct sigaction action = {};
  action.sa_handler = SIG_DFL;
  sigaction(signal, &action, nullptr);
  raise(signal);
}

bool redraws() {
  const char* terminal = std::getenv("TERM");
  const char* no_color = std::getenv("NO_COLOR");
  return isatty(STDERR_FILENO) != 0 && terminal != nullptr && std::strcmp(terminal, "dumb") != 0 &&
         (no_color == nullptr || *no_color == '\0');
}

int64_t terminal_width() {
  struct winsize size = {};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

void write_to_stderr(const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t count = ::write(STDERR_FILENO, text.data() + done, text.size() - done);
    if (count < 0 && errno != EINTR) return;  // a lost progress line is no reason to stop
    if (count > 0) done += static_cast<size_t>(count);
  }
}

bool starts_character(char c) { return (static_cast<uint8_t>(c) & 0xc0) != 0x80; }

int64_t columns(const std::string& text) { return std::count_if(text.begin(), text.end(), starts_character); }

std::string first_columns(const std::string& text, int64_t limit) {
  size_t end = 0;
  for (int64_t seen = 0; end < text.size(); ++end) {
    if (starts_character(text[end]) && ++seen > limit) break;
  }
  return text.substr(0, end);
}

std::string with_decimals(double value, const char* unit) { return format_fixed(value, 1) + " " + unit; }

}  // namespace

Interrupt::Interrupt() {
  interrupt_signal = 0;
  struct sigaction action = {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;  // libraries such as zlib take an interrupted read for a failure
  sigemptyset(&action.sa_mask);
  for (size_t i = 0; i < std::size(signals); ++i) {
    sigaction(signals[i], nullptr, &previous_actions[i]);
    if (previous_actions[i].sa_handler != SIG_IGN) sigaction(signals[i], &action, nullptr);
  }
}

Interrupt::~Interrupt() {
  for (size_t i = 0; i < std::size(signals); ++i) sigaction(signals[i], &previous_actions[i], nullptr);
}

bool Interrupt::requested() { return interrupt_signal != 0; }

int Interrupt::exit_code() { return requested() ? 128 + interrupt_signal : 0; }

void stop_if_interrupted() {
  if (Interrupt::requested()) throw Interrupted();
}

std::string progress_line(const std::string& label, int64_t step, int64_t total,
                          const std::vector<std::string>& fields, double seconds_left, int64_t width) {
  const double share = total > 0 ? std::clamp(double(step) / double(total), 0.0, 1.0) : 0.0;
  const std::string percent = std::to_string(static_cast<int64_t>(100 * share)) + " %";
  const std::string steps = std::to_string(step) + (total > 0 ? "/" + std::to_string(total) : "");
  const std::string left = seconds_left >= 0 ? format_duration(seconds_left) + " left" : "";

  const auto build = [&](int64_t bar, size_t field_count) {
    std::string line = label;
    if (bar > 0) {
      const auto filled = static_cast<size_t>(share * double(bar));
      line += " [" + std::string(filled, '#') + std::string(static_cast<size_t>(bar) - filled, '.') + "]";
    }
    if (total > 0) line += " " + percent;
    line += " " + steps;
    const char* separator = width > 0 ? "  " : ", ";
    for (size_t i = 0; i < field_count; ++i) line += separator + fields[i];
    if (!left.empty()) line += separator + left;
    return line;
  };
  if (width <= 0) return build(0, fields.size());
  // The bar gives way first, then the fields from the last one on.
  const int64_t widest = total > 0 ? widest_bar : 0;
  for (int64_t bar = widest; bar >= 0; bar = bar > narrowest_bar ? bar - 1 : bar - narrowest_bar) {
    std::string line = build(bar, fields.size());
    if (columns(line) <= width) return line;
  }
  for (size_t count = fields.size(); count-- > 0;) {
    std::string line = build(0, count);
    if (columns(line) <= width) return line;
  }
  return first_columns(build(0, 0), width);
}

Progress::Progress(std::string label, int64_t total_steps, bool quiet)
    : label_(std::move(label)), total_(total_steps), quiet_(quiet), terminal_(redraws()) {}

Progress::~Progress() { clear(); }

void Progress::update(int64_t step, const std::vector<std::string>& fields) {
  if (quiet_) return;
  const Clock::time_point now = Clock::now();
  if (first_step_ < 0 || step < first_step_) {
    first_step_ = step;
    start_ = now;
    last_drawn_step_ = -1;
  }
  const bool first = last_drawn_step_ < 0;
  const bool last = step == total_ && last_drawn_step_ != step;
  const bool tenth = total_ > 0 && step - last_drawn_step_ >= std::max<int64_t>(1, (total_ + 9) / 10);
  const auto waited = now - last_draw_;
  if (!first && !last && (terminal_ ? waited < redraw_interval : waited < line_interval && !tenth)) return;
  last_draw_ = now;
  last_drawn_step_ = step;

  double seconds_left = -1;
  if (step > first_step_ && step < total_) {
    const double seconds = std::chrono::duration<double>(now - start_).count();
    seconds_left = seconds / double(step - first_step_) * double(total_ - step);
  }
  if (terminal_) {
    // The last column stays free: some terminals wrap as soon as it is filled.
    const int64_t width = std::max<int64_t>(1, terminal_width() - 1);
    write_to_stderr("\r" + progress_line(label_, step, total_, fields, seconds_left, width) + "\033[K");
    line_shown_ = true;
  } else {
    write_to_stderr(progress_line(label_, step, total_, fields, seconds_left, 0) + "\n");
  }
}

void Progress::clear() {
  if (!line_shown_) return;
  write_to_stderr("\r\033[K");
  line_shown_ = false;
  last_draw_ = {};  // what was cleared comes back with the next update
}

std::string format_fixed(double value, int digits) {
  char text[400];  // the largest double has 309 digits before the point
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::string format_bytes(int64_t bytes) {
  const char* const units[] = {"kB", "MB", "GB", "TB", "PB", "EB"};
  const bool negative = bytes < 0;
  double value = std::abs(double(bytes));
  if (value < 1000) return std::to_string(bytes) + " B";
  size_t unit = 0;
  // 999.95 would be printed as 1000.0, which belongs to the next unit.
  for (value /= 1000; value >= 999.95 && unit + 1 < std::size(units); value /= 1000) ++unit;
  return (negative ? "-" : "") + with_decimals(value, units[unit]);
}

std::string format_duration(double seconds) {
  if (!(seconds >= 0) || seconds > 1e12) return "?";
  if (seconds < 9.95) return with_decimals(seconds, "s");
  const int64_t whole = std::llround(seconds);
  if (whole < 60) return std::to_string(whole) + " s";
  if (whole < 3600) return std::to_string(whole / 60) + " min " + std::to_string(whole % 60) + " s";
  const int64_t minutes = (whole + 30) / 60;
  if (minutes < 24 * 60) return std::to_string(minutes / 60) + " h " + std::to_string(minutes % 60) + " min";
  const int64_t hours = (minutes + 30) / 60;
  return std::to_string(hours / 24) + " d " + std::to_string(hours % 24) + " h";
}

}  // namespace remnant::app
