// Wait for the headers and words of all ranks, and lay the words out as compact rows in (source, token) order. Twin of
// ep_await in moe_layer/ops/ep.py.

#include "ep.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 256, kAhead = 4;

struct AwaitArgs {
  EpTrip trip;
  int32_t* counts_R;
  int32_t* base_R1;
  int32_t* token_C;
  int32_t* rank_C;
  int32_t* meta0;
  int32_t* meta1;
  int32_t num_rows, words0, words1, first_expert, num_local;
};

__global__ void __launch_bounds__(kThreads, 4) ep_await_kernel(AwaitArgs args) {
  const EpTrip& trip = args.trip;
  __shared__ int32_t counts[kMostRanks], base[kMostRanks + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool ok = wait_headers(trip, now_ns() + trip.deadline_ns, counts);
  if (threadIdx.x == 0) {
    base[0] = 0;
    for (int r = 0; r < trip.ranks; ++r) base[r + 1] = base[r] + (ok ? counts[r] : 0);
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x <= trip.ranks) {
    args.base_R1[threadIdx.x] = base[threadIdx.x];
    if (threadIdx.x < trip.ranks) args.counts_R[threadIdx.x] = base[threadIdx.x + 1] - base[threadIdx.x];
  }
  if (args.words0 == 0) return;
  const int words = 1 + args.words0 + args.words1, total = base[trip.ranks];
  const int each = kThreads / kWarp * static_cast<int>(gridDim.x) * kAhead;
  for (int c0 = (blockIdx.x * (kThreads / kWarp) + warp) * kAhead; c0 < args.num_rows; c0 += each) {
    for (int w = lane; w < words; w += kWarp) {
      int32_t values[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int c = c0 + j;
        values[j] = w <= args.words0 ? -1 : 0;
        if (c < total && c < args.num_rows) {
          int source = 0;
          while (c >= base[source + 1]) ++source;
          values[j] = __ldcg(trip.words(trip.me, source) + static_cast<int64_t>(c - base[source]) * words + w);
          if (w == 0) args.rank_C[c] = source;
        } else if (w == 0 && c < args.num_rows) {
          args.rank_C[c] = -1;
        }
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int64_t c = c0 + j;
        if (c >= args.num_rows) continue;
        if (w == 0) {
          args.token_C[c] = values[j];
        } else if (w <= args.words0) {
          const unsigned local = static_cast<unsigned>(values[j] - args.first_expert);
          args.meta0[c * args.words0 + w - 1] = local < static_cast<unsigned>(args.num_local) ? values[j] : -1;
        } else {
          args.meta1[c * args.words1 + w - 1 - args.words0] = values[j];
        }
      }
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ep_await(
    const Tensor& peers, Tensor state, const Tensor& words, int64_t num_rows, int64_t words0, int64_t words1,
    int64_t first_expert, int64_t num_local) {
  const DeviceGuard guard(state.get_device_index());
  const EpTrip trip = read_trip(peers, state, words);
  constexpr ScalarType i32 = ScalarType::Int;
  Tensor counts = new_empty(state, {trip.ranks}, i32), base = new_empty(state, {trip.ranks + 1}, i32);
  Tensor token = new_empty(state, {num_rows}, i32), rank = new_empty(state, {num_rows}, i32);
  Tensor meta0 = new_empty(state, {num_rows, words0}, i32);
  Tensor meta1 = new_empty(state, {num_rows, words1}, ScalarType::Float);
  AwaitArgs args{
      trip,
      out_ptr<int32_t>(counts),
      out_ptr<int32_t>(base),
      out_ptr<int32_t>(token),
      out_ptr<int32_t>(rank),
      out_ptr<int32_t>(meta0),
      static_cast<int32_t*>(meta1.mutable_data_ptr()),
      to_int32(num_rows, "num_rows"),
      to_int32(words0, "words0"),
      to_int32(words1, "words1"),
      to_int32(first_expert, "first_expert"),
      to_int32(num_local, "num_local")};
  const int64_t wanted = ceil_div<int64_t>(num_rows, kThreads / kWarp * kAhead);
  const int64_t most = sm_count(state.get_device_index());
  const int grid = static_cast<int>(wanted < 1 ? 1 : wanted < most ? wanted : most);
  ep_await_kernel<<<grid, kThreads, 0, current_stream(state)>>>(args);
  MOE_LAUNCH_CHECK();
  return {counts, base, token, rank, meta0, meta1};
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_await", TORCH_BOX(&moe_layer::ep_await)); }
