// Rows of e4m3 values with an fp32 scale per 128 columns, a warp at a time: lane u of a step holds 8 columns, 16 lanes a
// block. Twin of moe_layer/ops/fp8_rows.py; a row on the wire is its values, its scales, zeros up to 16 bytes.
#pragma once

#include <cuda_fp8.h>

#include "common.cuh"

namespace moe_layer {

struct Fp8Unit {
  uint2 values;  // 8 e4m3
  float scale;   // of their block
};

// value / scale, correctly rounded, for a scale whose rounded inverse is given and which is neither very small nor very
// large: the remainder of the first guess is exact, and one step from it too (what __fdiv_rn does besides is to look at
// the operands' exponents, which costs more than the division). NaN where the value is not finite.
__device__ __forceinline__ float plain_quotient(float value, float scale, float inverse) {
  const float guess = __fmul_rn(value, inverse);
  return __fmaf_rn(__fmaf_rn(-guess, scale, value), inverse, guess);
}

// Two conversions that make NaN 0x7F and saturate.
__device__ __forceinline__ uint32_t to_e4m3(float low, float high) {
  return __nv_cvt_float2_to_fp8x2({low, high}, __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ float low_half(uint32_t bf16x2) { return __uint_as_float(bf16x2 << 16); }
__device__ __forceinline__ float high_half(uint32_t bf16x2) { return __uint_as_float(bf16x2 & 0xFFFF0000u); }

// The whole warp calls it; lanes without columns pass zeros.
__device__ __forceinline__ Fp8Unit fp8_encode(const uint4& bf16) {
  const uint32_t x[4] = {bf16.x, bf16.y, bf16.z, bf16.w};
  // Magnitudes of bf16 compare as integers do; what is not finite (rare) does not count.
  constexpr uint32_t kInfinite = 0x7F80;
  uint32_t both = 0, peak = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) both = __vmaxu2(both, x[i] & 0x7FFF7FFFu);
  peak = max(both & 0xFFFFu, both >> 16);
  if (peak >= kInfinite) {
    peak = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = x[i] & 0x7FFFu, high = x[i] >> 16 & 0x7FFFu;
      peak = max(peak, max(low < kInfinite ? low : 0u, high < kInfinite ? high : 0u));
    }
  }
#pragma unroll
  for (int step = 1; step < 16; step *= 2) peak = max(peak, __shfl_xor_sync(0xffffffffu, peak, step));
  Fp8Unit out;
  out.scale = fmaxf(__fdiv_rn(low_half(peak), 448.0f), 1.17549435e-38f);
  uint32_t coded[4];
  if (out.scale > 0x1p-100f && out.scale < 0x1p100f) {
    const float inverse = __frcp_rn(out.scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      coded[i] = to_e4m3(
          plain_quotient(low_half(x[i]), out.scale, inverse), plain_quotient(high_half(x[i]), out.scale, inverse));
    }
  } else {
    const auto divide = [&](float value) {
      return isfinite(value) ? __fdiv_rn(value, out.scale) : __int_as_float(0x7FFFFFFF);
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) coded[i] = to_e4m3(divide(low_half(x[i])), divide(high_half(x[i])));
  }
  out.values = {coded[0] | coded[1] << 16, coded[2] | coded[3] << 16};
  return out;
}

__device__ __forceinline__ uint4 fp8_decode(const Fp8Unit& in) {
  uint32_t x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = i < 2 ? in.values.x : in.values.y;
    const auto pair = static_cast<__nv_fp8x2_storage_t>(word >> (16 * (i % 2)));
    const float2 value = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(__fmul_rn(value.x, in.scale), __fmul_rn(value.y, in.scale));
    x[i] = *reinterpret_cast<const uint32_t*>(&rounded);
  }
  return {x[0], x[1], x[2], x[3]};
}

// A warp encodes a row of bf16 units and writes it where it goes; the next units are on their way meanwhile.
__device__ __forceinline__ void fp8_encode_row(const uint4* from, uint8_t* to, int64_t units) {
  constexpr int kFp8Ahead = 4;
  const int lane = threadIdx.x % kWarp, end = static_cast<int>(units);
  float* scales = reinterpret_cast<float*>(to + units * 8);
  uint4 next[kFp8Ahead];
#pragma unroll
  for (int j = 0; j < kFp8Ahead; ++j) next[j] = j * kWarp + lane < end ? from[j * kWarp + lane] : uint4{};
  for (int begin = lane; begin - lane < end; begin += kWarp * kFp8Ahead) {
#pragma unroll
    for (int j = 0; j < kFp8Ahead; ++j) {
      const int unit = begin + j * kWarp, ahead = unit + kFp8Ahead * kWarp;
      const uint4 x = next[j];
      next[j] = ahead < end ? from[ahead] : uint4{};
      const Fp8Unit coded = fp8_encode(x);
      if (unit < end) {
        reinterpret_cast<uint2*>(to)[unit] = coded.values;
        if (lane % 16 == 0) scales[unit / 16] = coded.scale;
      }
    }
  }
}

}  // namespace moe_layer
