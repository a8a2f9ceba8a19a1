#include "vision/data.h"

#include "common/error.h"
#include "common/text.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include <cmath>
#include <cstddef>
#include <optional>
#include <set>
#include <utility>

namespace remnant::app::vision {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kLabels = 10, kRecord = 1 + kPixels, kPlane = kSide * kSide;
/// One in so many images of a label is held out for validation, and one for the test.
constexpr int64_t kHeldOut = 10;

const std::vector<std::string>& cifar_names() {
  static const std::vector<std::string> names{"airplane", "automobile", "bird",  "cat",  "deer",
                                              "dog",      "frog",       "horse", "ship", "truck"};
  return names;
}

std::string quoted(const fs::path& file) { return "'" + file.string() + "'"; }

void append(LabelledImages& to, const LabelledImages& from, int64_t row) {
  to.labels.push_back(from.labels[row]);
  const auto first = from.pixels.begin() + row * kPixels;
  to.pixels.insert(to.pixels.end(), first, first + kPixels);
}

/// Moves the images at `place` of every kHeldOut of a label out of `images`.
LabelledImages hold_out(LabelledImages& images, int64_t place) {
  LabelledImages held, left;
  left.file = held.file = images.file;
  std::vector<int64_t> seen(kLabels, 0);
  for (int64_t i = 0; i < images.size(); ++i) {
    const bool out = seen[images.labels[i]]++ % kHeldOut == place;
    append(out ? held : left, images, i);
  }
  images = std::move(left);
  return held;
}

/// The images `first` to `end`, whose labels go round.
LabelledImages drawn(const std::vector<uint8_t>& pixels, int64_t first, int64_t end) {
  LabelledImages images;
  images.pixels.assign(pixels.begin() + first * kPixels, pixels.begin() + end * kPixels);
  for (int64_t i = first; i < end; ++i) images.labels.push_back(i % kLabels);
  return images;
}

Dataset generated(int64_t count) {
  const std::vector<uint8_t> pixels = draw_images(count);
  const int64_t validation = count * 8 / 10, test = count * 9 / 10;
  Dataset data;
  data.names = drawing_names();
  data.train = drawn(pixels, 0, validation);
  data.validation = drawn(pixels, validation, test);
  data.test = drawn(pixels, test, count);
  return data;
}

std::optional<fs::path> find(const fs::path& folder, const std::set<std::string>& names,
                             const std::vector<std::string>& stems) {
  for (const std::string& stem : stems) {
    for (const char* ending : {".bin", ".bin.gz"}) {
      if (names.count(stem + ending) > 0) return folder / (stem + ending);
    }
  }
  return std::nullopt;
}

/// data_batch_1 to data_batch_5, one after the other.
LabelledImages read_parts(const fs::path& folder, const std::set<std::string>& names) {
  constexpr int parts = 5;
  LabelledImages all;
  for (int i = 1; i <= parts; ++i) {
    const std::string stem = "data_batch_" + std::to_string(i);
    const auto file = find(folder, names, {stem});
    if (!file) {
      const std::string wanted = i == 1 ? "train.bin or data_batch_1.bin" : stem + ".bin";
      throw Error("no " + wanted + " (or .gz) in " + quoted(folder) + "; " + folder_listing(names));
    }
    LabelledImages part = read_images(*file);
    if (i == 1) all.file = *file;
    all.labels.insert(all.labels.end(), part.labels.begin(), part.labels.end());
    all.pixels.insert(all.pixels.end(), part.pixels.begin(), part.pixels.end());
  }
  return all;
}

std::vector<std::string> read_names(const fs::path& file) {
  std::vector<std::string> names;
  for (const std::string& line : read_lines(file)) {
    if (has_word(line)) names.push_back(line);
  }
  if (static_cast<int64_t>(names.size()) == kLabels) return names;
  throw Error(quoted(file) + " should hold " + std::to_string(kLabels) + " names, a line each, got " +
              std::to_string(names.size()));
}

}  // namespace

LabelledImages read_images(const fs::path& file) {
  const std::string content = read_unpacked(file);
  const auto bytes = static_cast<int64_t>(content.size());
  if (bytes == 0) throw Error(quoted(file) + " holds no image");
  if (bytes % kRecord != 0) {
    throw Error(quoted(file) + " should hold images of " + std::to_string(kRecord) +
                " bytes, a label and 3 x 32 x 32 pixels; its " + std::to_string(bytes) +
                " bytes are no whole number of them: it is cut off, or of another format");
  }
  LabelledImages images;
  images.file = file;
  images.pixels.reserve(static_cast<size_t>(bytes));
  for (int64_t i = 0; i < bytes / kRecord; ++i) {
    const auto record = content.begin() + i * kRecord;
    const int64_t label = static_cast<unsigned char>(*record);
    if (label >= kLabels) {
      throw Error("image " + std::to_string(i + 1) + " of " + quoted(file) + " has the label " +
                  std::to_string(label) + ", expected 0 to 9");
    }
    images.labels.push_back(label);
    images.pixels.insert(images.pixels.end(), record + 1, record + kRecord);
  }
  return images;
}

