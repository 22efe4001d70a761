// What a layer and the batch norm and activation behind it give when one unit is removed, for many
// units at once. See README.md for the formula.
//
// This file holds the whole arithmetic and all indexing. It compiles as CUDA device code
// (masked_fanout.cu) and as plain C++17 (host.cpp), so that machines without a GPU test the very
// lines that run on one. A tile is what one CUDA thread computes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MASKED_FANOUT_FN __host__ __device__ __forceinline__
#define MASKED_FANOUT_UNROLL _Pragma("unroll")
#else
#include <stdexcept>
#define MASKED_FANOUT_FN inline
#define MASKED_FANOUT_UNROLL
#endif

// Raised whenever MaskedFanoutParams changes; the caller compares it before the first launch.
#define MASKED_FANOUT_ABI 1

extern "C" {

enum MaskedFanoutDtype { MASKED_FANOUT_F32 = 0, MASKED_FANOUT_F16 = 1, MASKED_FANOUT_BF16 = 2 };

enum MaskedFanoutActivation {
  MASKED_FANOUT_NONE = 0,
  MASKED_FANOUT_RELU = 1,
  MASKED_FANOUT_HARDTANH = 2,
  MASKED_FANOUT_SILU = 3,
  MASKED_FANOUT_GELU = 4,
  MASKED_FANOUT_GELU_TANH = 5,
  MASKED_FANOUT_HARDSWISH = 6,
};

// Strides count elements. z, other and every variant of out are dense in the same layout: position
// innermost (NCHW) or channel innermost (channels-last, tokens). r and weight may have any strides.
struct MaskedFanoutParams {
  const void *z;          // (N, O, P)
  const void *r;          // (V, N, B, H, W)
  const void *weight;     // (V, O, B, KH, KW)
  const void *other;      // (N, O, P) or null
  const float *scale;     // (O,) or null
  const float *shift;     // (O,) or null
  const float *constant;  // (V, O) or null
  void *out;              // (V, N, O, P)
  int64_t out_stride_v;
  int64_t r_stride[5];
  int64_t weight_stride[5];
  int32_t variants, images, channels, unit_inputs;
  int32_t in_height, in_width, out_height, out_width;
  int32_t kernel[2], stride[2], padding[2], dilation[2];
  int32_t dtype, channels_innermost, activation;
  int32_t variants_per_tile;  // 0: chosen for the device
  float low, high;            // of hardtanh
};

}  // extern "C"

namespace masked_fanout {

using Params = MaskedFanoutParams;

constexpr int kInvalid = 1;  // the value of cudaErrorInvalidValue

// ---- Storage types: 16 bits that are only ever widened to float -------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MASKED_FANOUT_FN float to_float(float x) { return x; }

MASKED_FANOUT_FN float to_float(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu, mantissa = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: multiples of 2^-24
    return float_of_bits(sign | bits_of_float(float(mantissa) * 0x1p-24f));
  }
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  return float_of_bits(sign | (wide << 23) | (mantissa << 13));
#endif
}

MASKED_FANOUT_FN float to_float(BFloat16 x) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(uint32_t(x.bits) << 16);
#else
  return float_of_bits(uint32_t(x.bits) << 16);
#endif
}

MASKED_FANOUT_FN void from_float(float x, float *to) { *to = x; }

// Both round to nearest, ties to even, as torch does.
MASKED_FANOUT_FN void from_float(float x, Half *to) {
#if defined(__CUDA_ARCH__)
  to->bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t all = bits_of_float(x), sign = (all >> 16) & 0x8000u, size = all & 0x7fffffffu;
  uint32_t bits;
  if (size > 0x7f800000u) {
    bits = 0x7e00u;  // not a number
  } else if (size >= 0x477ff000u) {
    bits = 0x7c00u;  // 65520 and above round to infinity
  } else if (size < 0x38800000u) {
    // Below 2^-14: next to 0.5 a float counts in steps of 2^-24, as a subnormal half does.
    bits = bits_of_float(float_of_bits(size) + 0.5f) - 0x3f000000u;
  } else {
    bits = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  }
  to->bits = uint16_t(sign | bits);
#endif
}

