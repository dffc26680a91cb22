// Which tokens go to which rank, in token order: one block a rank, four tokens a thread and step. Twin of ep_plan in
// moe_layer/ops/ep.py.

#include "common.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 1024, kEach = 4;

__global__ void __launch_bounds__(kThreads) ep_plan_kernel(
    const int32_t* __restrict__ ids_TK, int32_t* tokens_RT, int32_t* position_TR, int32_t* counts_R, int32_t T,
    int32_t K, int32_t experts_per_rank, bool wide) {
  __shared__ int32_t sums[kThreads / kWarp];
  const int rank = blockIdx.x, ranks = gridDim.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_expert = rank * experts_per_rank;
  int32_t sent = 0;
  for (int64_t begin = 0; begin < T; begin += kThreads * kEach) {
    const int64_t token = begin + threadIdx.x * kEach;
    unsigned goes = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (token + i < T) {
        const auto look = [&](int32_t id) {
          const unsigned local = static_cast<unsigned>(id - first_expert);
          goes |= static_cast<unsigned>(local < static_cast<unsigned>(experts_per_rank)) << i;
        };
        const int32_t* ids_K = ids_TK + (token + i) * K;
        if (wide) {  // K in whole 16-byte units
#pragma unroll 2
          for (int k = 0; k < K; k += 4) {
            const int4 ids = *reinterpret_cast<const int4*>(ids_K + k);
            look(ids.x), look(ids.y), look(ids.z), look(ids.w);
          }
        } else {
          for (int k = 0; k < K; ++k) look(ids_K[k]);
        }
      }
    }
    const int mine = __popc(goes);
    int before = mine;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, step);
      if (lane >= step) before += other;
    }
    if (lane == kWarp - 1) sums[warp] = before;
    __syncthreads();
    int below = 0, total = 0;
    for (int i = 0; i < kThreads / kWarp; ++i) {
      below += i < warp ? sums[i] : 0;
      total += sums[i];
    }
    __syncthreads();
    int place = sent + below + before - mine;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (token + i < T) {
        const bool sends = goes >> i & 1;
        position_TR[(token + i) * ranks + rank] = sends ? place : -1;
        if (sends) tokens_RT[static_cast<int64_t>(rank) * T + place++] = static_cast<int32_t>(token + i);
      }
    }
    sent += total;
  }
  if (threadIdx.x == 0) counts_R[rank] = sent;
}

std::tuple<Tensor, Tensor, Tensor> ep_plan(const Tensor& ids_in, int64_t num_experts, int64_t num_ranks) {
  const Tensor ids = torch::stable::contiguous(ids_in);
  check_tensor(ids, "ids", ScalarType::Int, 2);
  STD_TORCH_CHECK(
      num_ranks >= 1 && num_experts % num_ranks == 0, "num_ranks (", num_ranks, ") must divide num_experts (",
      num_experts, ")");
  const DeviceGuard guard(ids.get_device_index());
  const int64_t T = ids.size(0), K = ids.size(1);
  Tensor tokens = new_empty(ids, {num_ranks, T}, ScalarType::Int);
  Tensor position = new_empty(ids, {T, num_ranks}, ScalarType::Int);
  Tensor counts = new_empty(ids, {num_ranks}, ScalarType::Int);
  ep_plan_kernel<<<static_cast<int>(num_ranks), kThreads, 0, current_stream(ids)>>>(
      in_ptr<int32_t>(ids), out_ptr<int32_t>(tokens), out_ptr<int32_t>(position), out_ptr<int32_t>(counts),
      to_int32(T, "T"), to_int32(K, "K"), to_int32(num_experts / num_ranks, "experts per rank"),
      K % 4 == 0 && reinterpret_cast<uintptr_t>(ids.const_data_ptr()) % 16 == 0);
  MOE_LAUNCH_CHECK();
  return {tokens, position, counts};
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_plan", TORCH_BOX(&moe_layer::ep_plan)); }
