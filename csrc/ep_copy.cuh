// A warp copies an arrived row to the rows of its experts, as it is or decoded. Used by ep_take.cu.
#pragma once

#include "ep.cuh"
#include "ep_fp8.cuh"

namespace moe_layer {

// A warp copies the units [begin, end) of a row to lane k's `mine`, for all k where that is a row. `begin` is a multiple of
// kWarp; `units` has the whole row.
template <typename Unit>
__device__ __forceinline__ void copy_row(
    const uint8_t* row, int32_t mine, void* out, int begin, int end, int64_t units) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kAhead = 8;
  const int lane = threadIdx.x % kWarp;
  const Unit* from = reinterpret_cast<const Unit*>(row);
  const unsigned targets = __ballot_sync(kAll, mine >= 0);
  for (; begin < end; begin += kWarp * kAhead) {
    Unit values[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int column = begin + j * kWarp + lane;
      values[j] = column < end ? __ldcg(from + column) : Unit{};
    }
    for (unsigned left = targets; left != 0; left &= left - 1) {
      Unit* to = static_cast<Unit*>(out) + __shfl_sync(kAll, mine, __ffs(left) - 1) * units;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int column = begin + j * kWarp + lane;
        if (column < end) to[column] = values[j];
      }
    }
  }
}

// The same with units that `load(unit)` reads and `convert` makes rows of: the next ones are on their way meanwhile.
template <typename Load, typename Convert>
__device__ __forceinline__ void convert_row(
    int32_t mine, void* out, int begin, int end, int64_t units, Load&& load, Convert&& convert) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kDepth = 4;
  const int lane = threadIdx.x % kWarp;
  const unsigned targets = __ballot_sync(kAll, mine >= 0);
  decltype(load(0)) next[kDepth];
#pragma unroll
  for (int j = 0; j < kDepth; ++j) next[j] = load(begin + j * kWarp + lane);
  for (; begin < end; begin += kWarp * kDepth) {
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      const int unit = begin + j * kWarp + lane;
      const auto raw = next[j];
      next[j] = load(unit + kDepth * kWarp);
      const uint4 value = convert(raw);
      for (unsigned left = targets; left != 0; left &= left - 1) {
        const int64_t to = __shfl_sync(kAll, mine, __ffs(left) - 1) * units;
        if (unit < end) static_cast<uint4*>(out)[to + unit] = value;
      }
    }
  }
}

// fp8: the own rows take the roundings of those that travelled.
__device__ __forceinline__ void round_row(
    const uint8_t* row, int32_t mine, void* out, int begin, int end, int64_t units) {
  const uint4* from = reinterpret_cast<const uint4*>(row);
  convert_row(
      mine, out, begin, end, units, [&](int unit) { return unit < end ? __ldcg(from + unit) : uint4{}; },
      [](const uint4& x) { return fp8_decode(fp8_encode(x)); });
}

__device__ __forceinline__ void decode_row(
    const uint8_t* row, int32_t mine, void* out, int begin, int end, int64_t units) {
  const uint2* values = reinterpret_cast<const uint2*>(row);
  const float* scales = reinterpret_cast<const float*>(row + units * 8);
  convert_row(
      mine, out, begin, end, units,
      [&](int unit) { return unit < end ? Fp8Unit{__ldcg(values + unit), __ldcg(scales + unit / 16)} : Fp8Unit{}; },
      [](const Fp8Unit& coded) { return fp8_decode(coded); });
}

}  // namespace moe_layer
