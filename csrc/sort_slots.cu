// Row order of a dispatcher: slots by (local expert, compact row, slot). Twin of moe_layer/ops/sort_slots.py.
//
// A stable counting sort in two launches. The slots are cut into one contiguous piece per block and one contiguous
// segment per warp: the first kernel counts experts per piece; in the second every block sums the counts of the pieces
// before it, and its warps rank their segments in order. No atomic decides an order, so rows are the same in every run.
// The slots' weights are written in the rows' order on the way.

#include "block_scan.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kMaxShared = 160 * 1024;  // counters of all warps; sm_80 and sm_90 allow 163 and 227 KiB
constexpr int kMinPiece = 1024;             // slots per block below which more blocks only add counts to sum

struct SortArgs {
  const int32_t* ids_P;
  int64_t slots;
  int32_t slots_per_row;
  int32_t first_expert;
  int32_t experts;
  int32_t alignment;
  int64_t num_rows;
  int64_t piece;    // slots per block
  int64_t segment;  // slots per warp
  int32_t warps;
  int32_t* piece_counts;  // [blocks, experts]
  int32_t* slot_N;
  int32_t* token_N;
  int32_t* index_N;
  int32_t* row_P;
  int32_t* offsets_L1;
  int32_t* counts_L;
  const float* weights_P;  // null without slots too
  float* probs_N;          // null: no probabilities

  // A row of nobody: a pad or the tail.
  __device__ __forceinline__ void clear(int64_t row) const {
    slot_N[row] = token_N[row] = -1;
    index_N[row] = 0;
    if (probs_N != nullptr) probs_N[row] = 0.0f;
  }
};

__device__ __forceinline__ int local_expert(const SortArgs& args, int64_t p, int64_t end) {
  if (p >= end) return -1;
  const int32_t id = args.ids_P[p];
  const uint32_t local = static_cast<uint32_t>(id - args.first_expert);
  return id >= 0 && local < static_cast<uint32_t>(args.experts) ? static_cast<int>(local) : -1;
}

