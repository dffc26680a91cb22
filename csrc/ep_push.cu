// Send rows of a list to each rank: counts and headers first, then rows with their words, in flagged chunks; or, where the
// rows fly already (ep_dense.cu), counts and headers, then words. Twin of ep_push in moe_layer/ops/ep.py.
//
// Each block takes chunks, the peers in turn, and its warps rows as they come free; a warp copies a row with eight 16-byte
// loads a lane in flight, or encodes it on the way. A row's words travel with it: behind a full link a launch of their own
// would hold the rows back, and words that arrive later than the rows hold the receiver back. (Bulk copies through shared
// memory, 16 to 32 blocks with 64 to 128 KiB each, were slower on two H200s.)

#include "ep.cuh"
#include "ep_fp8.cuh"

namespace moe_layer {
namespace {

// To encode takes longer than to copy, and half of a multiprocessor's registers instead of a quarter.
constexpr int kAhead = 8, kCopyThreads = 256, kEncodeThreads = 512;
constexpr int kCopyBlocks = 64, kEncodeBlocks = 128;  // where the caller has no wish

struct PushArgs {
  EpTrip trip;
  const void* rows;
  const int32_t* tokens_RS;
  const int32_t* counts_R;
  const int32_t* meta0;
  const int32_t* places;  // as wide as meta0
  const int32_t* meta1;
  const int32_t* counts_E;  // null: nobody asked
  int64_t row_bytes;        // of `rows`; the trip's width is that of the encoded row
  int32_t num_rows, list, words0, words1, num_local;

  __device__ int words() const { return meta0 == nullptr ? 0 : 1 + words0 * (places == nullptr ? 1 : 2) + words1; }
};

// The rows for each peer. A list longer than the window would overwrite the next region: it is cut, and the count says so
// to the receiver. All threads of the block call it.
__device__ __forceinline__ void read_counts(const PushArgs& args, int32_t* counts) {
  const EpTrip& trip = args.trip;
  if (threadIdx.x < trip.ranks) {
    counts[threadIdx.x] = args.counts_R[threadIdx.x];
    if (counts[threadIdx.x] > trip.max_rows || counts[threadIdx.x] > args.list) {
      if (blockIdx.x == 0) trip.report(kBadCount, trip.me, trip.max_rows, counts[threadIdx.x]);
      counts[threadIdx.x] = 0;
    }
  }
  __syncthreads();
}

// What the receivers need to know where each expert's rows begin, and how many come. All threads of one block call it.
__device__ __forceinline__ void announce(const PushArgs& args, const int32_t* counts, uint32_t epoch) {
  const EpTrip& trip = args.trip;
  for (int e = threadIdx.x; e < args.num_local * trip.ranks; e += blockDim.x) {
    const int peer = e / args.num_local;
    uint64_t* to = trip.expert_counts(peer, trip.me, args.num_local);
    store_pair(to + e - peer * args.num_local, epoch, args.counts_E[e]);
  }
  if (threadIdx.x < trip.ranks) write_header(trip, epoch, threadIdx.x, counts[threadIdx.x]);
}

// Word w of a row: its token, then the token's words of meta0, places and meta1.
__device__ __forceinline__ int32_t read_word(const PushArgs& args, int64_t token, int w) {
  if (w == 0) return static_cast<int32_t>(token);
  w -= 1;
  if (w < args.words0) return args.meta0[token * args.words0 + w];
  w -= args.words0;
  if (args.places != nullptr) {
    if (w < args.words0) return args.places[token * args.words0 + w];
    w -= args.words0;
  }
  return args.meta1[token * args.words1 + w];
}

// Headers and words of a dense push, a warp for a row's: ep_push_rows took the slot and sends the rows. Behind a full
// link the words take long to arrive: receivers begin with their own rows, for which the counts suffice.
__global__ void __launch_bounds__(kCopyThreads) ep_words_kernel(PushArgs args) {
  const EpTrip& trip = args.trip;
  __shared__ int32_t counts[kMostRanks];
  if (trip.failed()) return;
  read_counts(args, counts);
  if (blockIdx.x == 0) announce(args, counts, trip.epoch(kSent));
  const int words = args.words(), warps = static_cast<int>(gridDim.x) * (kCopyThreads / kWarp);
  for (int peer = 0; words > 0 && peer < trip.ranks; ++peer) {
    if (peer == trip.me) continue;
    for (int i = (blockIdx.x * kCopyThreads + threadIdx.x) / kWarp; i < counts[peer]; i += warps) {
      const int64_t token = args.tokens_RS[static_cast<int64_t>(peer) * args.list + i];
      if (token < 0 || token >= args.num_rows) continue;
      int32_t* to = trip.words(peer, trip.me) + static_cast<int64_t>(i) * words;
      for (int w = threadIdx.x % kWarp; w < words; w += kWarp) to[w] = read_word(args, token, w);
    }
  }
  if (words > 0 && last_block(trip, kMetaTicket, gridDim.x) && threadIdx.x < trip.ranks) {
    store_release_sys(trip.words_ready(threadIdx.x, trip.me), trip.epoch(kSent));
  }
}

template <typename Unit>
__device__ __forceinline__ void copy_row(const Unit* from, Unit* to, int64_t units) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t begin = lane; begin < units; begin += kWarp * kAhead) {
    Unit values[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (begin + j * kWarp < units) values[j] = from[begin + j * kWarp];
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (begin + j * kWarp < units) to[begin + j * kWarp] = values[j];
    }
  }
}

