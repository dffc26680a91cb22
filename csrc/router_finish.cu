// The second launch of a lean forward call: adds up what the router's blocks wrote, each in its own row of p.part.
//
// On sm_90 and later it is launched beside the router (programmatic dependent launch) and waits for it on the device, so that
// its launch costs no time of its own. The order of the additions is fixed: the same bits in every run.

#include "router_args.cuh"

namespace moe_layer::router {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// One warp a counter: events 0 to 5 and the sum of z.
__device__ void finish_scalars(const Forward& p, int parts) {
  const int which = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (which < 6) {
    int sum = 0;
    for (int b = lane; b < parts; b += kWarp) sum += __ldcg(part_row(p, b).events + which);
    sum = static_cast<int>(__reduce_add_sync(kFull, static_cast<unsigned>(sum)));
    if (lane == 0) p.events[which] = sum;
  } else if (which == 6 && p.want_z) {
    double sum = 0.0;
    for (int b = lane; b < parts; b += kWarp) sum += __ldcg(part_row(p, b).z);
    for (int o = kWarp / 2; o > 0; o >>= 1) sum += __shfl_xor_sync(kFull, sum, o);
    if (lane == 0) static_cast<float*>(p.z_sum)[0] = static_cast<float>(sum);
  } else if (which == 7 && lane < 2) {
    p.events[6 + lane] = 0;
  }
}

// Blocks take 32 experts each, a warp every eighth part; one more block takes the scalars.
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Forward p, int parts) {
  __shared__ int counts[kWarps][kWarp], aux_counts[kWarps][kWarp];
  __shared__ double sums[kWarps][kWarp];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // the losses' kernel may get ready
  cudaGridDependencySynchronize();
#endif
  if (blockIdx.x == gridDim.x - 1) return finish_scalars(p, parts);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, e = blockIdx.x * kWarp + lane;
  int count = 0, aux = 0;
  double sum = 0.0;
  if (e < p.experts) {
#pragma unroll 4
    for (int b = warp; b < parts; b += kWarps) {
      const PartRow part = part_row(p, b);
      count += __ldcg(part.counts + e);
      if (p.live_apart) aux += __ldcg(part.aux_counts + e);
      if (p.aux != kNoAux) sum += static_cast<double>(__ldcg(part.score_sum + e));
    }
  }
  counts[warp][lane] = count, aux_counts[warp][lane] = aux, sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || e >= p.experts) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) count += counts[w][lane], aux += aux_counts[w][lane], sum += sums[w][lane];
  p.counts[e] = count;
  if (p.aux == kNoAux) return;
  p.aux_counts[e] = p.live_apart ? aux : count;
  static_cast<float*>(p.score_sum)[e] = static_cast<float>(sum);
}

}  // namespace

void launch_finish(const Forward& args, int parts, cudaStream_t stream) {
  launch_beside(finish_kernel, ceil_div(args.experts, kWarp) + 1, kThreads, stream, args, parts);
}

}  // namespace moe_layer::router
