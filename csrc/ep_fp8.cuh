// Rows of e4m3 values with an fp32 scale per 128 columns, a warp at a time. A unit is 8 columns; in a step of 64 units a
// lane holds two of one block, of which eight lanes hold all. Twin of moe_layer/ops/fp8_rows.py; a row on the wire is its
// values, its scales, zeros up to 16 bytes.
#pragma once

#include <cuda_fp8.h>

#include "common.cuh"

namespace moe_layer {

constexpr int kFp8Step = 2 * kWarp;  // units

// This lane's first unit of a step that begins with unit `base`, a multiple of 16; the second is 8 further.
__device__ __forceinline__ int fp8_unit(int base) {
  const int lane = threadIdx.x % kWarp;
  return base + lane / 8 * 16 + lane % 8;
}

struct Fp8Pair {
  uint2 values[2];  // 8 e4m3 each
  float scale;      // of their block
};

// value / scale, correctly rounded, for a scale whose rounded inverse is given and which is neither very small nor very
// large: the remainder of the first guess is exact, and one step from it too (what __fdiv_rn does besides is to look at
// the operands' exponents, which costs more than the division). NaN where the value is not finite. That this, the scale
// and its inverse below are right was tried for all mantissas that bf16 has, and any first guess of the inverse in one
// unit of its last place.
__device__ __forceinline__ float plain_quotient(float value, float scale, float inverse) {
  const float guess = __fmul_rn(value, inverse);
  return __fmaf_rn(-__fmaf_rn(guess, scale, -value), inverse, guess);  // in this order -0 stays -0
}

__device__ __forceinline__ float plain_inverse(float value) {
  float guess;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(value));
  return __fmaf_rn(guess, __fmaf_rn(-value, guess, 1.0f), guess);
}

// Two conversions that make NaN 0x7F and saturate.
__device__ __forceinline__ uint32_t to_e4m3(float low, float high) {
  return __nv_cvt_float2_to_fp8x2({low, high}, __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ float low_half(uint32_t bf16x2) { return __uint_as_float(bf16x2 << 16); }
__device__ __forceinline__ float high_half(uint32_t bf16x2) { return __uint_as_float(bf16x2 & 0xFFFF0000u); }

// The largest finite magnitude, as bf16 bits: magnitudes of bf16 compare as integers do.
__device__ __forceinline__ uint32_t fp8_peak(const uint32_t (&x)[8]) {
  constexpr uint32_t kInfinite = 0x7F80;
  uint32_t both = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) both = __vmaxu2(both, x[i] & 0x7FFF7FFFu);
  uint32_t peak = max(both & 0xFFFFu, both >> 16);
  if (peak < kInfinite) return peak;
  peak = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t low = x[i] & 0x7FFFu, high = x[i] >> 16 & 0x7FFFu;
    peak = max(peak, max(low < kInfinite ? low : 0u, high < kInfinite ? high : 0u));
  }
  return peak;
}

// Two values for any scale; rare, and so in one place.
static __device__ __noinline__ uint32_t divide_exactly(uint32_t bf16x2, float scale) {
  const auto divide = [&](float value) {
    return isfinite(value) ? __fdiv_rn(value, scale) : __int_as_float(0x7FFFFFFF);
  };
  return to_e4m3(divide(low_half(bf16x2)), divide(high_half(bf16x2)));
}

// The whole warp calls it; lanes without columns pass zeros.
__device__ __forceinline__ Fp8Pair fp8_encode(const uint4& first, const uint4& second) {
  const uint32_t x[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
  uint32_t peak = fp8_peak(x);
#pragma unroll
  for (int step = 1; step < 8; step *= 2) peak = max(peak, __shfl_xor_sync(0xffffffffu, peak, step));
  const float largest = low_half(peak);
  Fp8Pair out;
  uint32_t coded[8];
  const bool zeros = largest == 0.0f;
  if (zeros || (largest > 0x1p-90f && largest < 0x1p90f)) {
    out.scale = zeros ? 0x1p-126f : plain_quotient(largest, 448.0f, 1.0f / 448.0f);
    const float inverse = zeros ? 1.0f : plain_inverse(out.scale);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      coded[i] = to_e4m3(
          plain_quotient(low_half(x[i]), out.scale, inverse), plain_quotient(high_half(x[i]), out.scale, inverse));
    }
  } else {
    out.scale = fmaxf(__fdiv_rn(largest, 448.0f), 0x1p-126f);
#pragma unroll
    for (int i = 0; i < 8; ++i) coded[i] = divide_exactly(x[i], out.scale);
  }
  out.values[0] = {coded[0] | coded[1] << 16, coded[2] | coded[3] << 16};
  out.values[1] = {coded[4] | coded[5] << 16, coded[6] | coded[7] << 16};
  return out;
}

__device__ __forceinline__ uint4 fp8_decode(const uint2& values, float scale) {
  uint32_t x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = i < 2 ? values.x : values.y;
    const auto pair = static_cast<__nv_fp8x2_storage_t>(word >> (16 * (i % 2)));
    const float2 value = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(__fmul_rn(value.x, scale), __fmul_rn(value.y, scale));
    x[i] = *reinterpret_cast<const uint32_t*>(&rounded);
  }
  return {x[0], x[1], x[2], x[3]};
}

// A warp encodes a row of bf16 units and writes it where it goes; the next units are on their way meanwhile.
__device__ __forceinline__ void fp8_encode_row(const uint4* from, uint8_t* to, int64_t units) {
  constexpr int kSteps = 2;
  const int end = static_cast<int>(units);
  float* scales = reinterpret_cast<float*>(to + units * 8);
  uint4 next[kSteps][2];
  const auto load = [&](uint4(&pair)[2], int unit) {
    pair[0] = unit < end ? from[unit] : uint4{};
    pair[1] = unit < end ? from[unit + 8] : uint4{};
  };
#pragma unroll
  for (int j = 0; j < kSteps; ++j) load(next[j], fp8_unit(j * kFp8Step));
  for (int base = 0; base < end; base += kSteps * kFp8Step) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      if (base + j * kFp8Step >= end) break;
      const int unit = fp8_unit(base + j * kFp8Step);
      const Fp8Pair coded = fp8_encode(next[j][0], next[j][1]);
      load(next[j], unit + kSteps * kFp8Step);
      if (unit < end) {
        reinterpret_cast<uint2*>(to)[unit] = coded.values[0];
        reinterpret_cast<uint2*>(to)[unit + 8] = coded.values[1];
        if (threadIdx.x % 8 == 0) scales[unit / 16] = coded.scale;
      }
    }
  }
}

}  // namespace moe_layer