Dataset load_dataset(const DataSource& from) {
  if (from.data == "generated") return generated(from.images);
  const fs::path path = from.data;
  Dataset data;
  data.names = cifar_names();
  std::optional<fs::path> validation, test;
  if (fs::is_directory(path)) {
    const std::set<std::string> names = file_names(path);
    validation = find(path, names, {"val", "valid"});
    test = find(path, names, {"test", "test_batch"});
    const auto train = find(path, names, {"train"});
    data.train = train ? read_images(*train) : read_parts(path, names);
    if (names.count("batches.meta.txt") > 0) data.names = read_names(path / "batches.meta.txt");
  } else {
    data.train = read_images(path);
  }
  data.held_out_validation = !validation;
  data.held_out_test = !test;
  const int64_t found = data.train.size();
  // The test's first: which images it has does not depend on whether there is a validation file.
  data.test = test ? read_images(*test) : hold_out(data.train, kHeldOut - 1);
  data.validation = validation ? read_images(*validation) : hold_out(data.train, kHeldOut - 2);
  if (data.test.size() == 0 || data.validation.size() == 0) {
    throw Error(quoted(data.train.file) + " holds " + std::to_string(found) + " images, expected at least " +
                std::to_string(2 * kHeldOut) +
                " of a label: some are held out, as there is no file of their own for validation and test");
  }
  return data;
}

Normalisation normalisation_of(const LabelledImages& images) {
  Normalisation result;
  for (size_t c = 0; c < 3; ++c) {
    // Sums of integers, so that they are exact.
    int64_t sum = 0, squares = 0;
    for (int64_t i = 0; i < images.size(); ++i) {
      const uint8_t* plane = images.pixels.data() + i * kPixels + static_cast<int64_t>(c) * kPlane;
      for (int64_t j = 0; j < kPlane; ++j) {
        sum += plane[j];
        squares += int64_t{plane[j]} * plane[j];
      }
    }
    const auto count = static_cast<double>(images.size() * kPlane);
    const double mean = static_cast<double>(sum) / count;
    const double variance = static_cast<double>(squares) / count - mean * mean;
    result.mean[c] = mean / 255;
    // A plane of one colour is left as it is.
    result.deviation[c] = variance > 1e-6 ? std::sqrt(variance) / 255 : 1;
  }
  return result;
}

Batch make_batch(const LabelledImages& images, const std::vector<int64_t>& rows,
                 const Normalisation& normalisation, const std::vector<Move>& moves, bool channels_last) {
  std::array<std::array<float, 256>, 3> normal{};
  for (size_t c = 0; c < 3; ++c) {
    for (size_t value = 0; value < 256; ++value) {
      normal[c][value] = static_cast<float>((static_cast<double>(value) / 255 - normalisation.mean[c]) /
                                            normalisation.deviation[c]);
    }
  }
  Batch batch;
  batch.images = at::empty(
      {static_cast<int64_t>(rows.size()), 3, kSide, kSide},
      at::TensorOptions(at::kFloat)
          .memory_format(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous));
  auto* out = batch.images.mutable_data_ptr<float>();
  const int64_t step_c = batch.images.stride(1), step_y = batch.images.stride(2),
                step_x = batch.images.stride(3);
  std::vector<int64_t> labels;
  for (const int64_t row : rows) {
    labels.push_back(images.labels[row]);
    const Move move = moves.empty() ? Move() : moves[row];
    for (int64_t c = 0; c < 3; ++c) {
      const uint8_t* plane = images.pixels.data() + row * kPixels + c * kPlane;
      for (int64_t y = 0; y < kSide; ++y) {
        const int64_t from_y = y + move.y;
        for (int64_t x = 0; x < kSide; ++x) {
          const int64_t from_x = (move.flip ? kSide - 1 - x : x) + move.x;
          const bool inside = from_y >= 0 && from_y < kSide && from_x >= 0 && from_x < kSide;
          out[c * step_c + y * step_y + x * step_x] =
              inside ? normal[static_cast<size_t>(c)][plane[from_y * kSide + from_x]] : 0.0F;
        }
      }
    }
    out += kPixels;
  }
  batch.labels = at::tensor(labels);
  return batch;
}

}  // namespace remnant::app::vision