MASKED_FANOUT_FN void from_float(float x, BFloat16 *to) {
#if defined(__CUDA_ARCH__)
  to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t all = bits_of_float(x);
  const bool nan = (all & 0x7fffffffu) > 0x7f800000u;
  to->bits = nan ? uint16_t((all >> 16) | 0x40u)
                 : uint16_t((all + 0x7fffu + ((all >> 16) & 1u)) >> 16);
#endif
}

// ---- Loads and stores of up to 16 bytes -------------------------------------------------------

template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
  T at[kVector];
};

#if defined(__CUDACC__)
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};
#else
// A GPU traps on a vector that is not aligned; the host build must not hide it.
template <int kBytes>
inline void require_aligned(const void *address) {
  if (reinterpret_cast<uintptr_t>(address) % kBytes != 0) {
    throw std::logic_error("misaligned vector");
  }
}
#endif

template <int kVector, typename T>
MASKED_FANOUT_FN Pack<T, kVector> load(const T *from) {
  Pack<T, kVector> pack;
#if defined(__CUDA_ARCH__)
  using Bits = typename Word<sizeof pack>::Type;
  const Bits bits = __ldg(reinterpret_cast<const Bits *>(from));
  memcpy(&pack, &bits, sizeof pack);
#else
#if !defined(__CUDACC__)
  require_aligned<sizeof pack>(from);
#endif
  std::memcpy(&pack, from, sizeof pack);
#endif
  return pack;
}

template <int kVector, typename T>
MASKED_FANOUT_FN void store(T *to, const Pack<T, kVector> &pack) {
#if defined(__CUDA_ARCH__)
  using Bits = typename Word<sizeof pack>::Type;
  Bits bits;
  memcpy(&bits, &pack, sizeof pack);
  *reinterpret_cast<Bits *>(to) = bits;
#else
#if !defined(__CUDACC__)
  require_aligned<sizeof pack>(to);
#endif
  std::memcpy(to, &pack, sizeof pack);
#endif
}

template <typename T>
MASKED_FANOUT_FN float load_one(const T *from) {
  return to_float(load<1>(from).at[0]);
}

// ---- Activations: comparisons are written so that a NaN stays a NaN, as in torch --------------

MASKED_FANOUT_FN float clamp(float x, float low, float high) {
  return x < low ? low : (x > high ? high : x);
}

MASKED_FANOUT_FN float activate(float x, int kind, float low, float high) {
  switch (kind) {
    case MASKED_FANOUT_RELU:
      return x < 0.0f ? 0.0f : x;
    case MASKED_FANOUT_HARDTANH:
      return clamp(x, low, high);
    case MASKED_FANOUT_SILU:
      return x / (1.0f + expf(-x));
    case MASKED_FANOUT_GELU:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));  // x / sqrt(2)
    case MASKED_FANOUT_GELU_TANH:  // sqrt(2 / pi)
      return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case MASKED_FANOUT_HARDSWISH:
      return x * clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f);
    default:
      return x;
  }
}

// ---- What the host works out once per launch --------------------------------------------------

struct Plan {
  int32_t positions;     // P
  int32_t vector;        // elements that one thread reads and writes together
  int32_t inner_tiles;   // vectors along the innermost dimension
  int32_t outer_tiles;   // rows of vectors, kRows each
  uint32_t tiles;        // of one variant
  int32_t pointwise;     // every output position reads the same input position and no other
  int32_t r_vector;      // r can be read in vectors along positions
  int32_t weight_vector;  // weight can be read in vectors along channels
  int32_t r_step[3];      // strides of B, H, W: within an image 32 bits are enough
  int32_t weight_step[4];  // strides of O, B, KH, KW
};

// At most 16 outputs per thread: with more, sums and packs leave room for too few threads.
MASKED_FANOUT_FN constexpr int rows_of(int vector) { return vector == 8 ? 2 : 4; }

