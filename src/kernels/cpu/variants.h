#pragma once

#include "kernels/cpu/attention_kernels.h"
#include "kernels/cpu/step_kernels.h"

// What each instruction set's copy of the kernel sources defines.
#define REMNANT_DECLARE_KERNELS(variant)                                                                   \
  namespace remnant::kernels::variant {                                                                    \
  template <typename T>                                                                                    \
  void attention_forward(const AttentionForward<T>& problem, int64_t begin, int64_t end, void* scratch);   \
  template <typename T>                                                                                    \
  void attention_backward(const AttentionBackward<T>& problem, int64_t begin, int64_t end, void* scratch); \
  template <typename T>                                                                                    \
  void curve_encode(const CurveRows<T>& rows, int64_t begin, int64_t end, void* scratch);                  \
  template <typename T>                                                                                    \
  void curve_decode(const CurveRows<T>& rows, int64_t begin, int64_t end, void* scratch);                  \
  void dropout_bits(const Seed& seed, uint32_t head, int64_t row, int64_t rows, int64_t block,             \
                    int64_t blocks, uint16_t* out);                                                        \
  template <typename T>                                                                                    \
  void cross_entropy(const CrossEntropyRows<T>& rows, int64_t begin, int64_t end);                         \
  template <typename T>                                                                                    \
  void hidden_forward(const HiddenRows<T>& rows, int64_t begin, int64_t end);                              \
  template <typename T>                                                                                    \
  void hidden_backward(const HiddenRows<T>& rows, int64_t begin, int64_t end);                             \
  template <typename T>                                                                                    \
  void hidden_encode(const HiddenRows<T>& rows, int64_t begin, int64_t end);                               \
  template <typename T>                                                                                    \
  void hidden_decode(const HiddenRows<T>& rows, int64_t begin, int64_t end);                               \
  void norm_forward(const NormForward& problem, int64_t begin, int64_t end, void* scratch);                \
  void norm_backward(const NormBackward& problem, int64_t begin, int64_t end, void* scratch);              \
  void dropout_add(const DropoutAdd& problem, int64_t begin, int64_t end);                                 \
  void activation_forward(const Activation& problem, int64_t begin, int64_t end);                          \
  void activation_backward(const Activation& problem, int64_t begin, int64_t end);                         \
  void encode(const LowBits& problem, int64_t begin, int64_t end);                                         \
  void decode(const LowBits& problem, int64_t begin, int64_t end);                                         \
  void transpose_floats(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to,     \
                        int64_t to_stride);                                                                \
  void unit_moments(const ConvUnit& problem, int64_t begin, int64_t end);                                  \
  void unit_forward(const ConvUnit& problem, int64_t begin, int64_t end);                                  \
  void unit_reduce(const ConvUnit& problem, int64_t begin, int64_t end);                                   \
  void unit_backward(const ConvUnit& problem, int64_t begin, int64_t end);                                 \
  void max_pool_forward(const MaxPool& problem, int64_t begin, int64_t end);                               \
  void max_pool_backward(const MaxPool& problem, int64_t begin, int64_t end);                              \
  template <typename T>                                                                                    \
  void spectrum_forward(const Spectrum<T>& problem, int64_t begin, int64_t end, void* scratch);            \
  template <typename T>                                                                                    \
  void spectrum_inverse(const Spectrum<T>& problem, int64_t begin, int64_t end, void* scratch);            \
  template <typename T>                                                                                    \
  void system_products(const SystemProducts<T>& problem, int64_t begin, int64_t end);                      \
  template <typename T>                                                                                    \
  void system_inverses(const SystemInverses<T>& problem, int64_t begin, int64_t end, void* scratch);       \
  }

REMNANT_DECLARE_KERNELS(portable)
#ifdef REMNANT_HAVE_AVX2
REMNANT_DECLARE_KERNELS(avx2)
#endif
#ifdef REMNANT_HAVE_AVX512
REMNANT_DECLARE_KERNELS(avx512)
#endif
#ifdef REMNANT_HAVE_AMX
REMNANT_DECLARE_KERNELS(amx)
#endif
