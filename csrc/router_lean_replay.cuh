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

// This lane's forced id in the pass over a tile of `count` rows that begins with row `first`; -1 where it has none.
__device__ __forceinline__ int forced_of_pass(
    const Forward& p, const LeanShape& shape, int64_t first_row, int count, int first) {
  const int lane = threadIdx.x % kWarp, slot = lane & (shape.slot_lanes - 1), at = first + (lane >> shape.slot_shift);
  return at < count && slot < p.top_k ? load_forced(p, first_row * p.top_k + at * p.top_k + slot) : -1;
}

// Of the first two passes; most tiles need no more.
__device__ __forceinline__ int2 first_forced(const Forward& p, const LeanShape& shape, int64_t first_row, int count) {
  int2 ids = {forced_of_pass(p, shape, first_row, count, 0), -1};
  if (count > kWarp >> shape.slot_shift) ids.y = forced_of_pass(p, shape, first_row, count, kWarp >> shape.slot_shift);
  return ids;
}

// Whether another lane of the row has the same number. Two lanes of a row are at most W / 2 apart, in one direction or the other.
__device__ __forceinline__ bool is_twice(const LeanShape& shape, int id) {
  const int lane = threadIdx.x % kWarp;
  bool twice = false;
  const auto compare = [&](int o) { twice |= __shfl_sync(kFull, id, lane + o, shape.slot_lanes) == id; };
  switch (shape.slot_shift) {
    case 4: compare(8), compare(7), compare(6), compare(5); [[fallthrough]];
    case 3: compare(4), compare(3); [[fallthrough]];
    case 2: compare(2); [[fallthrough]];
    case 1: compare(1); [[fallthrough]];
    default: return twice;
  }
}

enum Found : int { kAllFound, kMissingFound, kDuplicatesFound };

// Writes the tile's forced ids to forced[rows, K] as they are; `first_ids` are first_forced(), a tile ahead. Returns what is wrong with the
// slots of its `count` rows: one may be missing or out of range, or a duplicate (and another one missing).
__device__ __forceinline__ Found
copy_forced(const Forward& p, const LeanShape& shape, int64_t first_row, int count, int2 first_ids, int* forced) {
  const int lane = threadIdx.x % kWarp, slot = lane & (shape.slot_lanes - 1), step = kWarp >> shape.slot_shift;
  bool missing = false, twice = false;
#pragma unroll 1
  for (int first = 0; first < count; first += step) {
    const int at = first + (lane >> shape.slot_shift);
    const bool inside = at < count && slot < p.top_k;
    const int id = first < 2 * step ? first_ids.x : forced_of_pass(p, shape, first_row, count, first);
    first_ids.x = first_ids.y;
    const bool known = inside && static_cast<unsigned>(id) < static_cast<unsigned>(p.experts);
    if (inside) forced[at * p.top_k + slot] = id;
    missing |= inside && !known;
    twice |= is_twice(shape, known ? id : ~lane);
  }
  __syncwarp();
  if (__any_sync(kFull, twice)) return kDuplicatesFound;
  return __any_sync(kFull, missing) ? kMissingFound : kAllFound;
}

// The logits of the forced experts of the first two passes, asked for long before they are needed. All ids are in range or -1.
template <class Near>
__device__ __forceinline__ float2 first_logits(const LeanShape& shape, const Near& logits, int2 ids) {
  const int at = threadIdx.x % kWarp >> shape.slot_shift;
  return {
      ids.x >= 0 ? logits.at(at, ids.x) : 0.0f, ids.y >= 0 ? logits.at(at + (kWarp >> shape.slot_shift), ids.y) : 0.0f};
}

// The largest over the lanes of a row's slots, at most 16.
__device__ __forceinline__ uint32_t slots_worst(const LeanShape& shape, uint32_t v) {
  switch (shape.slot_shift) {
    case 4: v = max(v, __shfl_xor_sync(kFull, v, 8)); [[fallthrough]];
    case 3: v = max(v, __shfl_xor_sync(kFull, v, 4)); [[fallthrough]];
    case 2: v = max(v, __shfl_xor_sync(kFull, v, 2)); [[fallthrough]];
    case 1: v = max(v, __shfl_xor_sync(kFull, v, 1)); [[fallthrough]];
    default: return v;
  }
}

