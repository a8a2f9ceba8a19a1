// Chooses the instruction set, and the sizes that callers and kernels share.

#include "kernels/cpu/variants.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#if defined(REMNANT_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace remnant::kernels {

int64_t rank_bits(int64_t keys) {
  return keys <= 1 ? 0 : static_cast<int64_t>(std::bit_width(static_cast<uint64_t>(keys - 1)));
}

int64_t rank_bytes(int64_t keys) { return (keys * rank_bits(keys) + 7) / 8; }

int64_t curve_width(int64_t keys, int64_t m) { return (2 * m < keys ? 2 * m : keys) + 2; }

template <typename T>
int64_t curve_scratch_bytes(int64_t keys) {
  return keys * static_cast<int64_t>(3 * sizeof(T) + 3 * sizeof(uint32_t));
}
template int64_t curve_scratch_bytes<float>(int64_t);
template int64_t curve_scratch_bytes<double>(int64_t);

namespace {

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

}  // namespace

// Tiles small enough that scores, their gradient and the tile's operands stay in a core's second-level
// cache, tall enough that a key read once serves many rows. The curve sorts whole rows, so its tiles
// are as wide as the keys, and lower the more there are.
template <typename T>
void choose_tiles(AttentionProblem<T>& problem) {
  constexpr int64_t most_rows = kSampleRows, most_keys = 128, panel = 65536;
  problem.block_rows = std::min(most_rows, round_up(std::max<int64_t>(problem.queries, 1), kTileUnit));
  const int64_t keys = round_up(std::max<int64_t>(problem.keys, 1), kTileUnit);
  problem.tile_keys = std::min(most_keys, keys);
  if (problem.keep == Keep::curve) {
    problem.tile_keys = keys;
    const int64_t rows = panel / keys / kTileUnit * kTileUnit;
    problem.block_rows = std::clamp(rows, kTileUnit, problem.block_rows);
  }
}
template void choose_tiles(AttentionProblem<float>&);
template void choose_tiles(AttentionProblem<double>&);

template <typename T>
int64_t forward_tasks(const AttentionProblem<T>& problem, Sequence* sequences) {
  const auto blocks = [&](int64_t queries) {
    return (queries + problem.block_rows - 1) / problem.block_rows;
  };
  if (sequences == nullptr) return problem.batch * problem.heads * blocks(problem.queries);
  int64_t tasks = 0;
  for (int64_t b = 0; b < problem.batch; ++b) {
    sequences[b].first_task = tasks;
    tasks += problem.heads * blocks(sequences[b].queries);
  }
  return tasks;
}
template int64_t forward_tasks(const AttentionProblem<float>&, Sequence*);
template int64_t forward_tasks(const AttentionProblem<double>&, Sequence*);

template <typename T>
int64_t bfloat16_staging(const AttentionProblem<T>& problem) {
  if (!problem.bfloat16) return 0;
  return std::max(problem.tile_keys, problem.block_rows) *
         round_up(std::max(problem.head_dim, problem.value_dim), 32);
}
template int64_t bfloat16_staging(const AttentionProblem<float>&);
template int64_t bfloat16_staging(const AttentionProblem<double>&);

template <typename T>
int64_t bfloat16_widening(const AttentionProblem<T>& problem) {
  if (!problem.bfloat16) return 0;
  const int64_t dims = round_up(problem.head_dim, kTileUnit),
                value_dims = round_up(problem.value_dim, kTileUnit);
  return problem.tile_keys * std::max(dims, value_dims) + problem.block_rows * (dims + value_dims);
}
template int64_t bfloat16_widening(const AttentionProblem<float>&);
template int64_t bfloat16_widening(const AttentionProblem<double>&);

template <typename T>
int64_t attention_scratch_bytes(const AttentionProblem<T>& problem) {
  const int64_t dims = round_up(problem.head_dim, kTileUnit) + 2 * round_up(problem.value_dim, kTileUnit);
  const int64_t numbers = problem.block_rows * (2 * problem.tile_keys + dims + 8) + problem.tile_keys;
  int64_t bytes = numbers * static_cast<int64_t>(sizeof(T)) + problem.block_rows * problem.tile_keys + 128;
  bytes += bfloat16_staging(problem) * 2 + bfloat16_widening(problem) * static_cast<int64_t>(sizeof(T));
  if (problem.keep == Keep::sample) {
    const int64_t tiles = (problem.keys + problem.tile_keys - 1) / problem.tile_keys;
    const int64_t weights = round_up(problem.keys, kTileUnit) + 2 * tiles * problem.block_rows;
    const int64_t drawn = problem.tile_keys * (round_up(problem.head_dim, kTileUnit) +
                                               2 * round_up(problem.value_dim, kTileUnit));
    bytes += std::max(weights, 2 * drawn) * static_cast<int64_t>(sizeof(T)) + problem.tile_keys * 4 + 128;
  }
  // A sorted row, or a row of 64-bit words in each lane of a vector.
  if (problem.keep == Keep::curve)
    bytes += std::max(curve_scratch_bytes<T>(problem.keys), 64 * problem.keys) + 64;
  return bytes;
}
template int64_t attention_scratch_bytes(const AttentionProblem<float>&);
template int64_t attention_scratch_bytes(const AttentionProblem<double>&);