inline bool divides(int64_t step, std::initializer_list<int64_t> strides) {
  for (const int64_t stride : strides) {
    if (stride % step != 0) return false;
  }
  return true;
}

inline bool aligned(const void *address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % uintptr_t(bytes) == 0;
}

// The last element that strides reach, or -1 when 32 bits do not hold it.
inline int64_t reach(std::initializer_list<int64_t> sizes, const int64_t *strides) {
  int64_t last = 0;
  for (const int64_t size : sizes) {
    if (*strides < 0) return -1;
    last += (size - 1) * *strides++;
    if (last > INT32_MAX) return -1;
  }
  return last;
}

inline int output_size(const Params &p, int axis, int in) {
  const int64_t covered = int64_t(p.dilation[axis]) * (p.kernel[axis] - 1) + 1;
  return int((in + 2 * int64_t(p.padding[axis]) - covered) / p.stride[axis] + 1);
}

// Returns 0, or kInvalid for parameters that no caller should pass.
inline int make_plan(const Params &p, Plan *plan) {
  if (p.variants < 0 || p.images < 0 || p.channels <= 0 || p.unit_inputs <= 0) return kInvalid;
  if (p.in_height <= 0 || p.in_width <= 0 || p.out_height <= 0 || p.out_width <= 0) return kInvalid;
  for (int axis = 0; axis < 2; ++axis) {
    if (p.kernel[axis] <= 0 || p.stride[axis] <= 0 || p.dilation[axis] <= 0) return kInvalid;
    if (p.padding[axis] < 0) return kInvalid;
  }
  if (output_size(p, 0, p.in_height) != p.out_height) return kInvalid;
  if (output_size(p, 1, p.in_width) != p.out_width) return kInvalid;
  if (p.dtype < MASKED_FANOUT_F32 || p.dtype > MASKED_FANOUT_BF16) return kInvalid;
  if (p.activation < MASKED_FANOUT_NONE || p.activation > MASKED_FANOUT_HARDSWISH) return kInvalid;

  const int64_t positions = int64_t(p.out_height) * p.out_width;
  const int64_t image = positions * p.channels;
  if (image > INT32_MAX) return kInvalid;
  if (reach({p.unit_inputs, p.in_height, p.in_width}, p.r_stride + 2) < 0) return kInvalid;
  if (reach({p.channels, p.unit_inputs, p.kernel[0], p.kernel[1]}, p.weight_stride + 1) < 0) {
    return kInvalid;
  }
  plan->positions = int32_t(positions);
  for (int i = 0; i < 3; ++i) plan->r_step[i] = int32_t(p.r_stride[2 + i]);
  for (int i = 0; i < 4; ++i) plan->weight_step[i] = int32_t(p.weight_stride[1 + i]);

  const int64_t inner = p.channels_innermost ? p.channels : positions;
  const int64_t outer = p.channels_innermost ? positions : p.channels;
  const int64_t bytes = p.dtype == MASKED_FANOUT_F32 ? 4 : 2;
  int64_t vector = 1;
  for (const int64_t width : {int64_t(16), int64_t(8)}) {
    const int64_t wanted = width / bytes;
    if (wanted >= 4 && divides(wanted, {inner, p.out_stride_v}) && aligned(p.z, width) &&
        aligned(p.out, width) && aligned(p.other, width)) {
      vector = wanted;
      break;
    }
  }
  plan->vector = int32_t(vector);

  const bool unpadded = p.padding[0] == 0 && p.padding[1] == 0;
  const bool one_tap = p.kernel[0] == 1 && p.kernel[1] == 1;
  const bool dense = p.stride[0] == 1 && p.stride[1] == 1;
  // One step along the width must also lead from the end of a line to the next.
  const bool one_line = p.in_height == 1 || p.r_stride[3] == p.in_width * p.r_stride[4];
  plan->pointwise = unpadded && one_tap && dense && one_line;
  plan->r_vector = !p.channels_innermost && plan->pointwise && p.r_stride[4] == 1 &&
                   divides(vector, {p.r_stride[0], p.r_stride[1], p.r_stride[2]}) &&
                   aligned(p.r, vector * bytes);
  plan->weight_vector =
      p.channels_innermost && p.weight_stride[1] == 1 &&
      divides(vector, {p.weight_stride[0], p.weight_stride[2], p.weight_stride[3],
                       p.weight_stride[4]}) &&
      aligned(p.weight, vector * bytes);

  const int64_t rows = rows_of(int(vector));
  const int64_t outer_tiles = (outer + rows - 1) / rows;
  const int64_t tiles = inner / vector * outer_tiles * p.images;
  if (tiles > INT32_MAX) return kInvalid;
  plan->inner_tiles = int32_t(inner / vector);
  plan->outer_tiles = int32_t(outer_tiles);
  plan->tiles = uint32_t(tiles);
  return 0;
}

