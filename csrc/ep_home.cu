// Sum each token's partial rows at home: the own rows by the tree, the peers' from the window as they arrive, ranks
// pairwise, then what is to be added. Twin of ep_home in moe_layer/ops/ep.py.

#include "ep_combine.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

struct HomeArgs {
  const int32_t* position_TR;
  const int32_t* ids_TK;
  const void* add_TD;
  void* out_TD;
  float* d_weights_TK;
  int64_t tokens;
  int32_t group;  // tokens that a block takes at a time
  int32_t add_dtype, out_dtype;
};

// Thread r waits for the chunks of rank r's rows of the tokens [first, end).
__device__ __forceinline__ bool wait_tokens(
    const EpTrip& trip, const HomeArgs& home, int64_t first, int64_t end, uint32_t epoch, uint64_t until) {
  bool ok = true;
  const int peer = threadIdx.x;
  if (peer < trip.ranks && peer != trip.me) {
    int64_t seen = -1;
    for (int64_t t = first; ok && t < end; ++t) {
      const int place = home.position_TR[t * trip.ranks + peer];
      const int64_t chunk = place / trip.chunk_rows;
      if (place < 0 || chunk == seen) continue;
      ok = spin(trip, trip.flag(trip.me, peer, chunk), epoch, until, peer);
      seen = chunk;
    }
  }
  return __syncthreads_and(ok);
}

