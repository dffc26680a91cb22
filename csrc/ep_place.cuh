// Which rows of the output an arriving row goes to, and what later calls read about it. Used by ep_take.cu.
#pragma once

#include "ep.cuh"

namespace moe_layer {

// What ep_expand reads of the own rows and of all counts, and what it writes beside the rows.
struct ExpandArgs {
  const int32_t* ids_TK;
  const int32_t* places_TK;
  const float* weights_TK;
  const int32_t* first_RL;  // [ranks + 1, num_local]
  int32_t* token_C;
  int32_t* rank_C;
  int32_t* ids_CK;
  int32_t* row_CK;
  int32_t* slot_N;
  float* probs_N;
  int32_t* index_N;  // null: rows do not stay compact
  int32_t first_expert, num_rows;
  bool dense;  // words come by themselves, and a source's row lies where its token says

  __device__ void clear(int64_t n) const {
    slot_N[n] = -1;
    probs_N[n] = 0.0f;
    if (index_N != nullptr) index_N[n] = 0;
  }
};

struct TakeArgs {
  EpTrip trip;
  const void* rows;
  const int32_t* tokens_S;  // this rank's own list
  const int32_t* base_R1;
  const int32_t* counts_R;
  const int32_t* token_C;  // of ep_take of a dense push: null, a source's row i is its i-th; else its token's
  const int32_t* row_CK;
  const int32_t* slot_N;  // of ep_take
  const int32_t* offsets_L1;
  void* out;
  int64_t out_rows;
  int64_t row_bytes;  // of `rows` and `out`
  int32_t num_rows, slots, num_compact, num_local, num_tokens;
  int32_t parts;  // of a row: what a warp takes at a time
  bool mixed;     // own rows and the peers' in turn; else the own ones first
  ExpandArgs expand;
};

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

// The same for row i of a source, from its words; `note`: the tables get what later calls read. Slots are lanes.
__device__ __forceinline__ int32_t
place_row(const TakeArgs& args, int source, int64_t i, int64_t c, int32_t own_token, bool note) {
  const ExpandArgs& to = args.expand;
  const EpTrip& trip = args.trip;
  const int lane = threadIdx.x % kWarp, K = args.slots, L = args.num_local;
  const int32_t* words = trip.words(trip.me, source) + i * (1 + 3 * K);
  int token = own_token, id = -1, place = -1, row = -1;
  float weight = 0.0f;
  if (source != trip.me) token = __ldcg(words);
  if (lane < K && source == trip.me) {
    const int64_t slot = static_cast<int64_t>(token) * K + lane;
    id = to.ids_TK[slot], place = to.places_TK[slot], weight = to.weights_TK[slot];
  } else if (lane < K) {
    id = __ldcg(words + 1 + lane), place = __ldcg(words + 1 + K + lane);
    weight = __int_as_float(__ldcg(words + 1 + 2 * K + lane));
  }
  const unsigned e = static_cast<unsigned>(id - to.first_expert);
  const bool local = lane < K && e < static_cast<unsigned>(L);
  if (local) {
    const int first = to.first_RL[source * L + e], end = to.first_RL[(source + 1) * L + e];
    if (place >= 0 && place < end - first && first + place < to.num_rows) row = first + place;
  }
  if (note && lane < K) {
    to.ids_CK[c * K + lane] = local ? id : -1;
    to.row_CK[c * K + lane] = row;
  }
  if (note && row >= 0) {
    to.slot_N[row] = static_cast<int32_t>(c * K + lane);
    to.probs_N[row] = weight;
    if (to.index_N != nullptr) to.index_N[row] = static_cast<int32_t>(c);
  }
  if (note && lane == 0) to.token_C[c] = token, to.rank_C[c] = source;
  if (to.index_N == nullptr) return row;
  return lane == 0 ? static_cast<int32_t>(c) : -1;
}

// A warp zeroes a row.
template <typename Unit>
__device__ __forceinline__ void clear_row(void* out, int64_t n, int64_t per_row) {
  Unit* to = static_cast<Unit*>(out) + n * per_row;
  for (int64_t column = threadIdx.x % kWarp; column < per_row; column += kWarp) to[column] = Unit{};
}

// What no row reaches: pads, the rows after the last expert's (which begin at `end`), compact rows from `arrived` on, which
// did not come. The warps that have the fewest rows begin.
template <typename Unit>
__device__ __forceinline__ void clear_rest(const TakeArgs& args, int64_t per_row, int64_t end, int64_t arrived) {
  const ExpandArgs& to = args.expand;
  const int L = args.num_local, lane = threadIdx.x % kWarp, K = args.slots;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  const int64_t thread =
      ((warps - 1 - warp) * static_cast<int64_t>(gridDim.x) + gridDim.x - 1 - blockIdx.x) * kWarp + lane;
  const int64_t threads = gridDim.x * static_cast<int64_t>(blockDim.x);
  for (int64_t e = thread / kWarp; e < L; e += threads / kWarp) {
    const int next = args.offsets_L1[e + 1];
    for (int n = to.first_RL[args.trip.ranks * L + e]; n < next; ++n) {
      if (lane == 0) to.clear(n);
      if (to.index_N == nullptr && n < args.out_rows) clear_row<Unit>(args.out, n, per_row);
    }
  }
  for (int64_t n = end + thread; n < to.num_rows; n += threads) to.clear(n);
  for (int64_t c = arrived + thread; c < args.num_compact; c += threads) to.token_C[c] = to.rank_C[c] = -1;
  for (int64_t i = arrived * K + thread; i < static_cast<int64_t>(args.num_compact) * K; i += threads) {
    to.ids_CK[i] = to.row_CK[i] = -1;
  }
}

// The rows are NaN after a failure, and the tables must not lead anybody anywhere. The block that met it does it alone,
// for all: what the others write is right.
__device__ inline void give_up(const TakeArgs& args) {
  const ExpandArgs& to = args.expand;
  poison(args.out, args.out_rows * args.row_bytes);
  if (to.slot_N == nullptr) return;
  for (int64_t n = threadIdx.x; n < to.num_rows; n += blockDim.x) to.clear(n);
  for (int64_t c = threadIdx.x; c < args.num_compact; c += blockDim.x) to.token_C[c] = to.rank_C[c] = -1;
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(args.num_compact) * args.slots; i += blockDim.x) {
    to.ids_CK[i] = to.row_CK[i] = -1;
  }
}

// Where row i of a source lies in the window; -1: nowhere.
template <bool kExpand>
__device__ __forceinline__ int64_t find_row(const TakeArgs& args, int source, int64_t i, int64_t c) {
  int64_t place = i;
  if constexpr (kExpand) {
    if (args.expand.dense) place = __ldcg(args.trip.words(args.trip.me, source) + i * (1 + 3 * args.slots));
  } else if (args.token_C != nullptr) {
    place = c < args.num_tokens ? args.token_C[c] : -1;
  }
  return place < args.trip.max_rows ? place : -1;
}

}  // namespace moe_layer
