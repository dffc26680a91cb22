// Parts of the lean forward kernel (router_fwd_lean.cuh): shapes, packed keys, selection, scores, replay.
//
// A packed key is a field above an expert's id, and smaller is better. For 16-bit logits the field is the inverted key: exact.
// For fp32 keys it is the distance from the row's best key, in steps of the fp32 grid: exact down to a quarter of the best key
// (E 256; a factor 2 at E 512, 16 at E 128). A key farther away gets the field kFar, and a row that has to choose among those is
// selected again with whole keys (`exact_row`). All packed keys of a row differ and equal keys go to the lower id by themselves.
#pragma once

#include "router_fwd_outputs.cuh"

namespace moe_layer::router {

enum Mode : int { kSoftmaxPlain, kSigmoidPlain, kSigmoidKeyed };

struct LeanShape {
  int rows;        // rows of a tile
  int slot_lanes;  // W, the power of two that holds K: lanes of a row when a lane owns a slot
};

// Shared memory of a warp, in words: ids, unbiased ids, forced ids, groups' sums and flags, softmax of "pre" weights.
__host__ __device__ inline int lean_words(const Forward& p, const LeanShape& t, bool keyed) {
  const int lists = 1 + (keyed && p.live_apart ? 1 : 0) + (p.replay.data != nullptr ? 1 : 0);
  return t.rows * (p.top_k * lists + p.groups * 2 + 2);
}

template <int L, int C>
struct Packed : Layout<L, C> {
  static constexpr int kBits = L * C == 8 ? 6 : L * C == 16 ? 7 : L * C == 32 ? 8 : L * C == 64 ? 9 : 0;
  static_assert(1 << kBits == L * C * 8, "one id for every expert of the bucket");
  static constexpr uint32_t kBroken = (1u << (32 - kBits)) - 1;  // field of a key that is not finite
  static constexpr uint32_t kFar = kBroken - 1;
};

__device__ __forceinline__ uint32_t inverted(float v) { return ~ordered(v); }

template <int L>
__device__ __forceinline__ uint32_t row_min(uint32_t v) {
  if constexpr (L == 32) {
    return __reduce_min_sync(kFull, v);
  } else {
#pragma unroll
    for (int o = L / 2; o > 0; o >>= 1) v = min(v, __shfl_xor_sync(kFull, v, o));
    return v;
  }
}

// Smallest v that is at least `from`: v - from wraps above every v that is. The caller knows that there is one.
template <int N>
__device__ __forceinline__ uint32_t min_from(const uint32_t (&v)[N], uint32_t from) {
  uint32_t best[4] = {~0u, ~0u, ~0u, ~0u};  // four chains: one of N dependent steps would be latency bound
#pragma unroll
  for (int i = 0; i < N; ++i) best[i % 4] = __viaddmin_u32(v[i], 0u - from, best[i % 4]);
  return min(min(best[0], best[1]), min(best[2], best[3])) + from;
}

// The K best of this lane's row, best first, to chosen[0..K) in shared memory. K is at most the number of values of a lane, so
// that min_from always finds one.
template <int L, int C>
__device__ __forceinline__ void select_rows(const uint32_t (&v)[C * 8], int top_k, int gl, uint32_t* chosen) {
  uint32_t local = min_from(v, 0u);
#pragma unroll 1
  for (int round = 1; round < top_k; ++round, ++chosen) {
    const uint32_t best = row_min<L>(local);
    if (gl == 0) *chosen = best;
    local = min_from(v, best + 1u);
  }
  const uint32_t best = row_min<L>(local);
  if (gl == 0) *chosen = best;
}

// What stands below the field in chunk c: the first id, or all bits if the chunk holds no expert that may be chosen.
template <int L, int C>
__device__ __forceinline__ uint32_t base_of(const Forward& p, int c, int gl, uint32_t allowed) {
  const int first = Layout<L, C>::first(c, gl);
  return first < p.experts && (allowed >> c & 1u) ? static_cast<uint32_t>(first) : ~0u;
}

template <int L, int C>
__device__ __forceinline__ void pack_broken(uint32_t bad, const uint32_t (&base)[C], uint32_t (&v)[C * 8]) {
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    if ((bad >> i) & 1u) v[i] = (Packed<L, C>::kBroken << Packed<L, C>::kBits) | base[i / 8] | (i % 8);
  }
}

// Keys of 16 bits: nothing is lost below them.
template <int L, int C>
__device__ __forceinline__ void pack_narrow(
    const float (&key)[C * 8], uint32_t bad, const uint32_t (&base)[C], uint32_t (&v)[C * 8]) {
#pragma unroll
  for (int i = 0; i < C * 8; ++i) v[i] = ((inverted(key[i]) & ~Layout<L, C>::kIdMask) | base[i / 8]) | (i % 8);
  if (bad != 0) pack_broken<L, C>(bad, base, v);
}

