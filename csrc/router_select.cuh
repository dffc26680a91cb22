// Selection inside a warp: the K best of a row's keys, group limits, and the exact fallback for near ties.
//
// Keys are packed in 32 bits: the high bits of the ordered fp32 key, below them the complement of the expert's id. All packed
// keys of a row differ, so a round of selection is one maximum over the row and needs no index beside it, and equal keys go to
// the lower id by themselves. What the id displaces (7 to 10 low bits) is lost: when two of the K + 1 best agree in all bits
// that are left, the row is selected again with whole keys (`select_exact`). 16-bit logits lose nothing and skip the test.
// A key field of 0 is a key that is not finite: last, by lower id, and exact.
#pragma once

#include "router_args.cuh"

namespace moe_layer::router {

template <int L, int C>
struct Layout {
  static constexpr int kValues = C * 8;
  static constexpr int kBucket = L * kValues;
  static constexpr int kRows = kWarp / L;
  static constexpr int kIdBits = kBucket <= 8     ? 3
                                 : kBucket <= 64  ? 6
                                 : kBucket <= 128 ? 7
                                 : kBucket <= 256 ? 8
                                 : kBucket <= 512 ? 9
                                                  : 10;
  static constexpr uint32_t kIdMask = (1u << kIdBits) - 1;
  static_assert(kBucket <= (1 << kIdBits), "one id for every expert of the bucket");

  __device__ static __forceinline__ int first(int c, int gl) { return 8 * (c * L + gl); }
  __device__ static __forceinline__ int expert(int i, int gl) { return first(i / 8, gl) + i % 8; }
  // kIdMask - expert without a subtraction per expert: the first of a chunk is a multiple of 8.
  __device__ static __forceinline__ uint32_t pack(uint32_t key, int i, int gl) {
    return ((key & ~kIdMask) | (kIdMask - static_cast<uint32_t>(first(i / 8, gl)))) ^ static_cast<uint32_t>(i % 8);
  }
  __device__ static __forceinline__ int id(uint32_t packed) { return static_cast<int>(kIdMask - (packed & kIdMask)); }
};

// Largest of v below `limit`, 0 if there is none: v - limit wraps above every v that is not below it. limit 0 gives the plain
// maximum. With K above the N values of a lane all of them may have been taken.
template <int N>
__device__ __forceinline__ uint32_t max_below(const uint32_t (&v)[N], uint32_t limit) {
  uint32_t best[4] = {0, 0, 0, 0};  // four chains: one of N dependent steps would be latency bound
#pragma unroll
  for (int i = 0; i < N; ++i) best[i % 4] = __viaddmax_u32(v[i], 0u - limit, best[i % 4]);
  const uint32_t found = max(max(best[0], best[1]), max(best[2], best[3])) + limit;
  return limit != 0 && found >= limit ? 0u : found;
}

// Writes the ids of the K best to ids[0..K) (shared memory, by lane 0 of the row). Returns whether a near tie makes that doubtful:
// anywhere among the K + 1 best if the order matters, else only at the boundary. `check` false: the keys are exact.
template <int L, int C>
__device__ __forceinline__ bool select_packed(
    const uint32_t (&v)[C * 8], int top_k, int num_experts, bool check, bool order_matters, int gl, int* ids) {
  using Lay = Layout<L, C>;
  const int rounds = top_k + (check && top_k < num_experts ? 1 : 0);
  bool near = false;
  uint32_t previous = 0;
  uint32_t local = max_below(v, 0u);
  for (int round = 0; round < rounds; ++round) {
    const uint32_t best = row_max<L>(local);
    const bool same_field = previous > Lay::kIdMask && (previous ^ best) <= Lay::kIdMask;
    near |= check && same_field && (order_matters || round == top_k);
    if (gl == 0 && round < top_k) ids[round] = Lay::id(best);
    previous = best;
    if (round + 1 < rounds) local = max_below(v, best);
  }
  return near;
}

// Whole-key selection of one row by the whole warp, slow and rare. key(e) is the ordered key, 0 if not finite; allowed(e) false
// keeps an expert out. Each round takes the best key after the last one in the order (key descending, id ascending).
template <typename Key, typename Allowed>
__device__ __forceinline__ void select_exact(Key key, Allowed allowed, int top_k, int num_experts, int* ids) {
  const int lane = threadIdx.x % kWarp;
  uint32_t last_key = 0xffffffffu;
  int last_id = -1;
  for (int round = 0; round < top_k; ++round) {
    uint32_t best_key = 0;
    int best_id = INT_MAX;
    for (int e = lane; e < num_experts; e += kWarp) {
      if (!allowed(e)) continue;
      const uint32_t k = key(e);
      const bool after = k < last_key || (k == last_key && e > last_id);
      if (after && (best_id == INT_MAX || k > best_key)) best_key = k, best_id = e;
    }
    last_key = __reduce_max_sync(kFull, best_key);
    const unsigned candidate = best_id != INT_MAX && best_key == last_key ? best_id : INT_MAX;
    last_id = static_cast<int>(__reduce_min_sync(kFull, candidate));
    if (lane == 0) ids[round] = last_id;
  }
  __syncwarp();
}

// --------------------------------------------------------------------------------------------------------- group limits

// Per row in shared memory: the groups' sums, whether each group stays, and (only for groups that cut chunks) the keys.
struct GroupMemory {
  float* total;
  int* kept;
  float* keys;
};

__device__ __forceinline__ int padded(int e) { return e + e / 32; }  // groups of 32 would all start in one bank

// Sums of the one or two best keys, groups being runs of whole chunks: in registers, then over the group's lanes.
template <int L, int C>
__device__ __forceinline__ void group_sums_chunked(
    const Forward& p, const float (&key)[C * 8], uint32_t usable, int gl, float* total) {
  const int lanes = p.group_size >> 3;  // a power of two
#pragma unroll
  for (int c = 0; c < C; ++c) {
    float high = -INFINITY, low = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float k = (usable >> (8 * c + j)) & 1u ? key[8 * c + j] : kBrokenKey;
      low = fmaxf(low, fminf(high, k));
      high = fmaxf(high, k);
    }
    for (int o = 1; o < lanes; o <<= 1) {
      const float other_high = __shfl_xor_sync(kFull, high, o), other_low = __shfl_xor_sync(kFull, low, o);
      low = fmaxf(fminf(high, other_high), fmaxf(low, other_low));
      high = fmaxf(high, other_high);
    }
    const int first = Layout<L, C>::first(c, gl);
    if (first < p.experts && (gl & (lanes - 1)) == 0)
      total[first >> p.group_shift] = p.group_count == 1 ? high : high + low;
  }
}