namespace {

// A variant's attention kernels, and the other kernels of the one that it extends.
#define REMNANT_KERNEL_TABLE(variant, others, bfloat16)                                                      \
  constexpr CpuKernels k_##variant{#variant,                                                                 \
                                   bfloat16,                                                                 \
                                   variant::attention_forward<float>,                                        \
                                   variant::attention_forward<double>,                                       \
                                   variant::attention_backward<float>,                                       \
                                   variant::attention_backward<double>,                                      \
                                   others::curve_encode<float>,                                              \
                                   others::curve_encode<double>,                                             \
                                   others::curve_decode<float>,                                              \
                                   others::curve_decode<double>,                                             \
                                   others::dropout_bits,                                                     \
                                   others::cross_entropy<float>,                                             \
                                   others::cross_entropy<double>,                                            \
                                   others::hidden_forward<float>,                                            \
                                   others::hidden_forward<double>,                                           \
                                   others::hidden_backward<float>,                                           \
                                   others::hidden_backward<double>,                                          \
                                   others::hidden_encode<float>,                                             \
                                   others::hidden_encode<double>,                                            \
                                   others::hidden_decode<float>,                                             \
                                   others::hidden_decode<double>};                                           \
  constexpr StepKernels k_step_##variant {                                                                   \
    others::norm_forward, others::norm_backward, others::dropout_add, others::activation_forward,            \
        others::activation_backward, others::encode, others::decode, others::transpose_floats,               \
        others::unit_moments, others::unit_forward, others::unit_reduce, others::unit_backward,              \
        others::max_pool_forward, others::max_pool_backward, others::spectrum_forward<float>,                \
        others::spectrum_forward<double>, others::spectrum_inverse<float>, others::spectrum_inverse<double>, \
        others::system_products<float>, others::system_products<double>, others::system_inverses<float>,     \
        others::system_inverses<double>                                                                      \
  }

REMNANT_KERNEL_TABLE(portable, portable, false);
#ifdef REMNANT_HAVE_AVX2
REMNANT_KERNEL_TABLE(avx2, avx2, false);
#endif
#ifdef REMNANT_HAVE_AVX512
REMNANT_KERNEL_TABLE(avx512, avx512, false);
#endif
#ifdef REMNANT_HAVE_AMX
REMNANT_KERNEL_TABLE(amx, avx512, true);

// Tile registers are large, so that Linux gives them to processes that ask.
bool have_amx() {
  constexpr unsigned bfloat16_bit = 1u << 22, tile_bit = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & bfloat16_bit) == 0 || (d & tile_bit) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

#ifdef REMNANT_HAVE_AVX512
bool have_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

}  // namespace

const CpuKernels* find_cpu_kernels(const char* name) {
  const bool any = name == nullptr || *name == '\0';
#ifdef REMNANT_HAVE_AMX
  if ((any || std::strcmp(name, "amx") == 0) && have_avx512() && have_amx()) return &k_amx;
#endif
#ifdef REMNANT_HAVE_AVX512
  if ((any || std::strcmp(name, "avx512") == 0) && have_avx512()) return &k_avx512;
#endif
#ifdef REMNANT_HAVE_AVX2
  if ((any || std::strcmp(name, "avx2") == 0) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c")) {
    return &k_avx2;
  }
#endif
  return any || std::strcmp(name, "portable") == 0 ? &k_portable : nullptr;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels* const kernels = [] {
    const CpuKernels* named = find_cpu_kernels(std::getenv("REMNANT_CPU"));
    return named != nullptr ? named : find_cpu_kernels(nullptr);
  }();
  return *kernels;
}

const StepKernels& find_step_kernels(const CpuKernels* chosen) {
#ifdef REMNANT_HAVE_AMX
  if (chosen == &k_amx) return k_step_amx;
#endif
#ifdef REMNANT_HAVE_AVX512
  if (chosen == &k_avx512) return k_step_avx512;
#endif
#ifdef REMNANT_HAVE_AVX2
  if (chosen == &k_avx2) return k_step_avx2;
#endif
  return k_step_portable;
}

const StepKernels& step_kernels() {
  static const StepKernels& kernels = find_step_kernels(&cpu_kernels());
  return kernels;
}

// A row in the widest type, its random bits and what drawing them may write beyond.
int64_t norm_scratch_bytes(int64_t columns) {
  return columns * static_cast<int64_t>(sizeof(double) + sizeof(uint16_t)) + 1024;
}

}  // namespace remnant::kernels