// Whole fp32 keys, as the distance from the best one of the row.
template <int L, int C>
__device__ __forceinline__ void pack_whole(
    const float (&key)[C * 8], uint32_t bad, const uint32_t (&base)[C], uint32_t (&v)[C * 8]) {
  using Pack = Packed<L, C>;
#pragma unroll
  for (int i = 0; i < C * 8; ++i) v[i] = inverted(key[i]);
  if (bad != 0) {
#pragma unroll
    for (int i = 0; i < C * 8; ++i) v[i] = (bad >> i) & 1u ? ~0u : v[i];
  }
  uint32_t best = ~0u;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    uint32_t of_chunk[2] = {v[8 * c], v[8 * c + 1]};
#pragma unroll
    for (int j = 2; j < 8; ++j) of_chunk[j % 2] = min(of_chunk[j % 2], v[8 * c + j]);
    best = min(best, base[c] == ~0u ? ~0u : min(of_chunk[0], of_chunk[1]));
  }
  best = row_min<L>(best);
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    v[i] = (__viaddmin_u32(v[i], 0u - best, Pack::kFar) << Pack::kBits) | base[i / 8] | (i % 8);
  }
  if (bad != 0) pack_broken<L, C>(bad, base, v);
}

// Packed keys of logits, without bias and groups.
template <int L, int C>
__device__ __forceinline__ void pack_logits_lean(
    const Forward& p, const float (&x)[C * 8], uint32_t bad, int gl, uint32_t (&v)[C * 8]) {
  uint32_t base[C];
#pragma unroll
  for (int c = 0; c < C; ++c) base[c] = base_of<L, C>(p, c, gl, ~0u);
  if (p.logits.kind == kF32) {
    pack_whole<L, C>(x, bad, base, v);
  } else {
    pack_narrow<L, C>(x, bad, base, v);
  }
}

// Packed keys of score + bias under the group limits.
template <int L, int C>
__device__ __forceinline__ void pack_keys_lean(
    const Forward& p, float (&key)[C * 8], uint32_t bad, int gl, const GroupMemory& memory, uint32_t (&v)[C * 8]) {
  bad |= bad_bits(key);
  uint32_t allowed = ~0u;
  if (p.groups > 0) {
    if (bad != 0) {
#pragma unroll
      for (int i = 0; i < C * 8; ++i) key[i] = (bad >> i) & 1u ? kBrokenKey : key[i];
    }
    group_sums_chunked<L, C>(p, key, ~0u, gl, memory.total);
    allowed = allowed_chunks<L, C>(p, gl, memory);
  }
  uint32_t base[C];
#pragma unroll
  for (int c = 0; c < C; ++c) base[c] = base_of<L, C>(p, c, gl, allowed);
  pack_whole<L, C>(key, bad, base, v);
}

// One row selected with whole keys by the calling warp. Rare: the K-th best lies far below the best, or is not finite.
template <bool KEYED>
__device__ __noinline__ void exact_row(const Forward* p, int64_t row, const float* bias, const int* kept, int* ids) {
  auto key = [=](int e) -> uint32_t {
    const float x = load_float(p->logits, row * p->experts + e);
    const float k = KEYED ? sigmoid(x) + bias[e] : x;
    return is_finite(x) && is_finite(k) ? ordered(k) : 0u;
  };
  auto allowed = [=](int e) -> bool { return !KEYED || p->groups == 0 || kept[e / p->group_size]; };
  __syncwarp();
  select_exact(key, allowed, p->top_k, p->experts, ids);
}

// Selects the tile's doubtful rows again. Ids without a field take the place of packed keys: the id is what is read from either.
template <int L, int C, bool KEYED>
__device__ __forceinline__ void settle_rows(
    const Forward& p, int64_t first_row, int rows, const float* bias, const int* kept, uint32_t* chosen) {
  const int at = threadIdx.x % kWarp;
  const bool mine = at < rows && first_row + at < p.tokens;
  const bool doubt = mine && chosen[at * p.top_k + p.top_k - 1] >> Packed<L, C>::kBits >= Packed<L, C>::kFar;
  for (unsigned left = __ballot_sync(kFull, doubt); left != 0; left &= left - 1) {
    const int row = __ffs(left) - 1;
    exact_row<KEYED>(&p, first_row + row, bias, kept + row * p.groups, reinterpret_cast<int*>(chosen) + row * p.top_k);
  }
}