// The ranks [kFirst, kFirst + kCount) pairwise, as one tree of 8 in which absent ranks are +0. `place` is lane r's.
template <int V, int kFirst, int kCount>
__device__ __forceinline__ void rank_tree(
    const EpTrip& trip, const PartialArgs& args, int place, const float (&own)[V], int d, float (&sum)[V]) {
  if constexpr (kCount == 1) {
    const int64_t at = __shfl_sync(0xffffffffu, place, kFirst);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = 0.0f;
    if (at < 0) return;
    float value[V] = {};
    if (kFirst == trip.me) {
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = own[i];
    } else if (d < args.hidden) {
      load_wire<V>(trip.rows(trip.me, kFirst) + at * trip.width, args.wire, d, value);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = __fadd_rn(0.0f, value[i]);
  } else {
    rank_tree<V, kFirst, kCount / 2>(trip, args, place, own, d, sum);
    if (kFirst + kCount / 2 >= trip.ranks) return;
    float other[V];
    rank_tree<V, kFirst + kCount / 2, kCount / 2>(trip, args, place, own, d, other);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = __fadd_rn(sum[i], other[i]);
  }
}

// kPair: two ranks, whose one peer's row is read a piece ahead like the own ones.
template <typename T, int kBlocks, bool kPair>
__global__ void __launch_bounds__(kThreads, 2) ep_home_kernel(EpTrip trip, PartialArgs args, HomeArgs home) {
  constexpr int V = 16 / sizeof(T);
  constexpr unsigned kAll = 0xffffffffu;
  __shared__ int32_t counts[kMostRanks];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint64_t until = now_ns() + trip.deadline_ns;
  bool ok = wait_headers(trip, until, counts);
  const uint32_t epoch = trip.epoch(kReceived) + 1;
  const int own_base = args.base_R1[trip.me];
  const int pieces = ceil_div(args.hidden, V * kWarp), per_rank = args.num_experts / trip.ranks;
  const int parts = kWarps / home.group;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * home.group; ok && first < home.tokens;
       first += static_cast<int64_t>(gridDim.x) * home.group) {
    const int64_t end = min(first + home.group, home.tokens);
    ok = wait_tokens(trip, home, first, end, epoch, until);
    if (!ok) break;
    const int64_t t = first + warp / parts;
    const int begin = pieces * (warp % parts) / parts, stop = pieces * (warp % parts + 1) / parts;
    if (t < end && begin < stop) {
      const int place = lane < trip.ranks ? home.position_TR[t * trip.ranks + lane] : -1;
      const int own_place = __shfl_sync(kAll, place, trip.me);
      const unsigned senders = __ballot_sync(kAll, place >= 0);
      SlotList list;
      if (own_place >= 0) list = list_slots(args, own_base + own_place);
      PartialRow<T, V, kBlocks> row(args, list, begin);
      const int near = __ffs(senders & ~(1u << trip.me)) - 1;
      const bool ahead = kPair && near >= 0 && wire_bytes(args.wire) == 2;
      const uint8_t* near_row =
          near < 0 ? nullptr : trip.rows(trip.me, near) + __shfl_sync(kAll, place, near & 31) * trip.width;
      Pack<uint16_t, V> raw{};
      if (ahead && (begin * kWarp + lane) * V < args.hidden) raw = wire_pack<V>(near_row, (begin * kWarp + lane) * V);
      for (int piece = begin; piece < stop; ++piece) {
        const int d = (piece * kWarp + lane) * V;
        const bool inside = d < args.hidden;
        float own[V];
        row.sum(piece, piece + 1 < stop, own);
        round_to_wire<V>(args.wire, own);
        float sum[V] = {};
        if constexpr (kPair) {
          float value[V] = {};
          if (ahead) {
            widen<V>(raw, args.wire, value);
            if (piece + 1 < stop && d + kWarp * V < args.hidden) raw = wire_pack<V>(near_row, d + kWarp * V);
          } else if (near >= 0 && inside) {
            load_wire<V>(near_row, args.wire, d, value);
          }
#pragma unroll
          for (int i = 0; i < V; ++i) sum[i] = __fadd_rn(__fadd_rn(0.0f, own[i]), __fadd_rn(0.0f, value[i]));
        } else {
          rank_tree<V, 0, 8>(trip, args, place, own, d, sum);
        }
        if (inside) {
          if (home.add_TD != nullptr) {
            float extra[V];
            load_wire<V>(home.add_TD, home.add_dtype, t * args.hidden + d, extra);
#pragma unroll
            for (int i = 0; i < V; ++i) sum[i] = __fadd_rn(sum[i], extra[i]);
          }
          store_wire<V>(home.out_TD, home.out_dtype, t * args.hidden + d, sum);
        }
      }
    }
    if (home.d_weights_TK == nullptr) continue;
    for (int i = threadIdx.x; i < static_cast<int>(end - first) * args.slots; i += kThreads) {
      const int64_t token = first + i / args.slots, k = i % args.slots;
      const int id = home.ids_TK[token * args.slots + k];
      const int owner = id >= 0 && id < args.num_experts ? id / per_rank : -1;
      const int64_t place = owner >= 0 ? home.position_TR[token * trip.ranks + owner] : -1;
      float value = 0.0f;
      if (place >= 0 && owner == trip.me) {
        const int row = args.row_CK[(own_base + place) * args.slots + k];
        if (row >= 0 && row < args.num_rows) value = args.probs_N[row];
      } else if (place >= 0) {
        value = __int_as_float(__ldcg(trip.words(trip.me, owner) + place * args.slots + k));
      }
      home.d_weights_TK[token * args.slots + k] = value;
    }
  }
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
  const PartialArgs args =
      read_partial(trip, rows, row_index, ids, base, probs, wire, num_experts, tree_blocks, compact);
  check_tensor(position, "position", ScalarType::Int, 2);
  check_tensor(own_ids, "ids", ScalarType::Int, 2);
  check_size(position, "position", 1, trip.ranks);
  STD_TORCH_CHECK(trip.ranks <= 8, "ep_home serves at most 8 ranks, got ", trip.ranks);
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
  const int64_t most = sm_count(state.get_device_index());
  home.group = kWarps;
  while (home.group > 1 && ceil_div<int64_t>(T, home.group) < most) home.group /= 2;
  const int64_t groups = ceil_div<int64_t>(T, home.group);
  const int grid = static_cast<int>(groups < 1 ? 1 : groups < most ? groups : most);
  const cudaStream_t stream = current_stream(state);
  dispatch_float(rows.scalar_type(), "rows", [&](auto zero) {
    using T = decltype(zero);
    if (trip.ranks == 2 && args.own_blocks <= 4) {
      ep_home_kernel<T, 4, true><<<grid, kThreads, 0, stream>>>(trip, args, home);
    } else {
      ep_home_kernel<T, 8, false><<<grid, kThreads, 0, stream>>>(trip, args, home);
    }
  });
  MOE_LAUNCH_CHECK();
  return {out, d_weights};
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("ep_home", TORCH_BOX(&moe_layer::ep_home)); }
