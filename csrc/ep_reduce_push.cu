// Send the partial row of each received token home: the tree over its rows, rounded to the wire's dtype and written into
// the source's window. Twin of ep_reduce_push in moe_layer/ops/ep.py.

#include "ep_combine.cuh"

namespace moe_layer {

PartialArgs read_partial(
    const EpTrip& trip, const Tensor& rows, const Tensor& row_index, const Tensor& ids, const Tensor& base,
    const std::optional<Tensor>& probs, int64_t wire, int64_t num_experts, int64_t tree_blocks, bool compact) {
  check_tensor(rows, "rows", rows.scalar_type(), 2);
  check_tensor(row_index, "row_CK", ScalarType::Int, 2);
  check_tensor(ids, "ids_CK", ScalarType::Int, 2);
  check_tensor(base, "base", ScalarType::Int, 1);
  check_size(base, "base", 0, trip.ranks + 1);
  PartialArgs args{};
  args.rows = rows.const_data_ptr();
  args.row_CK = in_ptr<int32_t>(row_index);
  args.ids_CK = in_ptr<int32_t>(ids);
  args.base_R1 = in_ptr<int32_t>(base);
  if (probs.has_value()) {
    check_tensor(*probs, "probs_N", ScalarType::Float, 1);
    args.probs_N = in_ptr<float>(*probs);
  }
  args.num_rows = compact && probs.has_value() ? probs->size(0) : rows.size(0);
  args.num_compact = to_int32(row_index.size(0), "compact rows");
  args.slots = to_int32(row_index.size(1), "slots");
  args.hidden = to_int32(rows.size(1), "hidden");
  args.num_experts = to_int32(num_experts, "num_experts");
  args.tree_blocks = to_int32(tree_blocks, "tree_blocks");
  args.wire = to_int32(wire, "wire");
  args.compact = compact;
  const bool divides = tree_blocks % trip.ranks == 0;
  args.own_blocks = static_cast<int32_t>(divides ? tree_blocks / trip.ranks : tree_blocks);
  args.first_block = divides && !compact ? trip.me * args.own_blocks : 0;
  STD_TORCH_CHECK(args.slots <= kWarp, "nvlink serves at most 32 slots, got ", args.slots);
  STD_TORCH_CHECK(tree_blocks <= 8, "nvlink serves at most 8 tree blocks, got ", tree_blocks);
  STD_TORCH_CHECK(
      args.hidden * static_cast<int64_t>(rows.element_size()) % 16 == 0, "rows must be whole 16-byte units wide, got ",
      args.hidden, " columns");
  STD_TORCH_CHECK(args.hidden * wire_bytes(args.wire) == trip.width, "the trip's rows are ", trip.width, " bytes");
  STD_TORCH_CHECK(
      trip.width * trip.max_rows <= trip.data_block, "the window has no room for rows of ", trip.width, " bytes");
  STD_TORCH_CHECK(
      !probs.has_value() || args.slots * 4 * static_cast<int64_t>(trip.max_rows) <= trip.meta_block,
      "the window has no room for ", args.slots, " words a row");
  return args;
}

namespace {

// Each block takes chunks, the peers in turn, and its warps parts of rows as they come free: one that waits for a fence
// holds nobody back.
template <typename T, int kBlocks>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2) ep_reduce_push_kernel(EpTrip trip, PartialArgs args) {
  extern __shared__ __align__(16) unsigned char rings[];
  __shared__ int32_t arrived[kArrivals], next;
  constexpr int V = 16 / sizeof(T);
  const int lane = threadIdx.x % kWarp;
  unsigned char* ring = rings + threadIdx.x / kWarp * kPushBytes;
  if (threadIdx.x < kArrivals) arrived[threadIdx.x] = 0;
  if (threadIdx.x == 0) next = 0;
  if (!wait_credits(trip, now_ns() + trip.deadline_ns)) return;
  const uint32_t epoch = trip.epoch(kSent) + 1;
  if (blockIdx.x == 0 && threadIdx.x < trip.ranks) {
    write_header(trip, epoch, threadIdx.x, args.base_R1[threadIdx.x + 1] - args.base_R1[threadIdx.x]);
  }
  int most = 0;
  for (int r = 0; r < trip.ranks; ++r) {
    if (r != trip.me) most = max(most, args.base_R1[r + 1] - args.base_R1[r]);
  }
  most = min(most, trip.max_rows);
  const int64_t row_bytes = args.hidden * static_cast<int64_t>(sizeof(T));
  const int pieces = ceil_div(args.hidden, V * kWarp), each = trip.chunk_rows * args.parts;
  const int64_t chunks = static_cast<int64_t>(ceil_div(most, trip.chunk_rows)) * (trip.ranks - 1);
  for (;;) {
    const int item = claim(&next), n = item / each;
    const int64_t q = blockIdx.x + static_cast<int64_t>(n) * gridDim.x;
    if (q >= chunks) break;
    int peer;
    int64_t chunk;
    nth_chunk(trip, q, peer, chunk);
    const int base = args.base_R1[peer], count = min(args.base_R1[peer + 1] - base, trip.max_rows);
    const int part = item % args.parts, j = static_cast<int>(chunk) * trip.chunk_rows + item % each / args.parts;
    const int begin = pieces * part / args.parts, end = pieces * (part + 1) / args.parts;
    if (j < count && begin < end) {
      const SlotList list = list_slots(args, base + j);
      const BlockEnds<kBlocks> blocks(list);
      RowStream<kPushRing> stream(
          ring, list.address(args, row_bytes), list.count, static_cast<int>(row_bytes), begin, end);
      uint8_t* to = trip.rows(peer, trip.me) + j * trip.width;
      for (int piece = begin; piece < end; ++piece) {
        float sum[V];
        sum_rows<T, V>(stream, blocks, sum);
        const int d = (piece * kWarp + lane) * V;
        if (d < args.hidden) store_wire<V>(to, args.wire, d, sum);
      }
    }
    if (args.probs_N != nullptr && part == 0 && j < count && lane < args.slots) {
      const int row = args.row_CK[static_cast<int64_t>(base + j) * args.slots + lane];
      const float value = row >= 0 && row < args.num_rows ? args.probs_N[row] : 0.0f;
      reinterpret_cast<float*>(trip.words(peer, trip.me))[static_cast<int64_t>(j) * args.slots + lane] = value;
    }
    finish_part(trip, arrived, n, each, peer, chunk, epoch);
  }
  if (last_block(trip, kSendTicket, gridDim.x) && threadIdx.x == 0) {
    trip.state[trip.counters + kSent] = static_cast<int32_t>(epoch);
  }
}

void ep_reduce_push(
    const Tensor& peers, Tensor state, const Tensor& rows, const Tensor& row_index, const Tensor& ids,
    const Tensor& base, const std::optional<Tensor>& probs, const Tensor& words, int64_t wire, int64_t num_experts,
    int64_t tree_blocks, bool compact, int64_t blocks) {
  const DeviceGuard guard(state.get_device_index());
  const EpTrip trip = read_trip(peers, state, words);
  PartialArgs args = read_partial(trip, rows, row_index, ids, base, probs, wire, num_experts, tree_blocks, compact);
  const cudaStream_t stream = current_stream(state);
  const int grid = to_int32(blocks, "blocks"), warps = choose_warps(state.get_device_index());
  // All warps of a block at one chunk: it is soon whole, and a warp has stored little before it is.
  const int64_t pieces = ceil_div<int64_t>(rows.size(1) * static_cast<int64_t>(rows.element_size()), kUnit);
  args.parts = warps / trip.chunk_rows;
  if (args.parts > pieces / 2) args.parts = static_cast<int32_t>(pieces / 2);  // no less than two pieces
  if (args.parts < 1) args.parts = 1;
  dispatch_partial(rows.scalar_type(), args, [&](auto zero, auto blocks_c) {
    const auto kernel = ep_reduce_push_kernel<decltype(zero), blocks_c.value>;
    allow_rings(kernel, warps * kPushBytes);
    kernel<<<grid, warps * kWarp, warps * kPushBytes, stream>>>(trip, args);
  });
  MOE_LAUNCH_CHECK();
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_reduce_push", TORCH_BOX(&moe_layer::ep_reduce_push)); }