template <typename Unit, bool kFp8>
__global__ void __launch_bounds__(kFp8 ? kEncodeThreads : kCopyThreads, kFp8 ? 2 : 4) ep_push_kernel(PushArgs args) {
  const EpTrip& trip = args.trip;
  __shared__ int32_t counts[kMostRanks], arrived[kArrivals], next;
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x < kArrivals) arrived[threadIdx.x] = 0;
  if (threadIdx.x == 0) next = 0;
  if (!wait_credits(trip, now_ns() + trip.deadline_ns)) return;
  const uint32_t epoch = trip.epoch(kSent) + 1;
  read_counts(args, counts);
  if (blockIdx.x == 0) announce(args, counts, epoch);

  const int64_t per_row = args.row_bytes / static_cast<int64_t>(sizeof(Unit));
  const int words = args.words();
  int most = 0;
  for (int peer = 0; peer < trip.ranks; ++peer) {
    if (peer != trip.me) most = max(most, counts[peer]);
  }
  const int64_t chunks = static_cast<int64_t>(ceil_div(most, trip.chunk_rows)) * (trip.ranks - 1);
  for (;;) {
    const int item = claim(&next), n = item / trip.chunk_rows;
    const int64_t q = blockIdx.x + static_cast<int64_t>(n) * gridDim.x;
    if (q >= chunks) break;
    int peer;
    int64_t chunk;
    nth_chunk(trip, q, peer, chunk);
    const int64_t i = chunk * trip.chunk_rows + item % trip.chunk_rows;
    const int64_t token = i < counts[peer] ? args.tokens_RS[static_cast<int64_t>(peer) * args.list + i] : -1;
    if (token >= 0 && token < args.num_rows) {
      const int32_t word = lane < words ? read_word(args, token, lane) : 0;
      const Unit* from = static_cast<const Unit*>(args.rows) + token * per_row;
      uint8_t* to = trip.rows(peer, trip.me) + i * trip.width;
      if constexpr (kFp8) {
        fp8_encode_row(from, to, per_row);
      } else {
        copy_row(from, reinterpret_cast<Unit*>(to), per_row);
      }
      int32_t* words_to = trip.words(peer, trip.me) + i * words;
      if (lane < words) words_to[lane] = word;
      for (int w = lane + kWarp; w < words; w += kWarp) words_to[w] = read_word(args, token, w);
    }
    finish_part(trip, arrived, n, trip.chunk_rows, peer, chunk, epoch);
  }
  if (last_block(trip, kSendTicket, gridDim.x) && threadIdx.x == 0) {
    trip.state[trip.counters + kSent] = static_cast<int32_t>(epoch);
  }
}

