// Dense push: all rows [T, D] of a rank into each peer's window by copy engine, token t as row t, in a few pieces with a
// flag behind each. It needs no routing and no multiprocessor. Twins of ep_open and ep_push_rows in moe_layer/ops/ep.py.
//
// Order of a piece: the copies to all peers on the copy stream, an event, then a kernel of one warp on the current stream
// that publishes the flags. So the next copies do not wait for the flags. A copy is over for what follows it in stream
// order when its bytes are visible at the peer; the kernel's system fence and release store come after that.

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
  if (peer < trip.ranks && peer != trip.me) publish(trip, peer, chunk, trip.epoch(kSent));
}

__global__ void __launch_bounds__(kThreads, 2)
    ep_encode_kernel(const uint4* rows, uint8_t* encoded, int64_t num_rows, int64_t units, int64_t width) {
  constexpr int kWarps = kThreads / kWarp;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp; i < num_rows;
       i += static_cast<int64_t>(gridDim.x) * kWarps) {
    fp8_encode_row(rows + i * units, encoded + i * width, units);
  }
}

void ep_open(const Tensor& peers, Tensor state, const Tensor& words) {
  const DeviceGuard guard(state.get_device_index());
  const EpTrip trip = read_trip(peers, state, words);
  ep_open_kernel<<<1, kMostRanks, 0, current_stream(state)>>>(trip);
  MOE_LAUNCH_CHECK();
}

void ep_push_rows(
    const Tensor& peers, Tensor state, const Tensor& rows, std::optional<Tensor> encoded, const Tensor& words,
    const Tensor& addresses, int64_t copy_stream) {
  const DeviceGuard guard(state.get_device_index());
  check_tensor(rows, "rows", rows.scalar_type(), 2);
  const EpTrip trip = read_trip(peers, state, words);
  check_width(trip, rows, "rows", encoded.has_value());
  const int64_t T = rows.size(0);
  STD_TORCH_CHECK(T <= trip.max_rows, "rows are ", T, ", the window holds ", trip.max_rows);
  STD_TORCH_CHECK(trip.width * trip.max_rows <= trip.data_block, "the window has no room for rows of ", trip.width);
  STD_TORCH_CHECK(
      !addresses.is_cuda() && addresses.scalar_type() == ScalarType::Long && addresses.numel() == trip.ranks,
      "addresses must be an int64 CPU tensor with one address for each of the ", trip.ranks, " ranks");
  const int64_t pieces = ceil_div<int64_t>(T, trip.chunk_rows);
  STD_TORCH_CHECK(pieces <= trip.max_chunks, "the window has no flags for ", pieces, " pieces");
  const cudaStream_t stream = current_stream(state);
  const cudaStream_t copies = copy_stream != 0 ? reinterpret_cast<cudaStream_t>(copy_stream) : stream;
  const uint8_t* source = static_cast<const uint8_t*>(rows.const_data_ptr());
  if (encoded.has_value()) {
    check_tensor(*encoded, "encoded", ScalarType::Byte, 2);
    check_size(*encoded, "encoded", 0, T);
    check_size(*encoded, "encoded", 1, trip.width);
    uint8_t* to = static_cast<uint8_t*>(encoded->mutable_data_ptr());
    const int64_t wanted = ceil_div<int64_t>(T, kThreads / kWarp), most = 2 * sm_count(state.get_device_index());
    if (T > 0) {
      ep_encode_kernel<<<static_cast<int>(wanted < most ? wanted : most), kThreads, 0, stream>>>(
          reinterpret_cast<const uint4*>(source), to, T, rows.size(1) / 8, trip.width);
      MOE_LAUNCH_CHECK();
    }
    source = to;
  }
  cudaEvent_t event;  // recorded again and again: a wait means the record before it
  STD_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  const auto follow = [&](cudaStream_t waiting, cudaStream_t other) {
    if (waiting == other) return;
    STD_CUDA_CHECK(cudaEventRecord(event, other));
    STD_CUDA_CHECK(cudaStreamWaitEvent(waiting, event, 0));
  };
  const int64_t* to = in_ptr<int64_t>(addresses);
  follow(copies, stream);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = piece * trip.chunk_rows, left = T - first;
    const int64_t bytes = (left < trip.chunk_rows ? left : trip.chunk_rows) * trip.width;
    for (int i = 1; i < trip.ranks; ++i) {
      const int peer = (trip.me + i) % trip.ranks;  // nearest first, so that no link is hit by all
      uint8_t* target = reinterpret_cast<uint8_t*>(to[peer]) + trip.data + trip.me * trip.data_block;
      STD_CUDA_CHECK(cudaMemcpyAsync(
          target + first * trip.width, source + first * trip.width, static_cast<size_t>(bytes), cudaMemcpyDefault,
          copies));
    }
    follow(stream, copies);
    ep_publish_kernel<<<1, kMostRanks, 0, stream>>>(trip, static_cast<int>(piece));
    MOE_LAUNCH_CHECK();
  }
  STD_CUDA_CHECK(cudaEventDestroy(event));  // what was recorded stays
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) {
  m.impl("ep_open", TORCH_BOX(&moe_layer::ep_open));
  m.impl("ep_push_rows", TORCH_BOX(&moe_layer::ep_push_rows));
}
