// Tokens per expert: int32 ids of any shape -> int32 [num_experts]. Twin of moe_layer/ops/histogram.py.
//
// Integer atomics commute, so the counts are the same bits in every run although the order of additions is not.

#include "common.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 256;
constexpr int kIdsPerThread = 16;
constexpr int64_t kSharedExperts = 8192;  // 32 KiB of counters; above that the few collisions go straight to L2

template <bool kShared>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const int32_t* __restrict__ ids, int64_t numel, int32_t num_experts, int32_t* counts_E) {
  extern __shared__ int32_t local_E[];
  int32_t* target_E = kShared ? local_E : counts_E;
  if constexpr (kShared) {
    for (int e = threadIdx.x; e < num_experts; e += kThreads) local_E[e] = 0;
    __syncthreads();
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < numel; i += stride) {
    const int32_t id = ids[i];
    // One unsigned comparison drops -1 (not routed) and anything out of range, which would write past the counters.
    if (static_cast<uint32_t>(id) < static_cast<uint32_t>(num_experts)) atomicAdd(&target_E[id], 1);
  }
  if constexpr (kShared) {
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts; e += kThreads) {
      if (local_E[e] != 0) atomicAdd(&counts_E[e], local_E[e]);
    }
  }
}

Tensor expert_histogram(const Tensor& ids, int64_t num_experts) {
  check_tensor(ids, "ids", ScalarType::Int, ids.dim());
  STD_TORCH_CHECK(num_experts > 0, "num_experts must be positive, got ", num_experts);
  const int32_t experts = to_int32(num_experts, "num_experts");
  const DeviceGuard guard(ids.get_device_index());
  Tensor counts_E = new_zeros(ids, {num_experts}, ScalarType::Int);
  const int64_t numel = ids.numel();
  if (numel == 0) return counts_E;  // a grid of zero blocks is a launch error

  const int64_t blocks_needed = ceil_div<int64_t>(numel, kThreads * kIdsPerThread);
  const int64_t blocks_max = 2 * sm_count(ids.get_device_index());
  const int blocks = static_cast<int>(blocks_needed < blocks_max ? blocks_needed : blocks_max);
  const cudaStream_t stream = current_stream(ids);
  if (num_experts <= kSharedExperts) {
    histogram_kernel<true><<<blocks, kThreads, experts * sizeof(int32_t), stream>>>(
        in_ptr<int32_t>(ids), numel, experts, out_ptr<int32_t>(counts_E));
  } else {
    histogram_kernel<false>
        <<<blocks, kThreads, 0, stream>>>(in_ptr<int32_t>(ids), numel, experts, out_ptr<int32_t>(counts_E));
  }
  MOE_LAUNCH_CHECK();
  return counts_E;
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("expert_histogram", TORCH_BOX(&moe_layer::expert_histogram)); }
