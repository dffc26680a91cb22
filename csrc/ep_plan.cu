// Which tokens go to which rank, in token order, and each slot's place among this rank's slots of its expert. Twin of
// ep_plan in moe_layer/ops/ep.py.
//
// Tokens are cut into one contiguous piece per block and one segment per warp. The first kernel counts per piece; the
// second, launched beside it, counts its segments meanwhile, then every block sums the counts of the pieces before it and
// its warps rank their segments in order, so that no atomic decides an order. A *column* is an expert, or E + a rank.

#include "ep.cuh"

namespace moe_layer {
namespace {

constexpr int kMostWarps = 16, kMostBlocks = 64;
constexpr int kBatch = 4;                   // ids that a thread reads at once: one by one their latencies add up
constexpr int64_t kMaxShared = 160 * 1024;  // sm_80 allows 163 KiB

struct PlanArgs {
  const int32_t* ids_TK;
  int32_t* tokens_RT;
  int32_t* position_TR;
  int32_t* counts_R;
  int32_t* places_TK;
  int32_t* counts_E;
  int32_t* piece_counts;  // [blocks, columns]
  int32_t T, K, experts, ranks, segment;
  uint32_t inverse;  // 2^32 / experts of a rank, rounded up: the high word of its product with an id is the id's rank
  bool wide;         // ids of a token in whole 16-byte units

