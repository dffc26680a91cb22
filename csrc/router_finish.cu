// The second launch of a lean forward call: adds up what the router's blocks wrote, each in its own row of p.part.
//
// On sm_90 and later it is launched beside the router (programmatic dependent launch) and waits for it on the device, so that
// its launch costs no time of its own. The order of the additions is fixed: the same bits in every run. It is rehearsed while it waits.

#include "router_args.cuh"

namespace moe_layer::router {
namespace {

constexpr int kThreads = 512;
constexpr int kAtOnce = 9;  // parts whose loads a thread has on their way: 16 warps take the 132 of an H200 in one go
constexpr int kWarps = kThreads / kWarp;

// Events 0 to 5 and the sum of z: a thread a part, so that all parts are fetched at once.
__device__ __forceinline__ void finish_scalars(const Forward& p, int parts, bool real) {
  __shared__ int events[kWarps][6];
  __shared__ double z_sums[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int2 pair[3] = {};
  double z = 0.0;
#pragma unroll 1
  for (int b = threadIdx.x; b < parts; b += kThreads) {
    const PartRow part = part_row(p, b);
    const int2* from = reinterpret_cast<const int2*>(part.events);
    int2 more[3] = {};
    double more_z = 0.0;
    if (real) more[0] = __ldcg(from), more[1] = __ldcg(from + 1), more[2] = __ldcg(from + 2), more_z = __ldcg(part.z);
    for (int k = 0; k < 3; ++k) pair[k].x += more[k].x, pair[k].y += more[k].y;
    z += more_z;
  }
  for (int o = kWarp / 2; o > 0; o >>= 1) z += __shfl_xor_sync(kFull, z, o);
  for (int k = 0; k < 3; ++k) {
    const int x = static_cast<int>(__reduce_add_sync(kFull, static_cast<unsigned>(pair[k].x)));
    const int y = static_cast<int>(__reduce_add_sync(kFull, static_cast<unsigned>(pair[k].y)));
    if (lane == 0) events[warp][2 * k] = x, events[warp][2 * k + 1] = y;
  }
  if (lane == 0) z_sums[warp] = z;
  __syncthreads();
  if (threadIdx.x < 8) {
    int sum = 0;
    for (int w = 0; w < kWarps && threadIdx.x < 6; ++w) sum += events[w][threadIdx.x];
    if (real) p.events[threadIdx.x] = sum;
  } else if (threadIdx.x == kWarp) {
    z = 0.0;
    for (int w = 0; w < kWarps; ++w) z += z_sums[w];
    if (real && p.want_z) static_cast<float*>(p.z_sum)[0] = static_cast<float>(z);
  }
  __syncthreads();  // the shared memory has been read
}

// Blocks take 32 experts each, a warp every eighth part; one more block takes the scalars.
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Forward p, int parts) {
  __shared__ int counts[kWarps][kWarp], aux_counts[kWarps][kWarp];
  __shared__ double sums[kWarps][kWarp];
  start_next_kernel();  // the losses' kernel may get ready
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, e = blockIdx.x * kWarp + lane;
  rehearse([&](bool real) {
    if (blockIdx.x == gridDim.x - 1) return finish_scalars(p, parts, real);
    int count = 0, aux = 0;
    double sum = 0.0;
    const int words = part_words(p), apart = p.live_apart ? p.experts : 0;
    for (int first = warp; first < parts; first += kWarps * kAtOnce) {
      const int32_t* from = reinterpret_cast<const int32_t*>(p.part) + static_cast<int64_t>(first) * words + e;
      int counted[kAtOnce], counted_aux[kAtOnce], scores[kAtOnce];
      bool here[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        here[i] = real && e < p.experts && first + i * kWarps < parts;
        const int32_t* at = from + i * kWarps * words;
        counted[i] = counted_aux[i] = scores[i] = 0;
        if (here[i]) counted[i] = __ldcg(at);
        if (here[i] && p.aux != kNoAux) scores[i] = __ldcg(at + p.experts + apart);
        if (here[i] && apart != 0) counted_aux[i] = __ldcg(at + apart);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) count += counted[i], aux += counted_aux[i];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += static_cast<double>(__int_as_float(scores[i]));
    }
    counts[warp][lane] = count, aux_counts[warp][lane] = aux, sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int w = 1; w < kWarps; ++w) count += counts[w][lane], aux += aux_counts[w][lane], sum += sums[w][lane];
      if (real && e < p.experts) {
        p.counts[e] = count;
        if (p.aux != kNoAux) {
          p.aux_counts[e] = p.live_apart ? aux : count;
          static_cast<float*>(p.score_sum)[e] = static_cast<float>(sum);
        }
      }
    }
    __syncthreads();  // the shared memory has been read
  });
}

}  // namespace

void launch_finish(const Forward& args, int parts, cudaStream_t stream) {
  launch_beside(finish_kernel, ceil_div(args.experts, kWarp) + 1, kThreads, 0, stream, args, parts);
}

}  // namespace moe_layer::router
