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

// The same through fp8, in units of 8 columns: `load(unit)` reads this lane's two units of a step, `convert` makes rows of
// them; the next ones are on their way meanwhile. `begin` and `end` are multiples of 16.
template <typename Load, typename Convert>
__device__ __forceinline__ void convert_row(
    int32_t mine, void* out, int begin, int end, int64_t units, Load&& load, Convert&& convert) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kSteps = 2;
  const unsigned targets = __ballot_sync(kAll, mine >= 0);
  decltype(load(0)) next[kSteps];
#pragma unroll
  for (int j = 0; j < kSteps; ++j) next[j] = load(fp8_unit(begin + j * kFp8Step));
  for (; begin < end; begin += kSteps * kFp8Step) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      if (begin + j * kFp8Step >= end) break;
      const int unit = fp8_unit(begin + j * kFp8Step);
      uint4 value[2];
      convert(next[j], value);
      next[j] = load(unit + kSteps * kFp8Step);
      for (unsigned left = targets; left != 0; left &= left - 1) {
        uint4* to = static_cast<uint4*>(out) + __shfl_sync(kAll, mine, __ffs(left) - 1) * units;
        if (unit < end) to[unit] = value[0], to[unit + 8] = value[1];
      }
    }
  }
}

struct PlainPair {
  uint4 x[2];
};

// The own rows take the roundings of those that travelled.
__device__ __forceinline__ void round_row(
    const uint8_t* row, int32_t mine, void* out, int begin, int end, int64_t units) {
  const uint4* from = reinterpret_cast<const uint4*>(row);
  convert_row(
      mine, out, begin, end, units,
      [&](int unit) { return unit < end ? PlainPair{{__ldcg(from + unit), __ldcg(from + unit + 8)}} : PlainPair{}; },
      [](const PlainPair& pair, uint4(&value)[2]) {
        const Fp8Pair coded = fp8_encode(pair.x[0], pair.x[1]);
        value[0] = fp8_decode(coded.values[0], coded.scale);
        value[1] = fp8_decode(coded.values[1], coded.scale);
      });
}

__device__ __forceinline__ void decode_row(
    const uint8_t* row, int32_t mine, void* out, int begin, int end, int64_t units) {
  const uint2* values = reinterpret_cast<const uint2*>(row);
  const float* scales = reinterpret_cast<const float*>(row + units * 8);
  convert_row(
      mine, out, begin, end, units,
      [&](int unit) {
        return unit < end ? Fp8Pair{{__ldcg(values + unit), __ldcg(values + unit + 8)}, __ldcg(scales + unit / 16)}
                          : Fp8Pair{};
      },
      [](const Fp8Pair& coded, uint4(&value)[2]) {
        value[0] = fp8_decode(coded.values[0], coded.scale);
        value[1] = fp8_decode(coded.values[1], coded.scale);
      });
}

}  // namespace moe_layer