// What tells whether a row's forced experts are its K best: worst[rows] gets the forced experts' worst key. The forced ones are K different
// experts and none is worse than that, so they are the K best if no more than K of the row's keys are as good. Of 16-bit logits the keys
// are packed ones and also take the ids' place in forced[]; of fp32 logits they are whole inverted keys.
template <int L, int C, bool WIDE, class Near>
__device__ __forceinline__ void find_worst(
    const Forward& p, const LeanShape& shape, const Near& logits, int count, float2 first, int* forced,
    uint32_t* worst) {
  const int lane = threadIdx.x % kWarp, slot = lane & (shape.slot_lanes - 1), step = kWarp >> shape.slot_shift;
#pragma unroll 1
  for (int row = 0; row < count; row += step) {
    const int at = row + (lane >> shape.slot_shift), index = at * p.top_k + slot;
    const bool inside = at < count && slot < p.top_k;
    uint32_t key = 0;
    if (inside) {
      const int id = forced[index];
      const float x = row < 2 * step ? first.x : logits.at(at, id);
      key = WIDE ? inverted(x) : (packed_key<L, C>(x, 0) & ~Layout<L, C>::kIdMask) | id;  // a NaN's bits are cut off
      if (!WIDE) forced[index] = static_cast<int>(key);
    }
    first.x = first.y;
    key = slots_worst(shape, key);
    if (inside && slot == 0) worst[at] = key;
  }
  __syncwarp();
}

enum Compared : int { kSameExperts, kFewOthers, kOtherExperts };

// Compares the forced experts of this lane's row `at` with its K best by find_worst()'s result; `best` is the row's largest logit. Where
// few others are as good as the worst forced one, hist_aux counts the K best, and the row's bit is set in `counted`. The result is for
// all rows of the warp: kOtherExperts tells that nothing was counted.
template <int L, int C, bool WIDE>
__device__ __forceinline__ Compared compare_rows(
    const uint32_t (&v)[C * 8], int top_k, bool live, int gl, int at, uint32_t worst, float best, int32_t* hist_aux,
    uint32_t& counted) {
  using Pack = Packed<L, C>;
  constexpr int kFew = 3;
  uint32_t limit = worst;
  bool far = false;
  if constexpr (WIDE) {  // as the packed keys: the distance from the best one, above the id
    const uint32_t distance = worst - inverted(best);
    far = distance >= Pack::kFar;
    limit = (distance << Pack::kBits) | Pack::kIdMask;
  }
  uint32_t as_good = 0;
#pragma unroll
  for (int i = 0; i < C * 8; ++i) as_good |= v[i] <= limit ? 1u << i : 0u;
  int others = __popc(as_good);
#pragma unroll
  for (int o = L / 2; o > 0; o >>= 1) others += __shfl_xor_sync(kFull, others, o);
  others -= top_k;
  const bool differs = live && (far || others != 0);
  if (!__any_sync(kFull, differs)) return kSameExperts;
  if (__any_sync(kFull, live && (far || others > kFew))) return kOtherExperts;
  uint32_t last = limit + 1u;
  while (__any_sync(kFull, live && others > 0)) {  // the worst one is not among the K best
    const uint32_t next = row_max<L>(max_below(v, last));
    const int id = static_cast<int>(next & Pack::kIdMask), chunk = id / 8;
    if (others > 0) {
      if (chunk % L == gl) as_good &= ~(1u << (chunk / L * 8 + id % 8));
      last = next, --others;
    }
  }
  if (differs) {
    for (; as_good != 0; as_good &= as_good - 1) {
      atomicAdd(&hist_aux[Layout<L, C>::expert(__ffs(as_good) - 1, gl)], 1);
    }
  }
  counted |= __reduce_or_sync(kFull, differs ? 1u << at : 0u);
  return kFewOthers;
}

