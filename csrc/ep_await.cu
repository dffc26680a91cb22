// Wait for the headers of all ranks, whose rows come without words. Twin of ep_await in moe_layer/ops/ep.py.

#include "ep.cuh"

namespace moe_layer {
namespace {

__global__ void ep_await_kernel(EpTrip trip, int32_t* counts_R, int32_t* base_R1) {
  __shared__ int32_t counts[kMostRanks];
  const bool ok = wait_headers(trip, now_ns() + trip.deadline_ns, counts);
  if (threadIdx.x != 0) return;
  int base = 0;
  for (int r = 0; r < trip.ranks; ++r) {
    base_R1[r] = base;
    counts_R[r] = ok ? counts[r] : 0;
    base += counts_R[r];
  }
  base_R1[trip.ranks] = base;
}

std::tuple<Tensor, Tensor> ep_await(const Tensor& peers, Tensor state, const Tensor& words) {
  const DeviceGuard guard(state.get_device_index());
  const EpTrip trip = read_trip(peers, state, words);
  Tensor counts = new_empty(state, {trip.ranks}, ScalarType::Int);
  Tensor base = new_empty(state, {trip.ranks + 1}, ScalarType::Int);
  ep_await_kernel<<<1, kMostRanks, 0, current_stream(state)>>>(trip, out_ptr<int32_t>(counts), out_ptr<int32_t>(base));
  MOE_LAUNCH_CHECK();
  return {counts, base};
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_await", TORCH_BOX(&moe_layer::ep_await)); }
