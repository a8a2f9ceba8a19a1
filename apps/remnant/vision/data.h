#pragma once

#include "vision/drawings.h"

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace remnant::app::vision {

/// Where the images come from.
struct DataSource {
  std::string data;       ///< a folder, a file, or "generated"
  int64_t images = 5000;  ///< of the generated ones
};

/// Images and their labels as read.
struct LabelledImages {
  std::vector<int64_t> labels;
  std::vector<uint8_t> pixels;  ///< kPixels an image
  std::filesystem::path file;   ///< from which, the first if several; empty for generated images
  int64_t size() const { return static_cast<int64_t>(labels.size()); }
};

/// CIFAR-10's binary format, plain or gzip: a byte with the label, 0 to 9, and 3072 of pixels an image.
/// Throws Error on a missing or damaged file, a part of a record, any other label, a file without images.
LabelledImages read_images(const std::filesystem::path& file);

struct Dataset {
  std::vector<std::string> names;  ///< of the labels
  LabelledImages train, validation, test;
  bool held_out_validation = false, held_out_test = false;
};

/// A folder's train.bin (or data_batch_1.bin and so on), val.bin and test.bin (or test_batch.bin), gzip or
/// not, and the names in batches.meta.txt, CIFAR-10's where there is none. Where there is no validation or
/// test file, and for a single file, every tenth image of each label is held out for each of them. Throws
/// Error.
Dataset load_dataset(const DataSource& from);

/// Mean and standard deviation of each channel, of pixels from 0 to 1.
struct Normalisation {
  std::array<double, 3> mean{}, deviation{};
};
Normalisation normalisation_of(const LabelledImages& images);

/// How an image is moved before training sees it, by at most kMargin pixels; what comes in at the border is
/// the mean colour.
inline constexpr int64_t kMargin = 4;
struct Move {
  int8_t x = 0, y = 0;
  bool flip = false;
};

struct Batch {
  at::Tensor images;  ///< [B, 3, 32, 32] float
  at::Tensor labels;  ///< [B] int64
};

/// `moves`: one an image of `images`, or none.
Batch make_batch(const LabelledImages& images, const std::vector<int64_t>& rows,
                 const Normalisation& normalisation, const std::vector<Move>& moves, bool channels_last);

}  // namespace remnant::app::vision