// Unnormalised scores in place of the logits, and what normalises them; z needs the softmax sums whatever the score.
template <int L, int C, bool SOFTMAX>
__device__ __forceinline__ void scores_in_place_lean(const Forward& p, float (&x)[C * 8], RowStats& s) {
  if (SOFTMAX ? p.need_scores || p.want_z : p.want_z) {
    float top[2] = {x[0], x[1]};
#pragma unroll
    for (int i = 2; i < C * 8; ++i) top[i % 2] = fmaxf(top[i % 2], x[i]);
    s.max = row_max<L>(fmaxf(top[0], top[1]));
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < C * 8; ++i) {
      const float e = exp_above_fast(x[i], s.max);
      sum[i % 4] += e;
      if constexpr (SOFTMAX) x[i] = e;
    }
    const float total = row_sum<L>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    s.inverse = reciprocal(total);
    s.lse = is_finite(s.max) ? s.max + logf(total) : s.max;
  }
  if (!SOFTMAX && p.need_scores) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < C * 8; ++i) {
      x[i] = sigmoid(x[i]);
      sum[i % 4] += x[i];
    }
    s.inverse = reciprocal(row_sum<L>((sum[0] + sum[1]) + (sum[2] + sum[3])) + kEps);
  }
}

template <int L, int C>
__device__ __forceinline__ void load_aligned(
    const FloatArray& a, int64_t row, bool live, int num_experts, int gl, float pad, float (&x)[C * 8]) {
  switch (a.kind) {
    case kF32: return load_vectors<kF32, L, C>(a.data, row, live, num_experts, gl, pad, x);
    case kBF16: return load_vectors<kBF16, L, C>(a.data, row, live, num_experts, gl, pad, x);
    default: return load_vectors<kF16, L, C>(a.data, row, live, num_experts, gl, pad, x);
  }
}

// ----------------------------------------------------------------------------------------------------------- replay
// One lane a (row, slot), as for the weights. All lanes of the warp call these.

struct Slot {
  int at, slot;  // row of the tile, slot of the row
  int64_t row;
  bool inside, live;  // a slot of a row of the batch; and the row is valid
};

__device__ __forceinline__ Slot slot_of_lane(const Forward& p, const LeanShape& shape, int64_t first_row, int first) {
  const int lane = threadIdx.x % kWarp;
  Slot s;
  s.slot = lane % shape.slot_lanes;
  s.at = first + lane / shape.slot_lanes;
  s.row = first_row + s.at;
  s.inside = s.at < shape.rows && s.row < p.tokens && s.slot < p.top_k;
  s.live = s.inside && (p.valid == nullptr || p.valid[s.row]);
  return s;
}

__device__ __forceinline__ unsigned lanes_of_row(const LeanShape& shape) {
  const unsigned lanes = shape.slot_lanes == kWarp ? kFull : (1u << shape.slot_lanes) - 1u;
  return lanes << (threadIdx.x % kWarp / shape.slot_lanes * shape.slot_lanes);
}

struct Replayed {
  int rows = 0, slots = 0;  // counted alike by all lanes of the warp
};

// Reads the tile's forced ids to forced[rows, K], -1 where a live expert has to step in. Returns whether there is such a slot.
__device__ __forceinline__ bool read_forced(
    const Forward& p, const LeanShape& shape, int64_t first_row, int* forced, Replayed& count, int* events) {
  const int lane = threadIdx.x % kWarp;
  bool fill = false;
  for (int first = 0; first < shape.rows; first += kWarp / shape.slot_lanes) {
    const Slot s = slot_of_lane(p, shape, first_row, first);
    const int id = s.live ? load_id(p.replay, s.row * p.top_k + s.slot, p.experts) : -1;
    bool duplicate = false;
    for (int o = 1; o < shape.slot_lanes; ++o) {
      const int other = __shfl_xor_sync(kFull, id, o);
      duplicate |= other == id && (lane ^ o) < lane;
    }
    const bool taken = id >= 0 && id < p.experts && !duplicate;
    if (s.inside) forced[s.at * p.top_k + s.slot] = taken ? id : -1;
    const unsigned takes = __ballot_sync(kFull, taken);
    count.slots += __popc(takes);
    count.rows += __popc(__ballot_sync(kFull, s.slot == 0 && (takes & lanes_of_row(shape)) != 0));
    if (__any_sync(kFull, s.live && !taken)) {
      fill = true;
      count_event(events, 2, s.live && id < 0);
      count_event(events, 3, id >= 0 && id < p.experts && duplicate);
      count_event(events, 4, id >= p.experts);
    }
  }
  return fill;
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

}  // namespace moe_layer::router
