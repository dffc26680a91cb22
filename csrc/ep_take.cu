// Copy the rows of a trip out of the window while they arrive, each to the rows of its experts, which are known (ep_take) or
// follow from the words that arrive with the row (ep_expand): a slot's row is the first one of its (expert, source rank),
// which the counts told (ep_arrange), plus its place among that source's slots of the expert. No sort, and the own rows
// need not wait for anything else. Twins: moe_layer/ops/ep_receive.py, ep_expand.py.
//
// Warps take rows: the own ones first, which are there already, or in turn with the peers' in the order in which these are
// sent. One lane waits for the flag of the row's chunk; the warp reads the row once and writes it up to K times. Rows and
// not chunks, so that no block is left with one chunk more than others: the copy is as long as its longest block.

#include "ep_copy.cuh"
#include "ep_place.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 256, kBlocksPerSm = 3, kDecodeBlocksPerSm = 2;

// The q-th row to take: the n-th of the peers' where n, the answer, is not negative, else the own row i.
__device__ __forceinline__ int split_rows(int q, int own, int others, bool mixed, int64_t& i) {
  if (!mixed) {
    i = q;
    return q - own;
  }
  if (q < 2 * min(own, others)) {
    i = q / 2;
    return q % 2 == 0 ? -1 : q / 2;
  }
  i = q - others;
  return own > others ? -1 : q - own;
}