// ---- One tile: kRows vectors of the output of one image, under some variants ------------------

// Along the vector lie positions (NCHW) or channels (channels-last, tokens); along the rows lies
// the other. Every tap adds the outer product of some weights and some residuals.
template <typename T, bool kChannelsInnermost, bool kPointwise, int kVector>
struct Tile {
  static constexpr int kRows = rows_of(kVector);
  static constexpr int kChannels = kChannelsInnermost ? kVector : kRows;
  static constexpr int kPositions = kChannelsInnermost ? kRows : kVector;

  MASKED_FANOUT_FN static void run(const Params &p, const Plan &plan, uint32_t tile,
                                   int first_variant, int end_variant) {
    const int inner = int(tile % uint32_t(plan.inner_tiles)) * kVector;
    const uint32_t line = tile / uint32_t(plan.inner_tiles);
    const int outer = int(line % uint32_t(plan.outer_tiles)) * kRows;
    const int image = int(line / uint32_t(plan.outer_tiles));
    const int inner_size = kChannelsInnermost ? p.channels : plan.positions;
    const int outer_size = kChannelsInnermost ? plan.positions : p.channels;
    const int rows = outer_size - outer < kRows ? outer_size - outer : kRows;
    const int64_t start =
        int64_t(image) * p.channels * plan.positions + int64_t(outer) * inner_size + inner;

    // Rows past the end read the last row again and are not stored: no branch around the loads.
    Pack<T, kVector> z[kRows], other[kRows];
    MASKED_FANOUT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const int64_t at = start + int64_t(row < rows ? row : rows - 1) * inner_size;
      z[row] = load<kVector>(static_cast<const T *>(p.z) + at);
      if (p.other != nullptr) other[row] = load<kVector>(static_cast<const T *>(p.other) + at);
    }