void ep_push(
    const Tensor& peers, Tensor state, const Tensor& rows, const Tensor& tokens, const Tensor& counts,
    const std::optional<Tensor>& meta0, const std::optional<Tensor>& places, const std::optional<Tensor>& meta1,
    const std::optional<Tensor>& counts_E, const Tensor& words, int64_t blocks, bool fp8, bool dense) {
  const DeviceGuard guard(state.get_device_index());
  check_tensor(rows, "rows", rows.scalar_type(), 2);
  check_tensor(tokens, "tokens", ScalarType::Int, 2);
  check_tensor(counts, "counts", ScalarType::Int, 1);
  PushArgs args{};
  args.trip = read_trip(peers, state, words);
  check_size(tokens, "tokens", 0, args.trip.ranks);
  check_size(counts, "counts", 0, args.trip.ranks);
  args.row_bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
  check_width(args.trip, rows, "rows", fp8);
  args.rows = rows.const_data_ptr();
  args.tokens_RS = in_ptr<int32_t>(tokens);
  args.counts_R = in_ptr<int32_t>(counts);
  args.num_rows = to_int32(rows.size(0), "rows");
  args.list = to_int32(tokens.size(1), "list");
  int64_t sent_words = 0;
  if (meta0.has_value()) {
    STD_TORCH_CHECK(meta0->is_contiguous() && meta0->element_size() == 4, "meta0 must be contiguous words");
    check_size(*meta0, "meta0", 0, rows.size(0));
    args.meta0 = static_cast<const int32_t*>(meta0->const_data_ptr());
    args.words0 = to_int32(meta0->size(1), "meta0");
    sent_words = 1 + meta0->size(1);
  }
  if (meta1.has_value()) {
    STD_TORCH_CHECK(meta1->is_contiguous() && meta1->element_size() == 4, "meta1 must be contiguous words");
    check_size(*meta1, "meta1", 0, rows.size(0));
    args.meta1 = static_cast<const int32_t*>(meta1->const_data_ptr());
    args.words1 = to_int32(meta1->size(1), "meta1");
    sent_words += meta1->size(1);
  }
  if (places.has_value()) {
    STD_TORCH_CHECK(meta0.has_value(), "places go with meta0: pass it too");
    check_tensor(*places, "places", ScalarType::Int, 2);
    check_size(*places, "places", 0, rows.size(0));
    check_size(*places, "places", 1, meta0->size(1));
    args.places = in_ptr<int32_t>(*places);
    sent_words += places->size(1);
  }
  if (counts_E.has_value()) {
    STD_TORCH_CHECK(meta0.has_value(), "counts_E goes with the words of rows: pass meta0 too");
    check_tensor(*counts_E, "counts_E", ScalarType::Int, 1);
    args.counts_E = in_ptr<int32_t>(*counts_E);
    args.num_local = to_int32(counts_E->size(0) / args.trip.ranks, "counts_E");
  }
  STD_TORCH_CHECK(
      (sent_words * args.trip.max_rows + 2 * args.num_local) * 4 <= args.trip.meta_block, "the window has no room for ",
      sent_words, " words a row and ", args.num_local, " counts");
  STD_TORCH_CHECK(
      args.trip.width * args.trip.max_rows <= args.trip.data_block, "the window has no room for rows of ",
      args.trip.width, " bytes");
  const cudaStream_t stream = current_stream(state);
  const bool wide = args.trip.width % 16 == 0 && reinterpret_cast<uintptr_t>(args.rows) % 16 == 0;
  if (dense) {
    const int64_t wanted = ceil_div<int64_t>(args.list * (args.trip.ranks - 1), kCopyThreads / kWarp);
    const int64_t most = blocks > 0 ? blocks : sm_count(state.get_device_index());
    const int64_t some = args.meta0 == nullptr || wanted < 1 ? 1 : wanted < most ? wanted : most;
    ep_words_kernel<<<static_cast<int>(some), kCopyThreads, 0, stream>>>(args);
    MOE_LAUNCH_CHECK();
    return;
  }
  const int grid = blocks > 0 ? to_int32(blocks, "blocks") : fp8 ? kEncodeBlocks : kCopyBlocks;
  if (fp8) {
    ep_push_kernel<uint4, true><<<grid, kEncodeThreads, 0, stream>>>(args);
  } else if (wide) {
    ep_push_kernel<uint4, false><<<grid, kCopyThreads, 0, stream>>>(args);
  } else {
    ep_push_kernel<uint8_t, false><<<grid, kCopyThreads, 0, stream>>>(args);
  }
  MOE_LAUNCH_CHECK();
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_push", TORCH_BOX(&moe_layer::ep_push)); }
