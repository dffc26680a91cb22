// Dense push: all rows [T, D] of a rank into each peer's window by copy engine, token t as row t, in a few pieces with a
// flag behind each. It needs no routing, and multiprocessors only to encode. Twin of ep_push_rows in
// moe_layer/ops/ep_dense.py.
//
// Two streams take the pieces in turn, each one after the other: encode, copy to all peers, flags. What one of them does
// between two copies, 4 to 8 us on an H200, does not leave the link idle: the other one copies. A copy is over for what
// follows it in stream order when its bytes are visible at the peer; the release store of the flags comes after that.

#include "ep.cuh"
#include "ep_fp8.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 512;

// Takes the slot. Copies cannot be held back once they are in the stream: a rank that goes on without its credits says so
// in the peers' windows first, and they look there after they have read (ep_take).
__global__ void ep_open_kernel(EpTrip trip) {
  if (wait_credits(trip, now_ns() + trip.deadline_ns)) {
    if (threadIdx.x == 0) trip.state[trip.counters + kSent] = static_cast<int32_t>(trip.epoch(kSent) + 1);
  } else if (threadIdx.x < trip.ranks) {
    store_release_sys(trip.word(threadIdx.x, trip.fault, trip.ranks + trip.me), 1);
    __threadfence_system();
  }
}

__global__ void ep_publish_kernel(EpTrip trip, int chunk) {
  if (trip.failed()) return;
  const int peer = threadIdx.x;
  if (peer < trip.ranks && peer != trip.me) store_release_sys(trip.flag(peer, trip.me, chunk), trip.epoch(kSent));
}

__global__ void __launch_bounds__(kThreads, 2)
    ep_encode_kernel(const uint4* rows, uint8_t* encoded, int64_t num_rows, int64_t units, int64_t width) {
  constexpr int kWarps = kThreads / kWarp;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp; i < num_rows;
       i += static_cast<int64_t>(gridDim.x) * kWarps) {
    fp8_encode_row(rows + i * units, encoded + i * width, units);
  }
}

// Lets streams wait for what others hold now.
class Order {
 public:
  Order() { STD_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Order() { cudaEventDestroy(event_); }  // what was recorded stays
  Order(const Order&) = delete;
  Order& operator=(const Order&) = delete;
  void operator()(cudaStream_t waiting, cudaStream_t other) const {
    if (waiting == other) return;
    STD_CUDA_CHECK(cudaEventRecord(event_, other));
    STD_CUDA_CHECK(cudaStreamWaitEvent(waiting, event_, 0));
  }

 private:
  cudaEvent_t event_ = nullptr;
};

void ep_push_rows(
    const Tensor& peers, Tensor state, const Tensor& rows, std::optional<Tensor> encoded, const Tensor& words,
    const Tensor& addresses, int64_t words_stream, int64_t first_stream, int64_t second_stream) {
  const DeviceGuard guard(state.get_device_index());
  check_tensor(rows, "rows", rows.scalar_type(), 2);
  const EpTrip trip = read_trip(peers, state, words);
  check_width(trip, rows, "rows", encoded.has_value());
  const int64_t T = rows.size(0), pieces = ceil_div<int64_t>(T, trip.chunk_rows);
  STD_TORCH_CHECK(T <= trip.max_rows, "rows are ", T, ", the window holds ", trip.max_rows);
  STD_TORCH_CHECK(trip.width * trip.max_rows <= trip.data_block, "the window has no room for rows of ", trip.width);
  STD_TORCH_CHECK(
      !addresses.is_cuda() && addresses.scalar_type() == ScalarType::Long && addresses.numel() == trip.ranks,
      "addresses must be an int64 CPU tensor with one address for each of the ", trip.ranks, " ranks");
  STD_TORCH_CHECK(pieces <= trip.max_chunks, "the window has no flags for ", pieces, " pieces");
  uint8_t* coded = nullptr;
  if (encoded.has_value()) {
    check_tensor(*encoded, "encoded", ScalarType::Byte, 2);
    check_size(*encoded, "encoded", 0, T);
    check_size(*encoded, "encoded", 1, trip.width);
    coded = static_cast<uint8_t*>(encoded->mutable_data_ptr());
  }
  const cudaStream_t current = current_stream(state);
  const auto stream_of = [&](int64_t handle) { return handle != 0 ? reinterpret_cast<cudaStream_t>(handle) : current; };
  const cudaStream_t streams[2] = {stream_of(first_stream), stream_of(second_stream)};
  const Order order;
  order(streams[0], current);
  ep_open_kernel<<<1, kMostRanks, 0, streams[0]>>>(trip);
  MOE_LAUNCH_CHECK();
  order(stream_of(words_stream), streams[0]);
  order(streams[1], streams[0]);

  const uint8_t* from = static_cast<const uint8_t*>(rows.const_data_ptr());
  const int64_t row_bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  const int64_t* windows = in_ptr<int64_t>(addresses);
  const int64_t most = 2 * sm_count(state.get_device_index());
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const cudaStream_t stream = streams[piece % 2];
    const int64_t first = piece * trip.chunk_rows, left = T - first,
                  count = left < trip.chunk_rows ? left : trip.chunk_rows;
    const uint8_t* source = coded != nullptr ? coded + first * trip.width : from + first * row_bytes;
    if (coded != nullptr) {
      const int64_t wanted = ceil_div<int64_t>(count, kThreads / kWarp);
      ep_encode_kernel<<<static_cast<int>(wanted < most ? wanted : most), kThreads, 0, stream>>>(
          reinterpret_cast<const uint4*>(from + first * row_bytes), coded + first * trip.width, count, rows.size(1) / 8,
          trip.width);
      MOE_LAUNCH_CHECK();
    }
    for (int i = 1; i < trip.ranks; ++i) {
      const int peer = (trip.me + i) % trip.ranks;  // nearest first, so that no link is hit by all
      const int64_t target = windows[peer] + trip.data + trip.me * trip.data_block + first * trip.width;
      STD_CUDA_CHECK(cudaMemcpyAsync(
          reinterpret_cast<void*>(target), source, static_cast<size_t>(count * trip.width), cudaMemcpyDefault, stream));
    }
    ep_publish_kernel<<<1, kMostRanks, 0, stream>>>(trip, static_cast<int>(piece));
    MOE_LAUNCH_CHECK();
  }
  order(streams[0], streams[1]);
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_push_rows", TORCH_BOX(&moe_layer::ep_push_rows)); }