    int channel[kChannels];
    float scale[kChannels], shift[kChannels];
    MASKED_FANOUT_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      channel[c] = kChannelsInnermost ? inner + c : outer + (c < rows ? c : rows - 1);
      scale[c] = p.scale != nullptr ? load_one(p.scale + channel[c]) : 1.0f;
      shift[c] = p.shift != nullptr ? load_one(p.shift + channel[c]) : 0.0f;
    }

    // Where the first tap of each position reads; with one tap per position, its offset in r.
    int top[kPositions], left[kPositions];
    MASKED_FANOUT_UNROLL
    for (int q = 0; q < kPositions; ++q) {
      const int position = kChannelsInnermost ? outer + (q < rows ? q : rows - 1) : inner + q;
      if (kPointwise) {
        left[q] = position * plan.r_step[2];
      } else {
        top[q] = position / p.out_width * p.stride[0] - p.padding[0];
        left[q] = position % p.out_width * p.stride[1] - p.padding[1];
      }
    }

    for (int variant = first_variant; variant < end_variant; ++variant) {
      float sum[kRows][kVector];
      MASKED_FANOUT_UNROLL
      for (int row = 0; row < kRows; ++row) {
        MASKED_FANOUT_UNROLL
        for (int j = 0; j < kVector; ++j) sum[row][j] = 0.0f;
      }
      const T *r = static_cast<const T *>(p.r) + variant * p.r_stride[0] + image * p.r_stride[1];
      const T *weight = static_cast<const T *>(p.weight) + variant * p.weight_stride[0];
      for (int b = 0; b < p.unit_inputs; ++b) {
        if (kPointwise) {
          add_tap(p, plan, r, weight, channel, top, left, 0, 0, sum);
        } else {
          for (int i = 0; i < p.kernel[0]; ++i) {
            for (int j = 0; j < p.kernel[1]; ++j) {
              add_tap(p, plan, r, weight + i * plan.weight_step[2] + j * plan.weight_step[3],
                      channel, top, left, i * p.dilation[0], j * p.dilation[1], sum);
            }
          }
        }
        r += plan.r_step[0];
        weight += plan.weight_step[1];
      }
      finish(p, variant, channel, scale, shift, z, other, sum);
      T *out = static_cast<T *>(p.out) + variant * p.out_stride_v + start;
      MASKED_FANOUT_UNROLL
      for (int row = 0; row < kRows; ++row) {
        if (row >= rows) break;
        Pack<T, kVector> pack;
        MASKED_FANOUT_UNROLL
        for (int j = 0; j < kVector; ++j) from_float(sum[row][j], &pack.at[j]);
        store<kVector>(out + int64_t(row) * inner_size, pack);
      }
    }
  }

 private:
  MASKED_FANOUT_FN static void add_tap(const Params &p, const Plan &plan, const T *r,
                                       const T *weight, const int (&channel)[kChannels],
                                       const int (&top)[kPositions], const int (&left)[kPositions],
                                       int down, int right, float (&sum)[kRows][kVector]) {
    float weights[kChannels], residual[kPositions];
    load_weights(plan, weight, channel, weights);
    load_residual(p, plan, r, top, left, down, right, residual);
    MASKED_FANOUT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      MASKED_FANOUT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        sum[row][j] += kChannelsInnermost ? residual[row] * weights[j] : weights[row] * residual[j];
      }
    }
  }

  MASKED_FANOUT_FN static void load_weights(const Plan &plan, const T *weight,
                                            const int (&channel)[kChannels],
                                            float (&weights)[kChannels]) {
    if constexpr (kChannelsInnermost) {
      if (plan.weight_vector) {
        const Pack<T, kChannels> pack = load<kChannels>(weight + channel[0]);
        MASKED_FANOUT_UNROLL
        for (int c = 0; c < kChannels; ++c) weights[c] = to_float(pack.at[c]);
        return;
      }
    }
    MASKED_FANOUT_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      weights[c] = load_one(weight + channel[c] * plan.weight_step[0]);
    }
  }

  MASKED_FANOUT_FN static void load_residual(const Params &p, const Plan &plan, const T *r,
                                             const int (&top)[kPositions],
                                             const int (&left)[kPositions], int down, int right,
                                             float (&residual)[kPositions]) {
    if constexpr (!kChannelsInnermost && kPointwise) {
      if (plan.r_vector) {
        const Pack<T, kPositions> pack = load<kPositions>(r + left[0]);
        MASKED_FANOUT_UNROLL
        for (int q = 0; q < kPositions; ++q) residual[q] = to_float(pack.at[q]);
        return;
      }
    }
    MASKED_FANOUT_UNROLL
    for (int q = 0; q < kPositions; ++q) {
      if constexpr (kPointwise) {
        residual[q] = load_one(r + left[q]);
      } else {
        const int y = top[q] + down, x = left[q] + right;
        // As unsigned numbers, coordinates before the image lie far behind it.
        const bool inside =
            unsigned(y) < unsigned(p.in_height) && unsigned(x) < unsigned(p.in_width);
        residual[q] = inside ? load_one(r + (y * plan.r_step[1] + x * plan.r_step[2])) : 0.0f;
      }
    }
  }

  // Turns sums into outputs, in place.
  MASKED_FANOUT_FN static void finish(const Params &p, int variant, const int (&channel)[kChannels],
                                      const float (&scale)[kChannels],
                                      const float (&shift)[kChannels],
                                      const Pack<T, kVector> (&z)[kRows],
                                      const Pack<T, kVector> (&other)[kRows],
                                      float (&sum)[kRows][kVector]) {
    float constant[kChannels];
    MASKED_FANOUT_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      constant[c] = p.constant != nullptr
                        ? load_one(p.constant + int64_t(variant) * p.channels + channel[c])
                        : 0.0f;
    }
    MASKED_FANOUT_UNROLL
    for (int row = 0; row < kRows; ++row) {
      MASKED_FANOUT_UNROLL
      for (int j = 0; j < kVector; ++j) {
        const int c = kChannelsInnermost ? j : row;
        float y = to_float(z[row].at[j]) - sum[row][j] + constant[c];
        y = scale[c] * y + shift[c];
        if (p.other != nullptr) y += to_float(other[row].at[j]);
        sum[row][j] = activate(y, p.activation, p.low, p.high);
      }
    }
  }
};

