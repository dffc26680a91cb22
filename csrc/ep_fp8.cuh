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
  uint8_t bytes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = to_float(x[i]);
    const float quotient = __fdiv_rn(value, out.scale);
    bytes[i] = isfinite(value) ? __nv_cvt_float_to_fp8(quotient, __NV_SATFINITE, __NV_E4M3) : 0x7F;
  }
  out.values.x = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
  out.values.y = bytes[4] | bytes[5] << 8 | bytes[6] << 16 | static_cast<uint32_t>(bytes[7]) << 24;
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
