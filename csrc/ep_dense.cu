// Dense push: all rows [T, D] of a rank into each peer's window by copy engine, token t as row t, in a few pieces with a
// flag behind each. It needs no routing, and multiprocessors only to encode. Twin of ep_push_rows in
// moe_layer/ops/ep_dense.py.
//
// One stream holds the copies, which follow each other; on the other one the flags of each wait for it. A copy is over for
// what waits for it when its bytes are visible at the peer; the release store of the flags comes after that. Between two
// copies the link is idle for 4 to 8 us, on an H200: the first copy is half of the rows, the next one half of what is
// left, so that they are few and the receiver still has little to do when the last one arrives.

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

// The flags of the chunks [begin, end), which one copy brought.
__global__ void ep_publish_kernel(EpTrip trip, int begin, int end) {
  if (trip.failed()) return;
  const int peer = threadIdx.x;
  if (peer >= trip.ranks || peer == trip.me) return;
  for (int chunk = begin; chunk < end; ++chunk) store_release_sys(trip.flag(peer, trip.me, chunk), trip.epoch(kSent));
}

__global__ void __launch_bounds__(kThreads, 2)
    ep_encode_kernel(const uint4* rows, uint8_t* encoded, int64_t num_rows, int64_t units, int64_t width) {
  constexpr int kWarps = kThreads / kWarp;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp; i < num_rows;
       i += static_cast<int64_t>(gridDim.x) * kWarps) {
    fp8_encode_row(rows + i * units, encoded + i * width, units);
  }
}

// An event that lasts as long as the call; waits for what it recorded stay.
class Event {
 public:
  Event() { STD_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) const { STD_CUDA_CHECK(cudaEventRecord(event_, stream)); }
  void hold(cudaStream_t stream) const { STD_CUDA_CHECK(cudaStreamWaitEvent(stream, event_, 0)); }

 private:
  cudaEvent_t event_ = nullptr;
};

void ep_push_rows(
    const Tensor& peers, Tensor state, const Tensor& rows, std::optional<Tensor> encoded, const Tensor& words,
    const Tensor& addresses, int64_t words_stream, int64_t flags_stream, int64_t copies_stream) {
  const DeviceGuard guard(state.get_device_index());
  check_tensor(rows, "rows", rows.scalar_type(), 2);
  const EpTrip trip = read_trip(peers, state, words);
  check_width(trip, rows, "rows", encoded.has_value());
  const int64_t T = rows.size(0), chunks = ceil_div<int64_t>(T, trip.chunk_rows);
  STD_TORCH_CHECK(T <= trip.max_rows, "rows are ", T, ", the window holds ", trip.max_rows);
  STD_TORCH_CHECK(trip.width * trip.max_rows <= trip.data_block, "the window has no room for rows of ", trip.width);
  STD_TORCH_CHECK(
      !addresses.is_cuda() && addresses.scalar_type() == ScalarType::Long && addresses.numel() == trip.ranks,
      "addresses must be an int64 CPU tensor with one address for each of the ", trip.ranks, " ranks");
  STD_TORCH_CHECK(chunks <= trip.max_chunks, "the window has no flags for ", chunks, " chunks");
  if (encoded.has_value()) {
    check_tensor(*encoded, "encoded", ScalarType::Byte, 2);
    check_size(*encoded, "encoded", 0, T);
    check_size(*encoded, "encoded", 1, trip.width);
  }
  const cudaStream_t current = current_stream(state);
  const auto stream_of = [&](int64_t handle) { return handle != 0 ? reinterpret_cast<cudaStream_t>(handle) : current; };
  const cudaStream_t flags = stream_of(flags_stream), copies = stream_of(copies_stream);
  const Event event;  // recorded again and again: a wait means the record before it
  const auto follow = [&](cudaStream_t waiting, cudaStream_t other) {
    if (waiting != other) event.record(other), event.hold(waiting);
  };
  follow(flags, current);
  ep_open_kernel<<<1, kMostRanks, 0, flags>>>(trip);
  MOE_LAUNCH_CHECK();
  follow(stream_of(words_stream), flags);

  const uint8_t* source = static_cast<const uint8_t*>(rows.const_data_ptr());
  if (encoded.has_value()) {
    const int64_t wanted = ceil_div<int64_t>(T, kThreads / kWarp), most = 2 * sm_count(state.get_device_index());
    uint8_t* to = static_cast<uint8_t*>(encoded->mutable_data_ptr());
    if (T > 0) {
      ep_encode_kernel<<<static_cast<int>(wanted < most ? wanted : most), kThreads, 0, flags>>>(
          reinterpret_cast<const uint4*>(source), to, T, rows.size(1) / 8, trip.width);
      MOE_LAUNCH_CHECK();
    }
    source = to;
  }
  follow(copies, flags);
  const int64_t* windows = in_ptr<int64_t>(addresses);
  for (int64_t begin = 0, end = 0; begin < chunks; begin = end) {
    end = begin + (chunks - begin > 1 ? (chunks - begin) / 2 : 1);
    const int64_t first = begin * trip.chunk_rows, last = end * trip.chunk_rows < T ? end * trip.chunk_rows : T;
    for (int i = 1; i < trip.ranks; ++i) {
      const int peer = (trip.me + i) % trip.ranks;  // nearest first, so that no link is hit by all
      const int64_t target = windows[peer] + trip.data + trip.me * trip.data_block + first * trip.width;
      STD_CUDA_CHECK(cudaMemcpyAsync(
          reinterpret_cast<void*>(target), source + first * trip.width,
          static_cast<size_t>((last - first) * trip.width), cudaMemcpyDefault, copies));
    }
    follow(flags, copies);
    ep_publish_kernel<<<1, kMostRanks, 0, flags>>>(trip, static_cast<int>(begin), static_cast<int>(end));
    MOE_LAUNCH_CHECK();
  }
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_push_rows", TORCH_BOX(&moe_layer::ep_push_rows)); }
