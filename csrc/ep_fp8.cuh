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

// value / scale, correctly rounded; NaN where the value is not finite, which every conversion makes 0x7F. `inverse` is
// 1 / scale rounded; two steps of Newton from it are exact (as in __fdiv_rn, whose checks of the operands' exponents, made
// here once a block, cost more than the division) unless the scale is extreme, which `plain` denies.
__device__ __forceinline__ float fp8_quotient(float value, float scale, float inverse, bool plain) {
  if (!isfinite(value)) return __int_as_float(0x7FFFFFFF);
  if (!plain) return __fdiv_rn(value, scale);
  float quotient = __fmul_rn(value, inverse);
  quotient = __fmaf_rn(__fmaf_rn(-quotient, scale, value), inverse, quotient);
  return __fmaf_rn(__fmaf_rn(-quotient, scale, value), inverse, quotient);
}

// The whole warp calls it; lanes without columns pass zeros.
__device__ __forceinline__ Fp8Unit fp8_encode(const uint4& bf16) {
  const __nv_bfloat16* x = reinterpret_cast<const __nv_bfloat16*>(&bf16);
  float peak = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = fabsf(to_float(x[i]));
    if (isfinite(value)) peak = fmaxf(peak, value);
  }
#pragma unroll
  for (int step = 1; step < 16; step *= 2) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, step));
  Fp8Unit out;
  out.scale = fmaxf(__fdiv_rn(peak, 448.0f), 1.17549435e-38f);
  const float inverse = __frcp_rn(out.scale);
  const bool plain = out.scale > 0x1p-100f && out.scale < 0x1p100f;
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    float2 quotient;
    quotient.x = fp8_quotient(to_float(x[i]), out.scale, inverse, plain);
    quotient.y = fp8_quotient(to_float(x[i + 1]), out.scale, inverse, plain);
    words[i / 4] |= static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(quotient, __NV_SATFINITE, __NV_E4M3))
                    << (8 * (i % 4));
  }
  out.values = {words[0], words[1]};
  return out;
}

__device__ __forceinline__ uint4 fp8_decode(const Fp8Unit& in) {
  uint4 out;
  __nv_bfloat16* x = reinterpret_cast<__nv_bfloat16*>(&out);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t word = i < 4 ? in.values.x : in.values.y;
    const __half_raw half = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(word >> (8 * (i % 4))), __NV_E4M3);
    x[i] = __float2bfloat16_rn(__fmul_rn(__half2float(__half(half)), in.scale));
  }
  return out;
}

}  // namespace moe_layer
