// Forced ids in the lean forward kernel: one lane a (row, slot), as for the weights. All lanes of the warp call these functions.
#pragma once

#include "router_lean_parts.cuh"

namespace moe_layer::router {

struct Slot {
  int at, slot;  // row of the tile, slot of the row
  int64_t row;
  bool inside, live;  // a slot of a row of the batch; and the row is valid
};

__device__ __forceinline__ Slot slot_of_lane(const Forward& p, const LeanShape& shape, int64_t first_row, int first) {
  const int lane = threadIdx.x % kWarp;
  Slot s;
  s.slot = lane & (shape.slot_lanes - 1);
  s.at = first + (lane >> shape.slot_shift);
  s.row = first_row + s.at;
  s.inside = s.at < shape.rows && s.row < p.tokens && s.slot < p.top_k;
  s.live = s.inside && (p.valid == nullptr || p.valid[s.row]);
  return s;
}

__device__ __forceinline__ unsigned lanes_of_row(const LeanShape& shape) {
  const unsigned lanes = shape.slot_lanes == kWarp ? kFull : (1u << shape.slot_lanes) - 1u;
  return lanes << (threadIdx.x % kWarp & ~(shape.slot_lanes - 1));
}

// Forced id `i` of the call as it lies in memory; one beyond 32 bits is out of range too.
__device__ __forceinline__ int load_forced(const Forward& p, int64_t i) {
  return p.replay.kind == kI32 ? __ldg(static_cast<const int32_t*>(p.replay.data) + i)
                               : load_id(p.replay, i, p.experts);
}

// This lane's forced ids of the first two passes over a tile of `count` rows; -1 where it has none.
__device__ __forceinline__ int2 first_forced(const Forward& p, const LeanShape& shape, int64_t first_row, int count) {
  const int lane = threadIdx.x % kWarp, slot = lane & (shape.slot_lanes - 1), at = lane >> shape.slot_shift;
  const int next = at + (kWarp >> shape.slot_shift);
  const int64_t first = first_row * p.top_k + slot;
  int2 ids = {-1, -1};
  if (at < count && slot < p.top_k) ids.x = load_forced(p, first + at * p.top_k);
  if (next < count && slot < p.top_k) ids.y = load_forced(p, first + next * p.top_k);
  return ids;
}

// Writes the tile's forced ids to forced[rows, K] as they are. Returns whether a slot of its `count` rows is missing, out of range or a
// duplicate. `first_ids` come from first_forced(), a tile ahead. `seen` holds a bit an expert and row of a pass, all 0 before and after:
// without it a row's slots would have to be compared with each other, K - 1 shuffles (and match.any takes 256 cycles, H200).
__device__ __forceinline__ bool copy_forced(
    const Forward& p, const LeanShape& shape, int64_t first_row, int count, int2 first_ids, int* forced,
    uint32_t* seen) {
  const int lane = threadIdx.x % kWarp, slot = lane & (shape.slot_lanes - 1), row_of_pass = lane >> shape.slot_shift;
  uint32_t* words = seen + row_of_pass * ceil_div(p.experts, kWarp);
  bool odd = false;
#pragma unroll 1
  for (int first = 0; first < count; first += kWarp >> shape.slot_shift) {
    const int at = first + row_of_pass, index = at * p.top_k + slot;
    const bool inside = at < count && slot < p.top_k;
    int id = first_ids.x;
    first_ids.x = first_ids.y;
    if (first > kWarp >> shape.slot_shift && inside) id = load_forced(p, first_row * p.top_k + index);
    const bool known = inside && static_cast<unsigned>(id) < static_cast<unsigned>(p.experts);
    uint32_t* word = words + (known ? id / kWarp : 0);
    const uint32_t bit = 1u << (id & (kWarp - 1));
    const bool again = known && (atomicOr(word, bit) & bit) != 0;
    odd |= again || (inside && !known);
    if (inside) forced[index] = id;
    __syncwarp();
    if (known) *word = 0;
    __syncwarp();
  }
  return __any_sync(kFull, odd);
}

// The same for any tile: -1 where a live expert has to step in, events and what was replayed counted. Apart, for its registers.
// Returns rows replayed, slots replayed, and whether a slot has to be filled.
inline __device__ __noinline__ int3
check_forced(const Forward* args, const LeanShape shape, int64_t first_row, int* forced, int* events) {
  const Forward& p = *args;
  int3 found = {0, 0, 0};
  for (int first = 0; first < shape.rows; first += kWarp >> shape.slot_shift) {
    const Slot s = slot_of_lane(p, shape, first_row, first);
    const int id = s.live ? load_forced(p, s.row * p.top_k + s.slot) : -1;
    bool duplicate = false;
    for (int o = 1; o < p.top_k; ++o) {
      const int earlier = __shfl_up_sync(kFull, id, o);
      duplicate |= earlier == id && s.slot >= o;
    }
    const bool known = s.live && id >= 0 && id < p.experts, taken = known && !duplicate;
    if (s.inside) forced[s.at * p.top_k + s.slot] = taken ? id : -1;
    const unsigned takes = __ballot_sync(kFull, taken);
    found.x += __popc(__ballot_sync(kFull, s.slot == 0 && (takes & lanes_of_row(shape)) != 0));
    found.y += __popc(takes);
    if (__any_sync(kFull, s.live && !taken)) {
      found.z = 1;
      count_event(events, 2, s.live && id < 0);
      count_event(events, 3, known && duplicate);
      count_event(events, 4, s.live && id >= p.experts);
    }
  }
  return found;
}

// The expert of this lane's slot: the forced one, or for the n-th missing slot of the row the n-th best live expert that no slot
// of the row holds. `live_id` is the live expert of the same place; K of them, and at most K - missing are held.
__device__ __forceinline__ int fill_slot(
    const Forward& p, const LeanShape& shape, const Slot& s, int forced, int live_id) {
  const int lane = threadIdx.x % kWarp;
  bool held = forced == live_id;
  for (int o = 1; o < shape.slot_lanes; ++o) held |= __shfl_xor_sync(kFull, forced, o) == live_id;
  const unsigned row = lanes_of_row(shape);
  const unsigned missing = __ballot_sync(kFull, s.live && forced < 0) & row;
  unsigned left = __ballot_sync(kFull, s.live && !held) & row;
  for (int skip = __popc(missing & ((1u << lane) - 1u)); skip > 0; --skip) left &= left - 1;
  const int filled = __shfl_sync(kFull, live_id, left != 0 ? __ffs(left) - 1 : 0);
  return forced >= 0 ? forced : filled;
}

// The missing slots of a tile whose rows are all valid, in forced[]. Apart, for its registers.
inline __device__ __noinline__ void fill_forced(
    const Forward* args, const LeanShape shape, int64_t first_row, uint32_t id_mask, const uint32_t* chosen,
    int* forced) {
  const Forward& p = *args;
  for (int first = 0; first < shape.rows; first += kWarp >> shape.slot_shift) {
    const Slot s = slot_of_lane(p, shape, first_row, first);
    const int index = s.at * p.top_k + s.slot;
    const int held = s.live ? forced[index] : -1, live_id = s.live ? static_cast<int>(chosen[index] & id_mask) : -1;
    const int id = fill_slot(p, shape, s, held, live_id);
    if (s.live) forced[index] = id;
  }
  __syncwarp();
}

}  // namespace moe_layer::router
