// Copy the rows of a trip out of the window while they arrive, each to the rows of its experts. Twin of ep_take in
// moe_layer/ops/ep.py.
//
// Warps take rows: the own ones first, which are there already, then the peers' in the order in which they are sent. One
// lane waits for the flag of the row's chunk; the warp reads the row once and writes it up to K times. Rows and not
// chunks, so that no block is left with one chunk more than others: the copy is as long as its longest block.

#include "ep.cuh"
#include "ep_fp8.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 256, kAhead = 8, kBlocksPerSm = 3, kDecodeBlocksPerSm = 2;

struct TakeArgs {
  EpTrip trip;
  const void* rows;
  const int32_t* tokens_S;  // this rank's own list
  const int32_t* base_R1;
  const int32_t* counts_R;
  const int32_t* token_C;  // null: a source's row i is its i-th; else (dense push) its token's
  const int32_t* row_CK;
  const int32_t* slot_N;
  const int32_t* offsets_L1;
  void* out;
  int64_t out_rows;
  int64_t row_bytes;  // of `rows` and `out`
  int32_t num_rows, list, slots, num_compact, num_local, num_tokens;
};

// Where a unit of an arriving row comes from: the row as it is, or decoded; own rows take the same roundings.
template <typename Unit, bool kFp8>
__device__ __forceinline__ Unit read_unit(const uint8_t* row, bool own, int64_t unit, int64_t units) {
  if constexpr (kFp8) {
    Fp8Unit coded{};
    if (own) {
      uint4 x{};
      if (unit < units) x = __ldcg(reinterpret_cast<const uint4*>(row) + unit);
      coded = fp8_encode(x);
    } else if (unit < units) {
      coded.values = __ldcg(reinterpret_cast<const uint2*>(row) + unit);
      coded.scale = __ldcg(reinterpret_cast<const float*>(row + units * 8) + unit / 16);
    }
    return fp8_decode(coded);
  } else {
    return unit < units ? __ldcg(reinterpret_cast<const Unit*>(row) + unit) : Unit{};
  }
}

// The rows that compact row c goes to: lane k's, -1 where there is none. The whole warp calls it.
__device__ __forceinline__ int32_t read_targets(const TakeArgs& args, int64_t c) {
  const int lane = threadIdx.x % kWarp;
  int32_t row = -1;
  if (args.row_CK == nullptr) {
    if (lane == 0) row = static_cast<int32_t>(c);
  } else if (lane < args.slots && c < args.num_compact) {
    row = args.row_CK[c * args.slots + lane];
  }
  return row < args.out_rows ? row : -1;
}

template <typename Unit, bool kFp8>
__device__ __forceinline__ void copy_row(
    const TakeArgs& args, const uint8_t* from, bool own, int32_t mine, int64_t per_row) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kDepth = kFp8 ? 4 : kAhead;
  const int lane = threadIdx.x % kWarp;
  Unit* out = static_cast<Unit*>(args.out);
  const unsigned targets = __ballot_sync(kAll, mine >= 0);
  for (int64_t begin = 0; begin < per_row; begin += kWarp * kDepth) {
    Unit values[kDepth];
#pragma unroll
    for (int j = 0; j < kDepth; ++j) values[j] = read_unit<Unit, kFp8>(from, own, begin + j * kWarp + lane, per_row);
    for (unsigned left = targets; left != 0; left &= left - 1) {
      Unit* to = out + static_cast<int64_t>(__shfl_sync(kAll, mine, __ffs(left) - 1)) * per_row;
#pragma unroll
      for (int j = 0; j < kDepth; ++j) {
        const int64_t column = begin + j * kWarp + lane;
        if (column < per_row) to[column] = values[j];
      }
    }
  }
}

