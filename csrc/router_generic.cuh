// Block-wide helpers of the general router kernels: one block owns one row; A is float, or double for fp64 logits.
#pragma once

#include "router_args.cuh"

namespace moe_layer::router {

constexpr int kGenericThreads = 256;
constexpr int kGenericWarps = kGenericThreads / kWarp;

__device__ __forceinline__ uint64_t ordered(double v) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(v + 0.0));
  return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | (1ull << 63));
}

__device__ __forceinline__ double unordered(uint64_t v) {
  return __longlong_as_double(static_cast<long long>(v >> 63 ? v ^ (1ull << 63) : ~v));
}

__device__ __forceinline__ bool is_finite(double v) { return fabs(v) < INFINITY; }

// All threads get the sum (or maximum) of `v`, in an order that only depends on the block's shape.
template <bool MAX>
__device__ __forceinline__ double block_reduce(double v) {
  __shared__ double parts[kGenericWarps];
  for (int o = kWarp / 2; o > 0; o >>= 1) {
    const double other = __shfl_xor_sync(kFull, v, o);
    v = MAX ? fmax(v, other) : v + other;
  }
  __syncthreads();  // the previous result has been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = parts[0];
  for (int w = 1; w < kGenericWarps; ++w) v = MAX ? fmax(v, parts[w]) : v + parts[w];
  return v;
}

__device__ __forceinline__ double block_sum(double v) { return block_reduce<false>(v); }
__device__ __forceinline__ double block_max(double v) { return block_reduce<true>(v); }

template <typename A>
__device__ __forceinline__ A exp_as(A v) {
  if constexpr (std::is_same_v<A, double>) {
    return exp(v);
  } else {
    return expf(v);
  }
}

template <typename A>
__device__ __forceinline__ void store_as(void* data, int kind, int64_t i, A v) {
  if (kind == kF64) {
    static_cast<double*>(data)[i] = static_cast<double>(v);
  } else {
    store_float(data, kind, i, static_cast<float>(v));
  }
}

}  // namespace moe_layer::router
