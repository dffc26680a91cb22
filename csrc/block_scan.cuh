// Prefix sums of one value a thread, over a warp and over a block.
#pragma once

#include "common.cuh"

namespace moe_layer {

// Sum of the values of this lane and those below it. All lanes of the warp call it.
__device__ __forceinline__ int warp_inclusive_sum(int value) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, value, step);
    if (static_cast<int>(threadIdx.x) % kWarp >= step) value += other;
  }
  return value;
}

// Sum of the values of the block's threads below this one. All THREADS threads of the block call it; `warp_sums` is shared memory of
// THREADS / 32 ints, which may be used again after the next __syncthreads().
template <int THREADS>
__device__ __forceinline__ int block_exclusive_sum(int value, int* warp_sums) {
  static_assert(THREADS % kWarp == 0 && THREADS <= kWarp * kWarp, "one warp adds up the warps");
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int inclusive = warp_inclusive_sum(value);
  if (lane == kWarp - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const int total = warp_inclusive_sum(lane < THREADS / kWarp ? warp_sums[lane] : 0);
    if (lane < THREADS / kWarp) warp_sums[lane] = total;
  }
  __syncthreads();
  return inclusive - value + (warp > 0 ? warp_sums[warp - 1] : 0);
}

}  // namespace moe_layer
