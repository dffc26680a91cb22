// Where the lean kernel's rows of logits stand.
#pragma once

#include "router_fwd_outputs.cuh"

namespace moe_layer::router {

template <bool WIDE>
__device__ __forceinline__ float load_logit(const FloatArray& a, int64_t i) {
  if constexpr (WIDE) {
    return __ldg(static_cast<const float*>(a.data) + i);
  } else {
    const uint16_t bits = __ldg(static_cast<const uint16_t*>(a.data) + i);
    return a.kind == kBF16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16) : __half2float(__ushort_as_half(bits));
  }
}

// In global memory, as the caller gave them.
template <bool W>
struct GlobalRows {
  static constexpr bool kWide = W, kGlobal = true;  // fp32, not bf16 or fp16; worth a prefetch
  const Forward& p;

  // A few rows counted from the first of them, so that an index takes 32 bits.
  struct Near {
    const void* data;
    int kind, experts;

    __device__ __forceinline__ float at(int row, int expert) const {
      return load_logit<W>({data, kind}, row * experts + expert);
    }

    // A lane's chunks of a row, `kPad` where there is no expert or no row.
    template <int L, int C>
    __device__ __forceinline__ void load(int row, bool live, int gl, float (&x)[C * 8]) const {
      if constexpr (W) {
        load_vectors<kF32, L, C>(data, row, live, experts, gl, kPad, x);
      } else if (kind == kBF16) {
        load_vectors<kBF16, L, C>(data, row, live, experts, gl, kPad, x);
      } else {
        load_vectors<kF16, L, C>(data, row, live, experts, gl, kPad, x);
      }
    }
  };

  __device__ __forceinline__ Near from(int64_t row) const {
    const void* data = static_cast<const char*>(p.logits.data) + row * p.experts * (W ? 4 : 2);
    asm volatile("" : "+l"(data));  // kept, not worked out again for every row
    return {data, p.logits.kind, p.experts};
  }

  __device__ __forceinline__ float at(int64_t row, int expert) const {
    return load_logit<W>(p.logits, row * p.experts + expert);
  }
};

}  // namespace moe_layer::router