__global__ void __launch_bounds__(kThreads) count_pieces_kernel(SortArgs args) {
  extern __shared__ int32_t count_L[];
  for (int e = threadIdx.x; e < args.experts; e += kThreads) count_L[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * args.piece;
  const int64_t end = min(begin + args.piece, args.slots);
  for (int64_t p = begin + threadIdx.x; p < end; p += kThreads) {
    const int e = local_expert(args, p, end);
    if (e >= 0) atomicAdd(&count_L[e], 1);
  }
  __syncthreads();
  int32_t* target = args.piece_counts + static_cast<int64_t>(blockIdx.x) * args.experts;
  for (int e = threadIdx.x; e < args.experts; e += kThreads) target[e] = count_L[e];
}

__global__ void __launch_bounds__(kThreads) place_slots_kernel(SortArgs args) {
  extern __shared__ int32_t shared[];
  __shared__ int warp_sum[kWarp];
  const int L = args.experts;
  int32_t* total_L = shared;            // rows of each expert, then its first row
  int32_t* before_L = total_L + L + 1;  // slots of this expert in earlier pieces
  int32_t* next_WL = before_L + L;      // per warp: counts, then the next row of each expert
  for (int e = threadIdx.x; e <= L; e += kThreads) total_L[e] = 0;
  for (int e = threadIdx.x; e < L; e += kThreads) before_L[e] = 0;
  for (int i = threadIdx.x; i < args.warps * L; i += kThreads) next_WL[i] = 0;
  __syncthreads();

  // Sum the pieces: consecutive threads read consecutive experts; spare threads share out the pieces.
  const int lanes = L < kThreads ? L : kThreads, teams = kThreads / lanes;
  if (static_cast<int>(threadIdx.x) < lanes * teams) {
    for (int e = threadIdx.x % lanes; e < L; e += lanes) {
      int total = 0, before = 0;
#pragma unroll 8
      for (int b = threadIdx.x / lanes; b < static_cast<int>(gridDim.x); b += teams) {
        const int count = args.piece_counts[static_cast<int64_t>(b) * L + e];
        total += count;
        before += b < static_cast<int>(blockIdx.x) ? count : 0;
      }
      if (total != 0) atomicAdd(&total_L[e], total);
      if (before != 0) atomicAdd(&before_L[e], before);
    }
  }
  __syncthreads();

  // Expert boundaries: exclusive sum of the padded counts; each thread takes consecutive experts.
  const int per_thread = ceil_div(L, kThreads);
  const int e_begin = min(static_cast<int>(threadIdx.x) * per_thread, L), e_end = min(e_begin + per_thread, L);
  int padded = 0;
  for (int e = e_begin; e < e_end; ++e) padded += round_up(total_L[e], args.alignment);
  int first = block_exclusive_sum<kThreads>(padded, warp_sum);
  for (int e = e_begin; e < e_end; ++e) {
    const int count = total_L[e];
    total_L[e] = first;
    if (blockIdx.x == 0) {
      args.offsets_L1[e] = first;
      args.counts_L[e] = count;
    }
    // Pads of this expert, dealt out over the blocks.
    const int after = first + round_up(count, args.alignment);
    if (e % gridDim.x == blockIdx.x) {
      for (int64_t row = first + count; row < after && row < args.num_rows; ++row) {
        args.clear(row);
      }
    }
    first = after;
    if (e == L - 1) {
      total_L[L] = after;
      if (blockIdx.x == 0) args.offsets_L1[L] = after;
    }
  }
  __syncthreads();
  for (int64_t row = total_L[L] + blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; row < args.num_rows;
       row += static_cast<int64_t>(gridDim.x) * kThreads) {
    args.clear(row);
  }

  // Rank this block's slots: a warp's segment is in slot order, and so are the warps.
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t begin = blockIdx.x * args.piece + warp * args.segment;
  const int64_t end = min(min(begin + args.segment, (blockIdx.x + 1) * args.piece), args.slots);
  int32_t* next_L = next_WL + warp * L;
  if (warp < args.warps) {
    for (int64_t base = begin; base < end; base += kWarp) {
      const int e = local_expert(args, base + lane, end);
      const unsigned same = __match_any_sync(0xffffffffu, e);
      if (e >= 0 && lane == __ffs(same) - 1) next_L[e] += __popc(same);
      __syncwarp();
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < L; e += kThreads) {
    int next = total_L[e] + before_L[e];
    for (int w = 0; w < args.warps; ++w) {
      const int count = next_WL[w * L + e];
      next_WL[w * L + e] = next;
      next += count;
    }
  }
  __syncthreads();
  if (warp >= args.warps) return;
  for (int64_t base = begin; base < end; base += kWarp) {
    const int64_t p = base + lane;
    const int e = local_expert(args, p, end);
    const unsigned same = __match_any_sync(0xffffffffu, e);
    int row = -1;
    if (e >= 0) row = next_L[e] + __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (e >= 0 && lane == __ffs(same) - 1) next_L[e] += __popc(same);
    __syncwarp();
    if (p >= end) continue;
    if (row >= args.num_rows) row = -1;  // the caller promised room; never write past it
    args.row_P[p] = row;
    if (row >= 0) {
      const int token = static_cast<int>(p / args.slots_per_row);
      args.slot_N[row] = static_cast<int32_t>(p);
      args.token_N[row] = token;
      args.index_N[row] = token;
      if (args.probs_N != nullptr) args.probs_N[row] = args.weights_P[p];
    }
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs sort_slots(
    const Tensor& ids_in, int64_t first_expert, int64_t num_local, int64_t alignment, int64_t num_rows,
    const std::optional<Tensor>& weights_in) {
  const Tensor ids = dense(ids_in);
  check_tensor(ids, "ids", ScalarType::Int, 2);
  STD_TORCH_CHECK(num_local >= 1 && num_local <= 8192, "num_local must lie in [1, 8192], got ", num_local);
  STD_TORCH_CHECK(alignment >= 1, "alignment must be positive, got ", alignment);
  const int64_t C = ids.size(0), K = ids.size(1), P = C * K, L = num_local;
  to_int32(P, "the number of slots");
  to_int32(num_rows, "num_rows");
  std::optional<Tensor> weights;
  if (weights_in.has_value()) {
    weights = dense(*weights_in);
    check_tensor(*weights, "weights", ScalarType::Float, 2);
    check_size(*weights, "weights", 0, C);
    check_size(*weights, "weights", 1, K);
    check_same_device(*weights, "weights", ids);
  }
  const DeviceGuard guard(ids.get_device_index());
  const ScalarType i32 = ScalarType::Int;
  Tensor probs_N = new_empty(ids, {weights.has_value() ? num_rows : 0}, ScalarType::Float);
  Tensor slot_N = new_empty(ids, {num_rows}, i32), token_N = new_empty(ids, {num_rows}, i32);
  Tensor index_N = new_empty(ids, {num_rows}, i32), row_CK = new_empty(ids, {C, K}, i32);
  Tensor offsets = new_empty(ids, {L + 1}, i32), counts = new_empty(ids, {L}, i32);

  const int64_t most = sm_count(ids.get_device_index());
  const int64_t wanted = ceil_div<int64_t>(P, kMinPiece);
  const int64_t blocks = wanted < 1 ? 1 : (wanted < most ? wanted : most);
  const int64_t fixed = (2 * L + 1) * sizeof(int32_t);
  int64_t warps = (kMaxShared - fixed) / (L * sizeof(int32_t));
  warps = warps < 1 ? 1 : (warps < kThreads / kWarp ? warps : kThreads / kWarp);
  const int64_t segment = round_up<int64_t>(ceil_div<int64_t>(ceil_div<int64_t>(P, blocks), warps), kWarp);
  Tensor piece_counts = new_empty(ids, {blocks, L}, i32);
  const SortArgs args{
      in_ptr<int32_t>(ids),
      P,
      to_int32(K > 0 ? K : 1, "K"),
      to_int32(first_expert, "first_expert"),
      to_int32(L, "num_local"),
      to_int32(alignment, "alignment"),
      num_rows,
      segment * warps,
      segment,
      to_int32(warps, "warps"),
      out_ptr<int32_t>(piece_counts),
      out_ptr<int32_t>(slot_N),
      out_ptr<int32_t>(token_N),
      out_ptr<int32_t>(index_N),
      out_ptr<int32_t>(row_CK),
      out_ptr<int32_t>(offsets),
      out_ptr<int32_t>(counts),
      in_ptr<float>(weights),
      weights.has_value() ? out_ptr<float>(probs_N) : nullptr};
  const cudaStream_t stream = current_stream(ids);
  count_pieces_kernel<<<static_cast<int>(blocks), kThreads, L * sizeof(int32_t), stream>>>(args);
  MOE_LAUNCH_CHECK();
  const int64_t shared = fixed + warps * L * sizeof(int32_t);
  allow_shared_memory(place_slots_kernel, shared);
  place_slots_kernel<<<static_cast<int>(blocks), kThreads, shared, stream>>>(args);
  MOE_LAUNCH_CHECK();
  return {slot_N, row_CK, offsets, counts, token_N, index_N, probs_N};
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("sort_slots", TORCH_BOX(&moe_layer::sort_slots)); }