// A peer went on without this rank's credit, so that its copies may have overwritten what was read here (ep_dense.cu). All
// threads of the block call it, after everything has been read.
__device__ __forceinline__ bool gave_up(const EpTrip& trip) {
  bool found = false;
  if (threadIdx.x < trip.ranks) {
    found = load_acquire_sys(trip.word(trip.me, trip.fault, trip.ranks + threadIdx.x)) != 0;
    if (found) {
      const bool overflowed = load_acquire_sys(trip.word(trip.me, trip.fault, threadIdx.x)) != 0;
      const auto wanted = static_cast<int32_t>(trip.epoch(kReceived) + 1);
      trip.report(overflowed ? kPeerOverflow : kGaveUp, threadIdx.x, wanted, 0);
    }
  }
  return __syncthreads_or(found);
}

template <typename Unit, bool kFp8>
__global__ void __launch_bounds__(kThreads, 4) ep_take_kernel(TakeArgs args) {
  const EpTrip& trip = args.trip;
  __shared__ int32_t counts[kMostRanks];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint64_t until = now_ns() + trip.deadline_ns;
  const int64_t per_row = args.row_bytes / static_cast<int64_t>(sizeof(Unit));
  bool ok = wait_headers(trip, until, counts);
  if (!ok) {
    poison(args.out, args.out_rows * args.row_bytes);
    return;
  }
  const uint32_t epoch = trip.epoch(kReceived) + 1;

  if (args.slot_N != nullptr && args.offsets_L1 != nullptr) {
    const int64_t rows = min(static_cast<int64_t>(args.offsets_L1[args.num_local]), args.out_rows);
    for (int64_t n = blockIdx.x * (kThreads / kWarp) + warp; n < rows; n += gridDim.x * (kThreads / kWarp)) {
      if (args.slot_N[n] >= 0) continue;
      Unit* to = static_cast<Unit*>(args.out) + n * per_row;
      for (int64_t column = lane; column < per_row; column += kWarp) to[column] = Unit{};
    }
  }

  const uint8_t* own = static_cast<const uint8_t*>(args.rows);
  const int own_count = args.counts_R[trip.me];
  int most = 0;
  for (int r = 0; r < trip.ranks; ++r) {
    if (r != trip.me) most = max(most, args.counts_R[r]);
  }
  const int64_t items = own_count + static_cast<int64_t>(most) * (trip.ranks - 1);
  for (int64_t q = warp * static_cast<int64_t>(gridDim.x) + blockIdx.x; q < items;
       q += gridDim.x * static_cast<int64_t>(kThreads / kWarp)) {
    int source = trip.me;
    int64_t i = q;
    if (q >= own_count) nth_chunk(trip, q - own_count, source, i);  // row i of each peer in turn
    if (i >= args.counts_R[source]) continue;
    const int32_t targets = read_targets(args, args.base_R1[source] + i);
    int64_t place = i;
    if (args.token_C != nullptr && source != trip.me) {
      const int64_t c = args.base_R1[source] + i;
      place = c < args.num_tokens ? args.token_C[c] : -1;
      if (place < 0 || place >= trip.max_rows) {
        trip.report(kBadCount, source, trip.max_rows, static_cast<int32_t>(place));
        ok = false;
        break;
      }
    }
    const uint8_t* from = trip.rows(trip.me, source) + place * trip.width;
    if (source == trip.me) {
      const int32_t token = args.tokens_S[i];
      if (token < 0 || token >= args.num_rows) continue;
      from = own + token * args.row_bytes;
    } else {
      if (lane == 0) ok = spin(trip, trip.flag(trip.me, source, place / trip.chunk_rows), epoch, until, source);
      ok = __shfl_sync(0xffffffffu, ok, 0);
      __syncwarp();  // what one lane acquired, all may read
      if (!ok) break;
    }
    copy_row<Unit, kFp8>(args, from, source == trip.me, targets, per_row);
  }
  if (!__syncthreads_and(ok)) {
    poison(args.out, args.out_rows * args.row_bytes);
    return;
  }
  if (!last_block(trip, kReceiveTicket, gridDim.x)) return;
  if (gave_up(trip)) {
    poison(args.out, args.out_rows * args.row_bytes);
    return;
  }
  give_credits(trip);
}