  __device__ int columns() const { return experts + ranks; }
  __device__ unsigned rank_bit(int id) const {
    if (id < 0 || id >= experts) return 0;
    return 1u << (inverse == 0 ? id : __umulhi(static_cast<uint32_t>(id), inverse));  // 0: one expert a rank
  }
  // The ranks that a token goes to, as bits.
  __device__ unsigned ranks_of(int token) const {
    const int32_t* ids_K = ids_TK + static_cast<int64_t>(token) * K;
    unsigned goes = 0;
    if (wide) {
#pragma unroll 2
      for (int k = 0; k < K; k += 4) {
        const int4 ids = *reinterpret_cast<const int4*>(ids_K + k);
        goes |= rank_bit(ids.x) | rank_bit(ids.y) | rank_bit(ids.z) | rank_bit(ids.w);
      }
    } else {
      for (int k = 0; k < K; ++k) goes |= rank_bit(ids_K[k]);
    }
    return goes;
  }
};

// Adds the slots and tokens [begin, end) to the columns; for whole warps, each with its own range or all with one.
__device__ __forceinline__ void count_range(
    const PlanArgs& args, int begin, int end, int first, int step, int32_t* columns) {
  const int64_t last = static_cast<int64_t>(end) * args.K;
  for (int64_t p = static_cast<int64_t>(begin) * args.K + first; p < last; p += kBatch * step) {
    int id[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) id[j] = p + j * step < last ? args.ids_TK[p + j * step] : -1;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (id[j] >= 0 && id[j] < args.experts) atomicAdd(&columns[id[j]], 1);
    }
  }
  const int lane = threadIdx.x % kWarp;
  for (int base = begin + first - lane; base < end; base += step) {
    const unsigned goes = base + lane < end ? args.ranks_of(base + lane) : 0;
    for (int r = 0; r < args.ranks; ++r) {
      const int count = __popc(__ballot_sync(0xffffffffu, goes >> r & 1));
      if (lane == 0 && count != 0) atomicAdd(&columns[args.experts + r], count);
    }
  }
}

__global__ void __launch_bounds__(kMostWarps* kWarp) count_plan_kernel(PlanArgs args) {
  extern __shared__ int32_t columns[];
  start_next_kernel();
  for (int j = threadIdx.x; j < args.columns(); j += blockDim.x) columns[j] = 0;
  __syncthreads();
  const int piece = args.segment * (blockDim.x / kWarp), begin = blockIdx.x * piece;
  count_range(args, begin, min(begin + piece, args.T), threadIdx.x, blockDim.x, columns);
  __syncthreads();
  int32_t* target = args.piece_counts + static_cast<int64_t>(blockIdx.x) * args.columns();
  for (int j = threadIdx.x; j < args.columns(); j += blockDim.x) target[j] = columns[j];
}

__global__ void __launch_bounds__(kMostWarps* kWarp) place_plan_kernel(PlanArgs args) {
  extern __shared__ int32_t next_WC[];  // per warp: counts, then the next place in each column
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int columns = args.columns(), last_block = gridDim.x - 1;
  for (int i = threadIdx.x; i < warps * columns; i += blockDim.x) next_WC[i] = 0;
  __syncthreads();
  const int begin = min((static_cast<int>(blockIdx.x) * warps + warp) * args.segment, args.T);
  const int end = min(begin + args.segment, args.T);
  int32_t* next_C = next_WC + warp * columns;
  count_range(args, begin, end, lane, kWarp, next_C);
  await_previous_kernel();
  __syncthreads();
  for (int j = threadIdx.x; j < columns; j += blockDim.x) {
    int next = 0;
#pragma unroll 16
    for (int b = 0; b < static_cast<int>(blockIdx.x); ++b) {
      next += args.piece_counts[static_cast<int64_t>(b) * columns + j];
    }
    for (int w = 0; w < warps; ++w) {
      const int count = next_WC[w * columns + j];
      next_WC[w * columns + j] = next;
      next += count;
    }
    if (static_cast<int>(blockIdx.x) == last_block) {
      (j < args.experts ? args.counts_E[j] : args.counts_R[j - args.experts]) = next;
    }
  }
  __syncthreads();

  const int64_t slots_end = static_cast<int64_t>(end) * args.K;
  for (int64_t base = static_cast<int64_t>(begin) * args.K; base < slots_end; base += kBatch * kWarp) {
    int ids[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t p = base + j * kWarp + lane;
      ids[j] = p < slots_end ? args.ids_TK[p] : -1;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (base + j * kWarp >= slots_end) break;
      const int64_t p = base + j * kWarp + lane;
      const int id = ids[j];
      const bool present = id >= 0 && id < args.experts;
      const unsigned same = __match_any_sync(kAll, present ? id : -1);
      const int place = present ? next_C[id] + __popc(same & ((1u << lane) - 1)) : -1;
      __syncwarp();
      if (present && lane == __ffs(same) - 1) next_C[id] += __popc(same);
      __syncwarp();
      if (p < slots_end) args.places_TK[p] = place;
    }
  }
  for (int base = begin; base < end; base += kWarp) {
    const int token = base + lane;
    const unsigned goes = token < end ? args.ranks_of(token) : 0;
    for (int r = 0; r < args.ranks; ++r) {
      const unsigned all = __ballot_sync(kAll, goes >> r & 1);
      const int place = next_C[args.experts + r] + __popc(all & ((1u << lane) - 1));
      __syncwarp();
      if (lane == 0) next_C[args.experts + r] += __popc(all);
      __syncwarp();
      if (token >= end) continue;
      const bool sends = goes >> r & 1;
      args.position_TR[static_cast<int64_t>(token) * args.ranks + r] = sends ? place : -1;
      if (sends) args.tokens_RT[static_cast<int64_t>(r) * args.T + place] = token;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ep_plan(
    const Tensor& ids_in, int64_t num_experts, int64_t num_ranks) {
  const Tensor ids = torch::stable::contiguous(ids_in);
  check_tensor(ids, "ids", ScalarType::Int, 2);
  STD_TORCH_CHECK(
      num_ranks >= 1 && num_ranks <= kMostRanks && num_experts % num_ranks == 0, "num_ranks (", num_ranks,
      ") must divide num_experts (", num_experts, ") and be at most ", kMostRanks);
  const int64_t most_columns = kMaxShared / static_cast<int64_t>(sizeof(int32_t));
  STD_TORCH_CHECK(
      num_experts + num_ranks <= most_columns, "num_experts must be at most ", most_columns - num_ranks, ", got ",
      num_experts);
  const DeviceGuard guard(ids.get_device_index());
  const int64_t per_rank = num_experts / num_ranks;
  const int64_t T = ids.size(0), K = ids.size(1), columns = num_experts + num_ranks;
  constexpr ScalarType i32 = ScalarType::Int;
  Tensor tokens = new_empty(ids, {num_ranks, T}, i32), position = new_empty(ids, {T, num_ranks}, i32);
  Tensor counts = new_empty(ids, {num_ranks}, i32), places = new_empty(ids, {T, K}, i32);
  Tensor counts_E = new_empty(ids, {num_experts}, i32);
  const int64_t fitting = most_columns / columns, warps = fitting < kMostWarps ? fitting : kMostWarps;
  const int64_t segment = round_up<int64_t>(ceil_div<int64_t>(T > 0 ? T : 1, kMostBlocks * warps), 8);
  const int64_t blocks = ceil_div<int64_t>(T > 0 ? T : 1, segment * warps);
  Tensor piece_counts = new_empty(ids, {blocks, columns}, i32);
  const PlanArgs args{
      in_ptr<int32_t>(ids),
      out_ptr<int32_t>(tokens),
      out_ptr<int32_t>(position),
      out_ptr<int32_t>(counts),
      out_ptr<int32_t>(places),
      out_ptr<int32_t>(counts_E),
      out_ptr<int32_t>(piece_counts),
      to_int32(T, "T"),
      to_int32(K, "K"),
      to_int32(num_experts, "num_experts"),
      static_cast<int32_t>(num_ranks),
      to_int32(segment, "segment"),
      per_rank > 1 ? static_cast<uint32_t>(ceil_div<int64_t>(int64_t{1} << 32, per_rank)) : 0,
      K % 4 == 0 && reinterpret_cast<uintptr_t>(ids.const_data_ptr()) % 16 == 0};
  const int grid = static_cast<int>(blocks), threads = static_cast<int>(warps) * kWarp;
  const int64_t shared = columns * static_cast<int64_t>(sizeof(int32_t));
  const cudaStream_t stream = current_stream(ids);
  allow_shared_memory(count_plan_kernel, shared);
  count_plan_kernel<<<grid, threads, shared, stream>>>(args);
  MOE_LAUNCH_CHECK();
  allow_shared_memory(place_plan_kernel, warps * shared);
  launch_beside(place_plan_kernel, grid, threads, warps * shared, stream, args);
  MOE_LAUNCH_CHECK();
  return {tokens, position, counts, places, counts_E};
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_plan", TORCH_BOX(&moe_layer::ep_plan)); }