// The warp waits for the words of a source.
__device__ __forceinline__ bool have_words(const EpTrip& trip, int source, uint32_t epoch, uint64_t until) {
  bool ok = true;
  if (threadIdx.x % kWarp == 0) ok = spin(trip, trip.words_ready(trip.me, source), epoch, until, source);
  ok = __shfl_sync(0xffffffffu, ok, 0);
  __syncwarp();
  return ok;
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

template <typename Unit, bool kFp8, bool kExpand>
__global__ void __launch_bounds__(kThreads, 4) ep_take_kernel(TakeArgs args) {
  const EpTrip& trip = args.trip;
  __shared__ int32_t counts[kMostRanks], rows_of[kMostRanks], base[kMostRanks + 1], end_of_rows;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint64_t until = now_ns() + trip.deadline_ns;
  const int64_t per_row = args.row_bytes / static_cast<int64_t>(sizeof(Unit));
  if constexpr (kExpand) await_previous_kernel();  // ep_arrange
  if (threadIdx.x <= trip.ranks) base[threadIdx.x] = args.base_R1[threadIdx.x];
  if (threadIdx.x < trip.ranks) rows_of[threadIdx.x] = args.counts_R[threadIdx.x];
  if (kExpand && threadIdx.x == kWarp) end_of_rows = args.offsets_L1[args.num_local];
  bool ok = kExpand ? !trip.failed() : wait_headers(trip, until, counts);  // ep_arrange waited
  if (!__syncthreads_and(ok)) {
    give_up(args);
    return;
  }
  const uint32_t epoch = trip.epoch(kReceived) + 1;

  if constexpr (kExpand) {
    clear_rest<Unit>(args, per_row, end_of_rows, base[trip.ranks]);
  } else if (args.slot_N != nullptr && args.offsets_L1 != nullptr) {
    const int64_t rows = min(static_cast<int64_t>(args.offsets_L1[args.num_local]), args.out_rows);
    for (int64_t n = blockIdx.x * (kThreads / kWarp) + warp; n < rows; n += gridDim.x * (kThreads / kWarp)) {
      if (args.slot_N[n] < 0) clear_row<Unit>(args.out, n, per_row);
    }
  }

  const uint8_t* own = static_cast<const uint8_t*>(args.rows);
  const int own_count = rows_of[trip.me];
  int most = 0;
  for (int r = 0; r < trip.ranks; ++r) {
    if (r != trip.me) most = max(most, rows_of[r]);
  }
  const int others = most * (trip.ranks - 1);
  const unsigned items = (own_count + static_cast<unsigned>(others)) * args.parts;
  const int pieces = static_cast<int>(ceil_div<int64_t>(per_row, kWarp));
  for (unsigned item = warp * gridDim.x + blockIdx.x; item < items; item += gridDim.x * (kThreads / kWarp)) {
    const int q = item / args.parts, part = item % args.parts;
    const int begin = pieces * part / args.parts * kWarp;
    const int end = min(pieces * (part + 1) / args.parts * kWarp, static_cast<int>(per_row));
    int source = trip.me;
    int64_t i = 0;
    const int other = split_rows(q, own_count, others, args.mixed, i);
    if (other >= 0) nth_chunk(trip, other, source, i);  // row i of each peer in turn
    if (i >= rows_of[source]) continue;
    const int64_t c = base[source] + i;
    const uint8_t* from = nullptr;
    int32_t token = -1;
    if (source == trip.me) {
      token = args.tokens_S[i];
      if (token < 0 || token >= args.num_rows) continue;
      from = own + token * args.row_bytes;
    } else {
      if constexpr (kExpand) {
        if (args.expand.dense && !have_words(trip, source, epoch, until)) {
          ok = false;
          break;
        }
      }
      const int64_t place = find_row<kExpand>(args, source, i, c);
      if (place < 0) {
        trip.report(kBadCount, source, trip.max_rows, static_cast<int32_t>(place));
        ok = false;
        break;
      }
      from = trip.rows(trip.me, source) + place * trip.width;
      if (lane == 0) ok = spin(trip, trip.flag(trip.me, source, place / trip.chunk_rows), epoch, until, source);
      ok = __shfl_sync(0xffffffffu, ok, 0);
      __syncwarp();  // what one lane acquired, all may read
      if (!ok) break;
    }
    int32_t target;
    if constexpr (kExpand) {
      if (c >= args.num_compact) continue;
      target = place_row(args, source, i, c, token, part == 0);
      if (target >= args.out_rows) target = -1;
    } else {
      target = read_targets(args, c);
    }
    if constexpr (kFp8) {
      source == trip.me ? round_row(from, target, args.out, begin, end, per_row)
                        : decode_row(from, target, args.out, begin, end, per_row);
    } else {
      copy_row<Unit>(from, target, args.out, begin, end, per_row);
    }
  }
  if (!__syncthreads_and(ok)) {
    give_up(args);
    return;
  }
  if (!last_block(trip, kReceiveTicket, gridDim.x)) return;
  gave_up(trip) ? give_up(args) : give_credits(trip);
}

// The arguments that both ops have.
TakeArgs read_take(
    const Tensor& peers, Tensor& state, const Tensor& rows, const Tensor& tokens, const Tensor& base,
    const Tensor& counts, const Tensor& words, Tensor& out, bool fp8) {
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
  args.out = out.mutable_data_ptr();
  args.out_rows = out.size(0);
  return args;
}

template <bool kExpand>
void launch_take(TakeArgs args, const Tensor& state, bool fp8) {
  const int64_t rows = static_cast<int64_t>(args.trip.max_rows) * args.trip.ranks;
  const int64_t most = (fp8 ? kDecodeBlocksPerSm : kBlocksPerSm) * sm_count(state.get_device_index());
  // Small parts: what the warps have in hand when the last row arrives is what remains to be done; but a few loads of a
  // warp in flight, unless there would be idle warps.
  const int64_t warps = most * (kThreads / kWarp), pieces = args.row_bytes / (16 * kWarp);
  // Copying the own rows to all their places at once would take the memory from those that leave at the same time.
  args.mixed = !fp8 && (kExpand ? args.expand.index_N == nullptr : args.row_CK != nullptr);
  to_int32(rows * 4, "parts of rows");
  args.parts = 1;
  while (args.parts < 4 &&
         (rows * args.parts < warps || (rows * args.parts < 4 * warps && pieces >= 16 * args.parts))) {
    args.parts *= 2;
  }
  const int64_t wanted = ceil_div<int64_t>(rows * args.parts, kThreads / kWarp);
  const int grid = static_cast<int>(wanted < most ? wanted : most);
  const auto run = [&](auto kernel) {
    prefer_shared_memory(kernel);
    if constexpr (kExpand) {
      launch_beside(kernel, grid, kThreads, 0, current_stream(state), args);
    } else {
      kernel<<<grid, kThreads, 0, current_stream(state)>>>(args);
    }
  };
  if (fp8) {
    run(ep_take_kernel<uint4, true, kExpand>);
  } else if (args.trip.width % 16 == 0 && reinterpret_cast<uintptr_t>(args.rows) % 16 == 0) {
    run(ep_take_kernel<uint4, false, kExpand>);
  } else {
    run(ep_take_kernel<uint8_t, false, kExpand>);
  }
  MOE_LAUNCH_CHECK();
}

void ep_take(
    const Tensor& peers, Tensor state, const Tensor& rows, const Tensor& tokens, const Tensor& base,
    const Tensor& counts, const std::optional<Tensor>& row_index, const std::optional<Tensor>& slot,
    const std::optional<Tensor>& offsets, const Tensor& words, Tensor out, bool fp8,
    const std::optional<Tensor>& token_C) {
  const DeviceGuard guard(state.get_device_index());
  TakeArgs args = read_take(peers, state, rows, tokens, base, counts, words, out, fp8);
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
  launch_take<false>(args, state, fp8);
}

using Tables = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tables ep_expand(
    const Tensor& peers, Tensor state, const Tensor& rows, const Tensor& tokens, const Tensor& ids_TK,
    const Tensor& places_TK, const Tensor& weights_TK, const Tensor& base, const Tensor& counts, const Tensor& first_RL,
    const Tensor& offsets, const Tensor& words, Tensor out, int64_t first_expert, int64_t num_compact, int64_t num_rows,
    bool compact, bool fp8, bool dense) {
  const DeviceGuard guard(state.get_device_index());
  TakeArgs args = read_take(peers, state, rows, tokens, base, counts, words, out, fp8);
  check_tensor(ids_TK, "ids_TK", ScalarType::Int, 2);
  check_tensor(places_TK, "places_TK", ScalarType::Int, 2);
  check_tensor(weights_TK, "weights_TK", ScalarType::Float, 2);
  check_tensor(first_RL, "first_RL", ScalarType::Int, 2);
  check_tensor(offsets, "offsets_L1", ScalarType::Int, 1);
  const int64_t K = ids_TK.size(1), L = first_RL.size(1);
  for (const Tensor* one : {&ids_TK, &places_TK, &weights_TK}) {
    check_size(*one, "ids_TK, places_TK and weights_TK", 0, rows.size(0));
    check_size(*one, "ids_TK, places_TK and weights_TK", 1, K);
  }
  check_size(first_RL, "first_RL", 0, args.trip.ranks + 1);
  check_size(offsets, "offsets_L1", 0, L + 1);
  STD_TORCH_CHECK(K >= 1 && K <= kWarp, "ep_expand serves 1 to 32 slots, got ", K);
  STD_TORCH_CHECK(
      out.size(0) >= (compact ? num_compact : num_rows), "out must have ", compact ? num_compact : num_rows,
      " rows, got ", out.size(0));
  check_words_fit(args.trip, K, L);
  to_int32(num_compact * K, "compact slots");
  constexpr ScalarType i32 = ScalarType::Int;
  Tensor token = new_empty(state, {num_compact}, i32), rank = new_empty(state, {num_compact}, i32);
  Tensor ids = new_empty(state, {num_compact, K}, i32), row = new_empty(state, {num_compact, K}, i32);
  Tensor slot = new_empty(state, {num_rows}, i32), probs = new_empty(state, {num_rows}, ScalarType::Float);
  Tensor index = new_empty(state, {compact ? num_rows : 0}, i32);
  args.offsets_L1 = in_ptr<int32_t>(offsets);
  args.num_local = to_int32(L, "local experts");
  args.num_compact = to_int32(num_compact, "num_compact");
  args.slots = to_int32(K, "slots");
  args.expand = {
      in_ptr<int32_t>(ids_TK),
      in_ptr<int32_t>(places_TK),
      in_ptr<float>(weights_TK),
      in_ptr<int32_t>(first_RL),
      out_ptr<int32_t>(token),
      out_ptr<int32_t>(rank),
      out_ptr<int32_t>(ids),
      out_ptr<int32_t>(row),
      out_ptr<int32_t>(slot),
      out_ptr<float>(probs),
      compact ? out_ptr<int32_t>(index) : nullptr,
      to_int32(first_expert, "first_expert"),
      to_int32(num_rows, "num_rows"),
      dense};
  launch_take<true>(args, state, fp8);
  return {token, rank, ids, row, slot, probs, index};
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) {
  m.impl("ep_take", TORCH_BOX(&moe_layer::ep_take));
  m.impl("ep_expand", TORCH_BOX(&moe_layer::ep_expand));
}
