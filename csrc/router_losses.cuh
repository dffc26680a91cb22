// The last step of the losses.
#pragma once

#include "router_args.cuh"

namespace moe_layer::router {

__device__ __forceinline__ double warp_sum(double v) {
  for (int o = kWarp / 2; o > 0; o >>= 1) v += __shfl_xor_sync(kFull, v, o);
  return v;
}

// Writes summary and scaled losses. One warp calls it; every lane has the sums: of the counts, of the aux counts, of aux count
// times score sum over the experts, of z. `real` false runs the instructions and stores nothing.
__device__ __forceinline__ void write_losses(
    const Losses& p, double slots, double aux_slots, double product, double z_sum, bool real) {
  const int lane = threadIdx.x % kWarp;
  const unsigned k = static_cast<unsigned>(p.top_k);
  const double tokens = slots < 4294967296.0 ? static_cast<double>(static_cast<unsigned>(slots) / k) : floor(slots / k);
  const double divisor = tokens > 1.0 ? tokens : 1.0;
  const bool has_aux = p.aux_counts != nullptr, has_z = p.z_sum != nullptr;
  // Lane 0 divides for the aux loss while lane 1 divides for z, and in fp32: doubles take several hundred cycles.
  const float above = static_cast<float>(lane == 0 ? p.experts * product : z_sum);
  const float below = static_cast<float>(lane == 0 ? (aux_slots > 1.0 ? aux_slots : 1.0) * divisor : divisor);
  const bool present = lane == 0 ? has_aux : lane == 1 && has_z;
  const float loss = present ? above / below : 0.0f;
  if (real && lane < 5) p.summary[lane] = lane == 2 ? 1.0f : lane == 3 ? static_cast<float>(tokens) : loss;
  if (real && present) p.scaled[lane == 1 && has_aux ? 1 : 0] = loss * (lane == 0 ? p.aux_coeff : p.z_coeff);
}

}  // namespace moe_layer::router
