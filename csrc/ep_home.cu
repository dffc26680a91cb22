// Sum each token's partial rows at home: the own rows by the tree, the peers' from the window as they arrive, ranks
// pairwise, then what is to be added. Twin of ep_home in moe_layer/ops/ep.py.

#include "ep_combine.cuh"

namespace moe_layer {
namespace {

struct HomeArgs {
  const int32_t* position_TR;
  const int32_t* ids_TK;
  const void* add_TD;
  void* out_TD;
  float* d_weights_TK;
  int64_t tokens;
  int32_t add_dtype, out_dtype;
};

// The warp waits for the chunks of a token's rows, lane r for rank r's, which is the `place`-th that it sends.
__device__ __forceinline__ bool wait_token(const EpTrip& trip, int place, uint32_t epoch, uint64_t until) {
  bool ok = true;
  const int peer = threadIdx.x % kWarp;
  if (place >= 0 && peer != trip.me) {
    ok = spin(trip, trip.flag(trip.me, peer, place / trip.chunk_rows), epoch, until, peer);
  }
  ok = __all_sync(0xffffffffu, ok);
  __syncwarp();  // what one lane acquired, all may read
  return ok;
}

// What joins a token's own sum: the peers' partial rows, what is added. Those whose columns are as wide as the own rows'
// pass through a stream, others are read where they lie. The whole warp calls it.
struct OtherRows {
  unsigned senders = 0;  // ranks that have a row
  bool stream_peers, stream_add;
  const unsigned char* peer;           // lane r: the row of rank r
  const unsigned char* row = nullptr;  // lane i: the i-th row of the stream
  int count = 0;                       // rows of the stream