void ep_take(
    const Tensor& peers, Tensor state, const Tensor& rows, const Tensor& tokens, const Tensor& base,
    const Tensor& counts, const std::optional<Tensor>& row_index, const std::optional<Tensor>& slot,
    const std::optional<Tensor>& offsets, const Tensor& words, Tensor out, bool fp8,
    const std::optional<Tensor>& token_C) {
  const DeviceGuard guard(state.get_device_index());
  check_tensor(rows, "rows", rows.scalar_type(), 2);
  check_tensor(tokens, "tokens", ScalarType::Int, 2);
  check_tensor(base, "base", ScalarType::Int, 1);
  check_tensor(counts, "counts", ScalarType::Int, 1);
  check_tensor(out, "out", out.scalar_type(), 2);
  TakeArgs args{};
  args.trip = read_trip(peers, state, words);
  check_width(args.trip, rows, "rows", fp8);
  check_width(args.trip, out, "out", fp8);
  args.row_bytes = out.size(1) * static_cast<int64_t>(out.element_size());
  args.rows = rows.const_data_ptr();
  args.tokens_S = in_ptr<int32_t>(tokens) + args.trip.me * tokens.size(1);
  args.base_R1 = in_ptr<int32_t>(base);
  args.counts_R = in_ptr<int32_t>(counts);
  args.num_rows = to_int32(rows.size(0), "rows");
  args.list = to_int32(tokens.size(1), "list");
  args.out = out.mutable_data_ptr();
  args.out_rows = out.size(0);
  if (row_index.has_value()) {
    check_tensor(*row_index, "row_CK", ScalarType::Int, 2);
    args.row_CK = in_ptr<int32_t>(*row_index);
    args.num_compact = to_int32(row_index->size(0), "compact rows");
    args.slots = to_int32(row_index->size(1), "slots");
    STD_TORCH_CHECK(args.slots <= kWarp, "ep_take serves at most 32 slots, got ", args.slots);
  }
  if (token_C.has_value()) {
    check_tensor(*token_C, "token_C", ScalarType::Int, 1);
    args.token_C = in_ptr<int32_t>(*token_C);
    args.num_tokens = to_int32(token_C->size(0), "token_C");
  }
  if (offsets.has_value()) {
    check_tensor(*offsets, "offsets", ScalarType::Int, 1);
    args.offsets_L1 = in_ptr<int32_t>(*offsets);
    args.num_local = to_int32(offsets->size(0) - 1, "local experts");
  }
  if (slot.has_value()) {
    check_tensor(*slot, "slot_N", ScalarType::Int, 1);
    STD_TORCH_CHECK(slot->size(0) >= out.size(0), "slot_N must cover the rows of out");
    args.slot_N = in_ptr<int32_t>(*slot);
  }
  const cudaStream_t stream = current_stream(state);
  const int64_t wanted =
      ceil_div<int64_t>(static_cast<int64_t>(args.trip.max_rows) * args.trip.ranks, kThreads / kWarp);
  const int64_t most = (fp8 ? kDecodeBlocksPerSm : kBlocksPerSm) * sm_count(state.get_device_index());
  const int grid = static_cast<int>(wanted < most ? wanted : most);
  const auto run = [&](auto kernel) {
    prefer_shared_memory(kernel);
    kernel<<<grid, kThreads, 0, stream>>>(args);
  };
  if (fp8) {
    run(ep_take_kernel<uint4, true>);
  } else if (args.trip.width % 16 == 0 && reinterpret_cast<uintptr_t>(args.rows) % 16 == 0) {
    run(ep_take_kernel<uint4, false>);
  } else {
    run(ep_take_kernel<uint8_t, false>);
  }
  MOE_LAUNCH_CHECK();
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_take", TORCH_BOX(&moe_layer::ep_take)); }