// What one thread of a grid does. It goes on beyond the grid, so any grid is right and its size is a
// matter of speed alone. Tiles are those of one variant; chunks are variants that share a thread.
template <typename Tile>
MASKED_FANOUT_FN void walk(const Params &p, const Plan &plan, int variants_per_tile,
                           uint32_t first_tile, uint32_t tile_step, int first_chunk,
                           int chunk_step) {
  const int chunks = (p.variants - 1) / variants_per_tile + 1;
  for (int chunk = first_chunk; chunk < chunks; chunk += chunk_step) {
    const int first = chunk * variants_per_tile;
    const int end =
        p.variants - first < variants_per_tile ? p.variants : first + variants_per_tile;
    for (uint32_t tile = first_tile; tile < plan.tiles; tile += tile_step) {
      Tile::run(p, plan, tile, first, end);
    }
  }
}

// ---- From the plan to the tile that serves it -------------------------------------------------

// Calls run.template with<Tile<...>>() for the one that fits; the .cu and the host build share it.
template <typename T, bool kChannelsInnermost, bool kPointwise, typename Run>
int with_vector(const Plan &plan, Run &&run) {
  constexpr int kWidest = 16 / int(sizeof(T));
  if (plan.vector == kWidest) {
    return run.template with<Tile<T, kChannelsInnermost, kPointwise, kWidest>>();
  }
  if constexpr (kWidest != 4) {
    if (plan.vector == 4) return run.template with<Tile<T, kChannelsInnermost, kPointwise, 4>>();
  }
  return run.template with<Tile<T, kChannelsInnermost, kPointwise, 1>>();
}

template <typename T, typename Run>
int with_layout(const Params &p, const Plan &plan, Run &&run) {
  if (p.channels_innermost) {
    return plan.pointwise ? with_vector<T, true, true>(plan, run)
                          : with_vector<T, true, false>(plan, run);
  }
  return plan.pointwise ? with_vector<T, false, true>(plan, run)
                        : with_vector<T, false, false>(plan, run);
}

template <typename Run>
int dispatch(const Params &p, const Plan &plan, Run &&run) {
  switch (p.dtype) {
    case MASKED_FANOUT_F32:
      return with_layout<float>(p, plan, run);
    case MASKED_FANOUT_F16:
      return with_layout<Half>(p, plan, run);
    default:
      return with_layout<BFloat16>(p, plan, run);
  }
}

// How many variants one thread serves: each reads z once for all of them, but a device must not
// run short of threads.
inline int variants_per_tile(const Params &p, int64_t blocks_of_one_variant,
                             int64_t enough_blocks) {
  if (p.variants_per_tile > 0) return p.variants_per_tile;
  int chosen = 16;
  while (chosen > 1 &&
         blocks_of_one_variant * ((p.variants + chosen - 1) / chosen) < enough_blocks) {
    chosen /= 2;
  }
  return chosen;
}

}  // namespace masked_fanout