  __device__ __forceinline__ OtherRows(
      const EpTrip& trip, const PartialArgs& args, const HomeArgs& home, int64_t t, int place, int element_bytes) {
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x % kWarp;
    senders = __ballot_sync(kAll, place >= 0);
    peer = trip.rows(trip.me, lane < trip.ranks ? lane : 0) + (place < 0 ? 0 : place) * trip.width;
    stream_peers = wire_bytes(args.wire) == element_bytes;
    for (unsigned left = stream_peers ? senders & ~(1u << trip.me) : 0; left != 0; left &= left - 1) {
      const uint64_t from = __shfl_sync(kAll, reinterpret_cast<uint64_t>(peer), __ffs(left) - 1);
      if (lane == count) row = reinterpret_cast<const unsigned char*>(from);
      ++count;
    }
    stream_add = home.add_TD != nullptr && wire_bytes(home.add_dtype) == element_bytes;
    if (stream_add) {
      if (lane == count) row = static_cast<const unsigned char*>(home.add_TD) + t * args.hidden * element_bytes;
      ++count;
    }
  }
};

// V elements of a wire dtype that is as wide as T.
template <typename T, int V>
__device__ __forceinline__ void widen(const Pack<T, V>& raw, int32_t dtype, float (&value)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if constexpr (sizeof(T) == 4) {
      value[i] = raw.v[i];
    } else {
      const auto bits = *reinterpret_cast<const uint16_t*>(&raw.v[i]);
      value[i] = dtype == kWireBfloat16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                        : __half2float(__ushort_as_half(bits));
    }
  }
}

// The ranks pairwise, as one tree of kRanks in which absent ranks are +0. `held`: the own sums, rounded as the peers'.
template <typename T, int V, int kRanks>
__device__ __forceinline__ void sum_token(
    const EpTrip& trip, const PartialArgs& args, const HomeArgs& home, const OtherRows& row,
    RowStream<kHomeRing>& stream, const void* held, int held_at, int64_t t, int d, float (&sum)[V]) {
  constexpr int kLevels = kRanks == 8 ? 3 : 1;
  static_assert(kRanks == 1 << kLevels);
  const bool inside = d < args.hidden;
  float pending[kLevels][V];
#pragma unroll
  for (int r = 0; r < kRanks; ++r) {
    float value[V] = {};
    if (r == trip.me) {
      load_wire<V>(held, args.wire, held_at, value);
    } else if (row.senders >> r & 1) {
      if (row.stream_peers) {
        widen(stream.template next<Pack<T, V>>(), args.wire, value);
      } else {
        const uint64_t from = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(row.peer), r);
        if (inside) load_wire<V>(reinterpret_cast<const void*>(from), args.wire, d, value);
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = __fadd_rn(0.0f, value[i]);  // a rounded partial row may hold -0
    carry<V, kLevels>(pending, r, sum);
  }
  if (home.add_TD == nullptr) return;
  float extra[V] = {};
  if (row.stream_add) {
    widen(stream.template next<Pack<T, V>>(), home.add_dtype, extra);
  } else if (inside) {
    load_wire<V>(home.add_TD, home.add_dtype, t * args.hidden + d, extra);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = __fadd_rn(sum[i], extra[i]);
}

// Slot k's share of the probabilities' gradient of a token, in lane k.
__device__ __forceinline__ void take_home_probs(
    const EpTrip& trip, const PartialArgs& args, const HomeArgs& home, int64_t token) {
  const int k = threadIdx.x % kWarp, per_rank = args.num_experts / trip.ranks;
  if (k >= args.slots) return;
  const int id = home.ids_TK[token * args.slots + k];
  const int owner = id >= 0 && id < args.num_experts ? id / per_rank : -1;
  const int64_t place = owner >= 0 ? home.position_TR[token * trip.ranks + owner] : -1;
  float value = 0.0f;
  if (place >= 0 && owner == trip.me) {
    const int row = args.row_CK[(args.base_R1[trip.me] + place) * args.slots + k];
    if (row >= 0 && row < args.num_rows) value = args.probs_N[row];
  } else if (place >= 0) {
    value = __int_as_float(__ldcg(trip.words(trip.me, owner) + place * args.slots + k));
  }
  home.d_weights_TK[token * args.slots + k] = value;
}

// Each block takes every gridDim.x-th token, its warps parts of them as they come free. The own rows are summed before
// the peers' are waited for, so that little is left to do when those come.
template <typename T, int kBlocks, int kRanks>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2) ep_home_kernel(EpTrip trip, PartialArgs args, HomeArgs home) {
  extern __shared__ __align__(128) unsigned char rings[];
  constexpr int V = 16 / sizeof(T);
  __shared__ int32_t counts[kMostRanks], next;
  const int lane = threadIdx.x % kWarp;
  unsigned char* held = rings + threadIdx.x / kWarp * kHomeBytes;
  unsigned char* ring = held + kHeldBytes;
  const uint64_t until = now_ns() + trip.deadline_ns;
  if (threadIdx.x == 0) next = 0;
  bool ok = wait_headers(trip, until, counts);
  const uint32_t epoch = trip.epoch(kReceived) + 1;
  const int pieces = ceil_div(args.hidden, V * kWarp), row_bytes = args.hidden * static_cast<int>(sizeof(T));
  const int most = kHeldBytes / (kWarp * V * static_cast<int>(wire_bytes(args.wire)));
  while (ok) {
    const int item = claim(&next), part = item % args.parts;
    const int64_t t = blockIdx.x + static_cast<int64_t>(item / args.parts) * gridDim.x;
    if (t >= home.tokens) break;
    const int begin = pieces * part / args.parts, stop = pieces * (part + 1) / args.parts;
    const int place = lane < trip.ranks ? home.position_TR[t * trip.ranks + lane] : -1;
    const int own_place = __shfl_sync(0xffffffffu, place, trip.me);
    SlotList own;
    if (own_place >= 0 && begin < stop) own = list_slots(args, args.base_R1[trip.me] + own_place);
    const BlockEnds<kBlocks> blocks(own);
    bool waited = false;
    for (int first = begin; first < stop; first += most) {
      const int last = min(first + most, stop);
      RowStream<kHomeRing> rows(ring, own.address(args, row_bytes), own.count, row_bytes, first, last);
      for (int piece = first; piece < last; ++piece) {
        float sum[V];
        sum_rows<T, V>(rows, blocks, sum);
        store_wire<V>(held, args.wire, ((piece - first) * kWarp + lane) * V, sum);
      }
      if (!waited) ok = waited = wait_token(trip, place, epoch, until);
      if (!ok) break;
      const OtherRows others(trip, args, home, t, place, sizeof(T));
      RowStream<kHomeRing> stream(ring, others.row, others.count, row_bytes, first, last);
      for (int piece = first; piece < last; ++piece) {
        const int d = (piece * kWarp + lane) * V;
        float sum[V];
        sum_token<T, V, kRanks>(
            trip, args, home, others, stream, held, ((piece - first) * kWarp + lane) * V, t, d, sum);
        if (d < args.hidden) store_wire<V>(home.out_TD, home.out_dtype, t * args.hidden + d, sum);
      }
    }
    if (ok && home.d_weights_TK != nullptr && part == 0) {
      if (!waited) ok = wait_token(trip, place, epoch, until);
      if (ok) take_home_probs(trip, args, home, t);
    }
  }
  ok = __syncthreads_and(ok);
  if (!ok) {
    poison(home.out_TD, home.tokens * args.hidden * (home.out_dtype == kWireFloat ? 4 : 2));
    if (home.d_weights_TK != nullptr) poison(home.d_weights_TK, home.tokens * args.slots * 4);
    return;
  }
  if (last_block(trip, kReceiveTicket, gridDim.x)) give_credits(trip);
}

int32_t dtype_code(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "add must be fp32, bf16 "
      "or fp16, got ",
      torch::headeronly::toString(dtype));
  return dtype == ScalarType::Float ? kWireFloat : dtype == ScalarType::BFloat16 ? kWireBfloat16 : kWireHalf;
}

std::tuple<Tensor, Tensor> ep_home(
    const Tensor& peers, Tensor state, const Tensor& rows, const Tensor& row_index, const Tensor& ids,
    const Tensor& base, const Tensor& position, const Tensor& own_ids, const std::optional<Tensor>& probs,
    const std::optional<Tensor>& add, const Tensor& words, int64_t out_dtype, int64_t wire, int64_t num_experts,
    int64_t tree_blocks, bool compact) {
  const DeviceGuard guard(state.get_device_index());
  const EpTrip trip = read_trip(peers, state, words);
  PartialArgs args = read_partial(trip, rows, row_index, ids, base, probs, wire, num_experts, tree_blocks, compact);
  check_tensor(position, "position", ScalarType::Int, 2);
  check_tensor(own_ids, "ids", ScalarType::Int, 2);
  check_size(position, "position", 1, trip.ranks);
  STD_TORCH_CHECK(
      trip.ranks <= 8 && args.slots + trip.ranks <= kWarp,
      "ep_home serves at most 8 ranks and slots + ranks of at most ", kWarp, ", got ", trip.ranks, " ranks and ",
      args.slots, " slots");
  const int64_t T = position.size(0);
  check_size(own_ids, "ids", 0, T);
  check_size(own_ids, "ids", 1, args.slots);
  constexpr ScalarType dtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  STD_TORCH_CHECK(out_dtype >= 0 && out_dtype < 3, "out dtype code must be 0, 1 or 2, got ", out_dtype);
  Tensor out = new_empty(rows, {T, args.hidden}, dtypes[out_dtype]);
  Tensor d_weights =
      probs.has_value() ? new_empty(rows, {T, args.slots}, ScalarType::Float) : new_empty(rows, {0}, ScalarType::Float);
  HomeArgs home{};
  home.position_TR = in_ptr<int32_t>(position);
  home.ids_TK = in_ptr<int32_t>(own_ids);
  home.out_TD = out.mutable_data_ptr();
  if (probs.has_value()) home.d_weights_TK = out_ptr<float>(d_weights);
  home.tokens = T;
  home.out_dtype = static_cast<int32_t>(out_dtype);
  if (add.has_value()) {
    check_tensor(*add, "add", add->scalar_type(), 2);
    check_size(*add, "add", 0, T);
    check_size(*add, "add", 1, args.hidden);
    home.add_TD = add->const_data_ptr();
    home.add_dtype = dtype_code(*add);
  }
  // Parts whose own sums fit in shared memory at once.
  const int64_t most = sm_count(state.get_device_index());
  const int warps = choose_warps(state.get_device_index());
  const int64_t bytes = args.hidden * wire_bytes(args.wire), held = kHeldBytes;
  args.parts = bytes > held ? to_int32(ceil_div(bytes, held), "parts") : 1;
  const int grid = static_cast<int>(T < 1 ? 1 : T < most ? T : most);
  const cudaStream_t stream = current_stream(state);
  const auto run = [&](auto kernel) {
    allow_rings(kernel, warps * kHomeBytes);
    kernel<<<grid, warps * kWarp, warps * kHomeBytes, stream>>>(trip, args, home);
  };
  dispatch_float(rows.scalar_type(), "rows", [&](auto zero) {
    if (trip.ranks == 2 && args.own_blocks <= 4) {
      run(ep_home_kernel<decltype(zero), 4, 2>);
    } else {
      run(ep_home_kernel<decltype(zero), 8, 8>);
    }
  });
  MOE_LAUNCH_CHECK();
  return {out, d_weights};
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_home", TORCH_BOX(&moe_layer::ep_home)); }