// The same for any tile: -1 where a live expert has to step in, events counted. Apart, for its registers. Returns whether a slot has to be
// filled. Rows and slots replayed are counted, or with `negative` those of the tile that are not, below 0. `duplicates` false: there are
// none.
inline __device__ __noinline__ bool check_forced(
    const Forward* args, const LeanShape shape, int64_t first_row, bool negative, bool duplicates, int* forced,
    int* events) {
  const Forward& p = *args;
  int rows = 0, slots = 0;
  bool fill = false;
  for (int first = 0; first < shape.rows; first += kWarp >> shape.slot_shift) {
    const Slot s = slot_of_lane(p, shape, first_row, first);
    const int id = s.live ? load_forced(p, s.row * p.top_k + s.slot) : -1;
    bool duplicate = false;
    for (int o = 1; duplicates && o < p.top_k; ++o) {
      const int earlier = __shfl_up_sync(kFull, id, o);
      duplicate |= earlier == id && s.slot >= o;
    }
    const bool known = s.live && id >= 0 && id < p.experts, taken = known && !duplicate;
    if (s.inside) forced[s.at * p.top_k + s.slot] = taken ? id : -1;
    const unsigned takes = __ballot_sync(kFull, taken), all = negative ? __ballot_sync(kFull, s.inside) : 0;
    const bool leads = s.slot == 0;
    rows += __popc(__ballot_sync(kFull, leads && (takes & lanes_of_row(shape)) != 0)) -
            __popc(__ballot_sync(kFull, leads && (all & lanes_of_row(shape)) != 0));
    slots += __popc(takes) - __popc(all);
    if (__any_sync(kFull, s.live && !taken)) {
      fill = true;
      count_event(events, 2, s.live && id < 0);
      count_event(events, 3, known && duplicate);
      count_event(events, 4, s.live && id >= p.experts);
    }
  }
  if (threadIdx.x % kWarp == 0) {
    if (rows != 0) atomicAdd(&events[0], rows);
    if (slots != 0) atomicAdd(&events[1], slots);
  }
  __syncwarp();
  return fill;
}

// The expert of this lane's slot: the forced one, or for the n-th missing slot of the row the n-th best live expert that no slot
// of the row holds. `live_id` is the live expert of the same place, `held` says whether a slot holds it; at most K - missing are held.
__device__ __forceinline__ int fill_slot(const LeanShape& shape, const Slot& s, int forced, int live_id, bool held) {
  const int lane = threadIdx.x % kWarp;
  const unsigned row = lanes_of_row(shape);
  const unsigned missing = __ballot_sync(kFull, s.live && forced < 0) & row;
  unsigned left = __ballot_sync(kFull, s.live && !held) & row;
  for (int skip = __popc(missing & ((1u << lane) - 1u)); skip > 0; --skip) left &= left - 1;
  const int filled = __shfl_sync(kFull, live_id, left != 0 ? __ffs(left) - 1 : 0);
  return forced >= 0 ? forced : filled;
}

// Whether a slot of the row holds `live_id`.
__device__ __forceinline__ bool held_in_row(const LeanShape& shape, int forced, int live_id) {
  bool held = forced == live_id;
  for (int o = 1; o < shape.slot_lanes; ++o) held |= __shfl_xor_sync(kFull, forced, o) == live_id;
  return held;
}

// The missing slots of a tile whose rows are all valid, in forced[]. Apart, for its registers. `seen` holds a bit an expert and row of a
// pass, all 0 before and after.
inline __device__ __noinline__ void fill_forced(
    const Forward* args, const LeanShape shape, int64_t first_row, uint32_t id_mask, const uint32_t* chosen,
    int* forced, uint32_t* seen) {
  const Forward& p = *args;
  seen += threadIdx.x % kWarp / shape.slot_lanes * ceil_div(p.experts, kWarp);
  for (int first = 0; first < shape.rows; first += kWarp >> shape.slot_shift) {
    const Slot s = slot_of_lane(p, shape, first_row, first);
    const int index = s.at * p.top_k + s.slot;
    const int forced_id = s.live ? forced[index] : -1;
    const int live_id = s.live ? static_cast<int>(chosen[index] & id_mask) : 0;
    if (forced_id >= 0) atomicOr(&seen[forced_id / kWarp], 1u << forced_id % kWarp);
    __syncwarp();
    const bool held = seen[live_id / kWarp] >> live_id % kWarp & 1u;
    __syncwarp();
    if (forced_id >= 0) seen[forced_id / kWarp] = 0;
    const int id = fill_slot(shape, s, forced_id, live_id, held);
    if (s.live) forced[index] = id;
    __syncwarp();
  }
}

}  // namespace moe_layer::router