// The same for any group size and count: one lane a group scans the keys in shared memory, best key first.
template <int L, int C>
__device__ __forceinline__ void group_sums_scanned(
    const Forward& p, const float (&key)[C * 8], uint32_t usable, int gl, const GroupMemory& memory) {
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    const int e = Layout<L, C>::expert(i, gl);
    if (e < p.experts) memory.keys[padded(e)] = (usable >> i) & 1u ? key[i] : kBrokenKey;
  }
  __syncwarp();
  for (int group = gl; group < p.groups; group += L) {
    float last = INFINITY, sum = 0.0f;
    int last_id = -1;
    for (int pick = 0; pick < p.group_count; ++pick) {
      float best = -INFINITY;
      int best_id = -1;
      for (int e = group * p.group_size; e < (group + 1) * p.group_size; ++e) {
        const float k = memory.keys[padded(e)];
        if ((k < last || (k == last && e > last_id)) && k > best) best = k, best_id = e;
      }
      sum = pick == 0 ? best : sum + best;
      last = best, last_id = best_id;
    }
    memory.total[group] = sum;
  }
}

// Which groups stay, from their sums in memory.total; ties go to the lower group. Called by all lanes of the warp.
template <int L>
__device__ __forceinline__ void keep_groups(const Forward& p, int gl, const GroupMemory& memory) {
  __syncwarp();
  for (int group = gl; group < p.groups; group += L) {
    const float mine = memory.total[group];
    int rank = 0;
    for (int other = 0; other < p.groups; ++other) {
      const float total = memory.total[other];
      rank += total > mine || (total == mine && other < group);
    }
    memory.kept[group] = rank < p.group_topk;
  }
  __syncwarp();
}

// Bit c: chunk c of this lane stands in one of the row's best groups (groups of whole chunks).
template <int L, int C>
__device__ __forceinline__ uint32_t allowed_chunks(const Forward& p, int gl, const GroupMemory& memory) {
  keep_groups<L>(p, gl, memory);
  uint32_t allowed = 0;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int first = Layout<L, C>::first(c, gl);
    if (first < p.experts && memory.kept[first >> p.group_shift]) allowed |= 1u << c;
  }
  return allowed;
}

// Bit i: expert i of this lane stands in one of the row's best groups. A key that is not usable (finite) counts kBrokenKey.
template <int L, int C>
__device__ __forceinline__ uint32_t
allowed_by_groups(const Forward& p, const float (&key)[C * 8], uint32_t usable, int gl, const GroupMemory& memory) {
  if (p.group_chunked) {
    group_sums_chunked<L, C>(p, key, usable, gl, memory.total);
  } else {
    group_sums_scanned<L, C>(p, key, usable, gl, memory);
  }
  keep_groups<L>(p, gl, memory);
  uint32_t allowed = 0;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int first = Layout<L, C>::first(c, gl);
    if (p.group_chunked) {
      if (first < p.experts && memory.kept[first >> p.group_shift]) allowed |= 0xffu << (8 * c);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (first + j < p.experts && memory.kept[(first + j) / p.group_size]) allowed |= 1u << (8 * c + j);
      }
    }
  }
  return allowed;
}

// --------------------------------------------------------------------------------------------------------------- replay

enum SlotState : int { kReplayed, kMissing, kDuplicate, kOutOfRange };

__device__ __forceinline__ int slot_state(const int* wanted, int slot, int num_experts) {
  const int id = wanted[slot];
  if (id < 0) return kMissing;
  if (id >= num_experts) return kOutOfRange;
  for (int earlier = 0; earlier < slot; ++earlier) {
    if (wanted[earlier] == id) return kDuplicate;
  }
  return kReplayed;
}

// Fills the slots of `missing` (a bit a slot, K <= 32) with the best live experts that the replayed slots do not hold. The live
// list has K experts and at most K - missing of them are held, so there are always enough. All lanes of the row call it.
template <int L>
__device__ __forceinline__ void fill_slots(
    const int* wanted, const int* live, uint32_t missing, int top_k, int gl, int* ids) {
  uint32_t free_mask = 0;
  for (int c = gl; c < top_k; c += L) {
    bool held = false;
    for (int slot = 0; slot < top_k; ++slot) held |= !((missing >> slot) & 1u) && wanted[slot] == live[c];
    free_mask |= held ? 0u : 1u << c;
  }
  free_mask = row_or<L>(free_mask);
  for (int slot = gl; slot < top_k; slot += L) {
    if (!((missing >> slot) & 1u)) {
      ids[slot] = wanted[slot];
      continue;
    }
    uint32_t left = free_mask;
    for (int skip = __popc(missing & ((1u << slot) - 1u)); skip > 0; --skip) left &= left - 1;
    ids[slot] = live[__ffs(left) - 1];
  }
}

}  // namespace moe_layer::router
