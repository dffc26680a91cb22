// What every trip shares on the host, and ep_skip: a trip that nobody will take.

#include "ep.cuh"

namespace moe_layer {

EpTrip read_trip(const Tensor& peers, Tensor& state, const Tensor& words) {
  check_tensor(peers, "peers", ScalarType::Long, 1);
  check_tensor(state, "state", ScalarType::Int, 1);
  STD_TORCH_CHECK(
      !words.is_cuda() && words.scalar_type() == ScalarType::Long && words.numel() == kTripWords,
      "trip must be an int64 CPU tensor of ", kTripWords, " words");
  STD_TORCH_CHECK(peers.size(0) <= kMostRanks, "nvlink serves at most ", kMostRanks, " ranks, got ", peers.size(0));
  const int64_t* w = in_ptr<int64_t>(words);
  EpTrip t{};
  t.peers = in_ptr<int64_t>(peers);
  t.state = out_ptr<int32_t>(state);
  t.ranks = to_int32(peers.size(0), "ranks");
  t.me = to_int32(w[0], "me");
  t.counters = kStateHead + kSlotWords * to_int32(w[1], "slot");
  STD_TORCH_CHECK(t.counters + kSlotWords <= state.size(0), "state has no counters for slot ", w[1]);
  t.flags = w[2], t.credit = w[3], t.header = w[4], t.meta = w[5], t.data = w[6];
  t.meta_block = w[7], t.data_block = w[8];
  t.max_rows = to_int32(w[9], "max_rows");
  t.chunk_rows = to_int32(w[10], "chunk_rows");
  t.max_chunks = to_int32(w[11], "max_chunks");
  t.fault = w[12];
  t.deadline_ns = w[13];
  t.width = w[14];
  for (int i = 0; i < kCompared; ++i) t.compared[i] = static_cast<int32_t>(w[14 + i]);
  return t;
}

namespace {

__global__ void ep_skip_kernel(EpTrip trip) { give_credits(trip); }

void ep_skip(const Tensor& peers, Tensor state, const Tensor& words) {
  const DeviceGuard guard(state.get_device_index());
  const EpTrip trip = read_trip(peers, state, words);
  ep_skip_kernel<<<1, kMostRanks, 0, current_stream(state)>>>(trip);
  MOE_LAUNCH_CHECK();
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_skip", TORCH_BOX(&moe_layer::ep_skip)); }
