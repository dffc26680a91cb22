// Wait for the headers and words of all ranks and give every slot its row, while the rows fly. Twin of ep_arrange in
// moe_layer/ops/ep.py.
//
// One launch, because while rows fill the link each small kernel takes 15 to 30 us, on an H200, instead of 2 to 5. No
// sort: a slot's row is the first row of its (expert, source rank), which every block works out from the counts that all
// sources sent, plus its place among that source's slots of the expert, which travelled with it.

#include "ep.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 256, kAhead = 2;

struct ArrangeArgs {
  EpTrip trip;
  int32_t* counts_R;
  int32_t* base_R1;
  int32_t* token_C;
  int32_t* rank_C;
  int32_t* ids_CK;
  int32_t* row_CK;
  int32_t* slot_N;
  float* probs_N;
  int32_t* index_N;  // null: nobody asked
  int32_t* offsets_L1;
  int32_t* counts_L;
  int32_t num_compact, num_rows, slots, first_expert, num_local, alignment;

  __device__ void clear(int64_t n) const {
    slot_N[n] = -1;
    probs_N[n] = 0.0f;
    if (index_N != nullptr) index_N[n] = 0;
  }
};

// first_RL[r, e]: the first row of the slots from rank r for local expert e. total_L: rows of each expert; returns all
// rows, pads included. The counts must be possible: what they sum up to decides where this rank writes.
__device__ bool scan_counts(const ArrangeArgs& args, int32_t* first_RL, int32_t* total_L, int32_t* offset_L1) {
  const EpTrip& trip = args.trip;
  __shared__ int32_t warp_sum[kThreads / kWarp];
  const int L = args.num_local, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  bool ok = true;
  int carried = 0;
  for (int begin = 0; begin < L; begin += kThreads) {
    const int e = begin + threadIdx.x;
    int total = 0;
    if (e < L) {
      for (int r = 0; r < trip.ranks; ++r) {
        int count = __ldcg(trip.expert_counts(trip.me, r, L) + e);
        if (count < 0 || count > trip.max_rows * args.slots) {
          if (blockIdx.x == 0) trip.report(kBadCount, r, trip.max_rows, count);
          count = 0, ok = false;
        }
        first_RL[r * L + e] = total;
        total += count;
      }
      total_L[e] = total;
    }
    const int padded = round_up(total, args.alignment);
    int inclusive = padded;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, inclusive, step);
      if (lane >= step) inclusive += other;
    }
    if (lane == kWarp - 1) warp_sum[warp] = inclusive;
    __syncthreads();
    int below = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) {
      below += w < warp ? warp_sum[w] : 0;
      all += warp_sum[w];
    }
    const int first = carried + below + inclusive - padded;
    if (e < L) {
      offset_L1[e] = first;
      for (int r = 0; r < trip.ranks; ++r) first_RL[r * L + e] += first;
    }
    carried += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) offset_L1[L] = carried;
  return __syncthreads_and(ok);
}

