// Wait for the headers and counts of all ranks: where the rows of each expert, and of each source there, begin. Twin of
// ep_arrange in moe_layer/ops/ep_arrange.py.
//
// One block, because the counts of all ranks' slots by expert are all that is read: the words of the rows arrive with
// them, and ep_expand gives each slot its row.

#include "block_scan.cuh"
#include "ep.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 256;

struct ArrangeArgs {
  EpTrip trip;
  int32_t* counts_R;
  int32_t* base_R1;
  int32_t* first_RL;  // [ranks + 1, num_local]
  int32_t* offsets_L1;
  int32_t* counts_L;
  int32_t num_rows, slots, num_local, alignment;
};

__device__ __forceinline__ int32_t read_count(const ArrangeArgs& args, int r, int e) {
  return static_cast<int32_t>(__ldcg(
      reinterpret_cast<const unsigned long long*>(args.trip.expert_counts(args.trip.me, r, args.num_local)) + e));
}

// Waits for the counts, which must be possible: what they sum up to decides where this rank writes.
__device__ bool wait_counts(const ArrangeArgs& args, uint64_t until) {
  const EpTrip& trip = args.trip;
  const uint32_t epoch = trip.epoch(kReceived) + 1;
  bool ok = true;
  for (int i = threadIdx.x; ok && i < trip.ranks * args.num_local; i += kThreads) {
    const int r = i / args.num_local, e = i - r * args.num_local;
    int32_t count;
    ok = spin_pair(trip, trip.expert_counts(trip.me, r, args.num_local) + e, epoch, until, r, count);
    if (ok && (count < 0 || count > trip.max_rows * args.slots)) {
      trip.report(kBadCount, r, trip.max_rows, count);
      ok = false;
    }
  }
  return __syncthreads_and(ok);
}

__global__ void __launch_bounds__(kThreads) ep_arrange_kernel(ArrangeArgs args) {
  const EpTrip& trip = args.trip;
  __shared__ int32_t counts[kMostRanks], warp_sum[kThreads / kWarp];
  const int L = args.num_local;
  start_next_kernel();  // ep_expand
  const uint64_t until = now_ns() + trip.deadline_ns;
  bool ok = wait_headers(trip, until, counts);
  if (ok) ok = wait_counts(args, until);
  if (threadIdx.x == 0) {
    int base = 0;
    for (int r = 0; r < trip.ranks; ++r) {
      args.base_R1[r] = base;
      args.counts_R[r] = ok ? counts[r] : 0;
      base += ok ? counts[r] : 0;
    }
    args.base_R1[trip.ranks] = base;
  }
  int carried = 0;
  for (int begin = 0; begin < L; begin += kThreads) {
    const int e = begin + static_cast<int>(threadIdx.x);
    int total = 0;
    for (int r = 0; ok && e < L && r < trip.ranks; ++r) total += read_count(args, r, e);
    const int padded = round_up(total, args.alignment);
    const int first = carried + block_exclusive_sum<kThreads>(padded, warp_sum), end = first + padded;
    carried += warp_sum[kThreads / kWarp - 1];
    __syncthreads();  // the next turn writes the sums
    if (e >= L) continue;
    int next = first;
    for (int r = 0; r < trip.ranks; ++r) {
      args.first_RL[r * L + e] = next;
      if (ok) next += read_count(args, r, e);
    }
    args.first_RL[trip.ranks * L + e] = next;
    // After an overflow, which is reported, nobody may go past the rows.
    args.offsets_L1[e] = min(first, args.num_rows);
    args.counts_L[e] = min(total, min(end, args.num_rows) - min(first, args.num_rows));
  }
  if (threadIdx.x == 0) {
    args.offsets_L1[L] = min(carried, args.num_rows);
    if (carried > args.num_rows) report_overflow(trip, carried, args.num_rows);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ep_arrange(
    const Tensor& peers, Tensor state, const Tensor& words, int64_t num_rows, int64_t slots, int64_t num_local,
    int64_t alignment) {
  const DeviceGuard guard(state.get_device_index());
  const EpTrip trip = read_trip(peers, state, words);
  STD_TORCH_CHECK(slots >= 1 && num_local >= 1, "slots and num_local must be positive, got ", slots, ", ", num_local);
  STD_TORCH_CHECK(alignment >= 1, "alignment must be positive, got ", alignment);
  check_words_fit(trip, slots, num_local);
  constexpr ScalarType i32 = ScalarType::Int;
  Tensor counts_R = new_empty(state, {trip.ranks}, i32), base = new_empty(state, {trip.ranks + 1}, i32);
  Tensor first = new_empty(state, {trip.ranks + 1, num_local}, i32);
  Tensor offsets = new_empty(state, {num_local + 1}, i32), counts_L = new_empty(state, {num_local}, i32);
  const ArrangeArgs args{
      trip,
      out_ptr<int32_t>(counts_R),
      out_ptr<int32_t>(base),
      out_ptr<int32_t>(first),
      out_ptr<int32_t>(offsets),
      out_ptr<int32_t>(counts_L),
      to_int32(num_rows, "num_rows"),
      to_int32(slots, "slots"),
      to_int32(num_local, "num_local"),
      to_int32(alignment, "alignment")};
  prefer_shared_memory(ep_arrange_kernel);
  ep_arrange_kernel<<<1, kThreads, 0, current_stream(state)>>>(args);
  MOE_LAUNCH_CHECK();
  return {counts_R, base, first, offsets, counts_L};
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_arrange", TORCH_BOX(&moe_layer::ep_arrange)); }