__global__ void __launch_bounds__(kThreads, 4) ep_arrange_kernel(ArrangeArgs args) {
  extern __shared__ int32_t shared[];
  const EpTrip& trip = args.trip;
  __shared__ int32_t counts[kMostRanks], base[kMostRanks + 1];
  const int L = args.num_local, K = args.slots, thread = blockIdx.x * kThreads + threadIdx.x;
  const int threads = gridDim.x * kThreads;
  int32_t *total_L = shared, *offset_L1 = total_L + L, *first_RL = offset_L1 + L + 1;
  bool ok = wait_headers(trip, now_ns() + trip.deadline_ns, counts);
  if (ok) ok = scan_counts(args, first_RL, total_L, offset_L1);
  if (!ok) {
    for (int e = threadIdx.x; e <= L; e += kThreads) offset_L1[e] = 0;
    for (int e = threadIdx.x; e < L; e += kThreads) total_L[e] = 0;
  }
  if (threadIdx.x == 0) {
    base[0] = 0;
    for (int r = 0; r < trip.ranks; ++r) base[r + 1] = base[r] + (ok ? counts[r] : 0);
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    if (threadIdx.x <= trip.ranks) args.base_R1[threadIdx.x] = base[threadIdx.x];
    if (threadIdx.x < trip.ranks) args.counts_R[threadIdx.x] = base[threadIdx.x + 1] - base[threadIdx.x];
    // After an overflow, which is reported, nobody may go past the rows.
    for (int e = threadIdx.x; e <= L; e += kThreads) {
      const int first = min(offset_L1[e], args.num_rows);
      args.offsets_L1[e] = first;
      if (e < L) args.counts_L[e] = min(total_L[e], min(offset_L1[e + 1], args.num_rows) - first);
    }
    if (threadIdx.x == 0 && offset_L1[L] > args.num_rows) {
      report_overflow(trip, offset_L1[L], args.num_rows);
    }
  }

  for (int n = offset_L1[L] + thread; n < args.num_rows; n += threads) args.clear(n);
  for (int e = thread / kWarp; e < L; e += threads / kWarp) {
    const int end = min(offset_L1[e + 1], args.num_rows);
    for (int n = offset_L1[e] + total_L[e] + threadIdx.x % kWarp; n < end; n += kWarp) args.clear(n);
  }

  // A thread takes a slot; the words of a row are its token, K experts, K places, K weights.
  const int words = 1 + 3 * K;
  const int64_t all = static_cast<int64_t>(args.num_compact) * K;
  for (int64_t begin = thread; begin < all; begin += static_cast<int64_t>(threads) * kAhead) {
    int token[kAhead], id[kAhead], place[kAhead], source[kAhead];
    float weight[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t slot = begin + static_cast<int64_t>(j) * threads;
      const int c = static_cast<int>(slot / K), k = static_cast<int>(slot - static_cast<int64_t>(c) * K);
      token[j] = source[j] = id[j] = place[j] = -1;
      weight[j] = 0.0f;
      if (slot >= all || c >= base[trip.ranks]) continue;
      int r = 0;
      while (c >= base[r + 1]) ++r;
      const int32_t* row = trip.words(trip.me, r) + static_cast<int64_t>(c - base[r]) * words;
      token[j] = __ldcg(row);
      id[j] = __ldcg(row + 1 + k);
      place[j] = __ldcg(row + 1 + K + k);
      weight[j] = __int_as_float(__ldcg(row + 1 + 2 * K + k));
      source[j] = r;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t slot = begin + static_cast<int64_t>(j) * threads;
      if (slot >= all) continue;
      const unsigned e = static_cast<unsigned>(id[j] - args.first_expert);
      int row = -1;
      if (source[j] >= 0 && e < static_cast<unsigned>(L)) {
        const int first = first_RL[source[j] * L + e];
        const int end = source[j] + 1 < trip.ranks ? first_RL[(source[j] + 1) * L + e] : offset_L1[e] + total_L[e];
        if (place[j] >= 0 && place[j] < end - first && first + place[j] < args.num_rows) row = first + place[j];
      }
      args.ids_CK[slot] = source[j] >= 0 && e < static_cast<unsigned>(L) ? id[j] : -1;
      args.row_CK[slot] = row;
      if (slot % K == 0) {
        args.token_C[slot / K] = token[j];
        args.rank_C[slot / K] = source[j];
      }
      if (row >= 0) {
        args.slot_N[row] = static_cast<int32_t>(slot);
        args.probs_N[row] = weight[j];
        if (args.index_N != nullptr) args.index_N[row] = static_cast<int32_t>(slot / K);
      }
    }
  }
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs ep_arrange(
    const Tensor& peers, Tensor state, const Tensor& words, int64_t num_compact, int64_t num_rows, int64_t slots,
    int64_t first_expert, int64_t num_local, int64_t alignment, bool compact) {
  const DeviceGuard guard(state.get_device_index());
  const EpTrip trip = read_trip(peers, state, words);
  STD_TORCH_CHECK(slots >= 1 && num_local >= 1, "slots and num_local must be positive, got ", slots, ", ", num_local);
  STD_TORCH_CHECK(alignment >= 1, "alignment must be positive, got ", alignment);
  STD_TORCH_CHECK(
      trip.max_rows * 4 * (1 + 3 * slots) + 4 * num_local <= trip.meta_block, "the window has no room for ",
      1 + 3 * slots, " words a row and ", num_local, " counts");
  to_int32(num_compact * slots, "compact slots");
  constexpr ScalarType i32 = ScalarType::Int;
  Tensor counts_R = new_empty(state, {trip.ranks}, i32), base = new_empty(state, {trip.ranks + 1}, i32);
  Tensor token = new_empty(state, {num_compact}, i32), rank = new_empty(state, {num_compact}, i32);
  Tensor ids = new_empty(state, {num_compact, slots}, i32), row = new_empty(state, {num_compact, slots}, i32);
  Tensor slot = new_empty(state, {num_rows}, i32), probs = new_empty(state, {num_rows}, ScalarType::Float);
  Tensor index = new_empty(state, {compact ? num_rows : 0}, i32);
  Tensor offsets = new_empty(state, {num_local + 1}, i32), counts_L = new_empty(state, {num_local}, i32);
  const ArrangeArgs args{
      trip,
      out_ptr<int32_t>(counts_R),
      out_ptr<int32_t>(base),
      out_ptr<int32_t>(token),
      out_ptr<int32_t>(rank),
      out_ptr<int32_t>(ids),
      out_ptr<int32_t>(row),
      out_ptr<int32_t>(slot),
      out_ptr<float>(probs),
      compact ? out_ptr<int32_t>(index) : nullptr,
      out_ptr<int32_t>(offsets),
      out_ptr<int32_t>(counts_L),
      to_int32(num_compact, "num_compact"),
      to_int32(num_rows, "num_rows"),
      to_int32(slots, "slots"),
      to_int32(first_expert, "first_expert"),
      to_int32(num_local, "num_local"),
      to_int32(alignment, "alignment")};
  const int64_t shared = ((trip.ranks + 2) * num_local + 1) * static_cast<int64_t>(sizeof(int32_t));
  STD_TORCH_CHECK(shared <= 160 * 1024, "ep_arrange serves no ", num_local, " experts a rank");
  allow_shared_memory(ep_arrange_kernel, shared);
  prefer_shared_memory(ep_arrange_kernel);
  const int64_t wanted = ceil_div<int64_t>(num_compact * slots, kThreads * kAhead);
  const int64_t most = sm_count(state.get_device_index());
  const int grid = static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
  ep_arrange_kernel<<<grid, kThreads, shared, current_stream(state)>>>(args);
  MOE_LAUNCH_CHECK();
  return {counts_R, base, token, rank, ids, row, slot, probs, offsets, counts_L, index};
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_arrange", TORCH_BOX(&moe_layer::ep_arrange)); }
