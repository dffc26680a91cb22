// Parts of the lean forward kernel (router_fwd_lean.cuh): shapes, packed keys, selection, scores.
//
// A packed key is a field above an expert's id, and smaller is better. For 16-bit logits the field is the inverted key: exact.
// For fp32 keys it is the distance from the row's best key, in steps of the fp32 grid: exact down to a quarter of the best key
// (E 256; a factor 2 at E 512, 16 at E 128). A key farther away gets the field kFar, and a row that has to choose among those is
// selected again with whole keys (`exact_row`). All packed keys of a row differ and equal keys go to the lower id by themselves.
#pragma once

#include "router_lean_select.cuh"
#include "router_rows.cuh"

namespace moe_layer::router {

enum Mode : int { kSoftmaxPlain, kSigmoidPlain, kSigmoidKeyed, kSigmoidQuads };  // the last one: router_lean_groups.cuh

// Shared memory of a warp, in words: ids, unbiased ids, forced ids, groups' sums and flags, softmax of "pre" weights, the
// rows' worst forced keys, forced experts seen.
__host__ __device__ inline int lean_words(const Forward& p, const LeanShape& t, bool keyed) {
  const int lists = 1 + (keyed && p.live_apart ? 1 : 0) + (p.replay.data != nullptr ? 1 : 0);
  const int seen = p.replay.data != nullptr ? (kWarp >> t.slot_shift) * ceil_div(p.experts, kWarp) : 0;
  return t.rows * (p.top_k * lists + p.groups * 2 + 2 + (p.replay.data != nullptr ? 1 : 0)) + seen;
}

template <int L, int C>
struct Packed : Layout<L, C> {
  static constexpr int kBits = Layout<L, C>::kIdBits;
  static constexpr uint32_t kBroken = (1u << (32 - kBits)) - 1;  // field of a key that is not finite
  static constexpr uint32_t kFar = kBroken - 1;
};

__device__ __forceinline__ uint32_t inverted(float v) { return ~ordered(v); }

// The fp32 number whose inverted key this is.
__device__ __forceinline__ float uninverted(uint32_t key) {
  return __uint_as_float(static_cast<int32_t>(key) < 0 ? key : ~key ^ 0x80000000u);
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

// Bits of a positive number that an inverted key of 16 bits has flipped. Those of the id are spared: they are 0 in the number.
template <int L, int C>
__device__ __forceinline__ constexpr uint32_t flipped_bits() {
  return 0x7fffffffu & ~Layout<L, C>::kIdMask;
}

// Keys of 16 bits: nothing is lost below them.
template <int L, int C>
__device__ __forceinline__ uint32_t packed_key(float key, uint32_t id) {
  const uint32_t bits = __float_as_uint(key + 0.0f), sign = static_cast<int32_t>(bits) >> 31;
  return (bits ^ (~sign & flipped_bits<L, C>())) | id;
}

template <int L, int C>
__device__ __forceinline__ void pack_narrow(
    const float (&key)[C * 8], uint32_t bad, const uint32_t (&base)[C], uint32_t (&v)[C * 8]) {
#pragma unroll
  for (int i = 0; i < C * 8; ++i) v[i] = packed_key<L, C>(key[i], base[i / 8] | (i % 8));
  if (bad != 0) pack_broken<L, C>(bad, base, v);
}

// The 16-bit key of a packed one.
template <int L, int C>
__device__ __forceinline__ float narrow_key(uint32_t packed) {
  const uint32_t bits = packed & ~Layout<L, C>::kIdMask;
  return __uint_as_float(static_cast<int32_t>(bits) < 0 ? bits : bits ^ flipped_bits<L, C>());
}

// Whole fp32 keys, as the distance from the best one of the row, which is returned.
template <int L, int C>
__device__ __forceinline__ float pack_whole(
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
  for (int c = 0; c < C; ++c) best = min(best, base[c] == ~0u ? ~0u : min_of<8>(v + 8 * c));
  best = row_min<L>(best);
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    v[i] = (__viaddmin_u32(v[i], 0u - best, Pack::kFar) << Pack::kBits) | base[i / 8] | (i % 8);
  }
  if (bad != 0) pack_broken<L, C>(bad, base, v);
  return uninverted(best);
}

// Packed keys of logits, without bias and groups. Returns the row's largest logit, provided that all are finite.
template <int L, int C, bool WIDE>
__device__ __forceinline__ float pack_logits_lean(
    const Forward& p, const float (&x)[C * 8], uint32_t bad, int gl, uint32_t (&v)[C * 8]) {
  uint32_t base[C];
#pragma unroll
  for (int c = 0; c < C; ++c) base[c] = base_of<L, C>(p, c, gl, ~0u);
  if constexpr (WIDE) {
    return pack_whole<L, C>(x, bad, base, v);
  } else {
    pack_narrow<L, C>(x, bad, base, v);
    return 0.0f;
  }
}

// Bit c: chunk c of this lane stands in one of the row's best groups. Also to memory.kept, for rows that are selected again.
template <int L, int C>
__device__ __forceinline__ uint32_t allowed_chunks_lean(const Forward& p, int gl, const GroupMemory& memory) {
  if (p.groups > L) return allowed_chunks<L, C>(p, gl, memory);
  __syncwarp();
  const bool mine = gl < p.groups;
  const float total = mine ? memory.total[gl] : 0.0f;
  int rank = 0;
#pragma unroll 4
  for (int other = 0; other < p.groups; ++other) {
    const float t = memory.total[other];
    rank += t > total || (t == total && other < gl);
  }
  const bool stays = mine && rank < p.group_topk;
  if (mine) memory.kept[gl] = stays;
  const unsigned kept = __ballot_sync(kFull, stays) >> (threadIdx.x % kWarp & ~(L - 1));
  uint32_t allowed = 0;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int first = Layout<L, C>::first(c, gl);
    if (first < p.experts) allowed |= (kept >> (first >> p.group_shift) & 1u) << c;
  }
  return allowed;
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
    allowed = allowed_chunks_lean<L, C>(p, gl, memory);
  }
  uint32_t base[C];
#pragma unroll
  for (int c = 0; c < C; ++c) base[c] = base_of<L, C>(p, c, gl, allowed);
  pack_whole<L, C>(key, bad, base, v);
}

// One row of at most 512 experts whose K-th best lies far below the best, or is not finite: what follows the `done` best ones, which
// stand in chosen[], is selected with whole keys by the calling warp. Of normally distributed fp32 logits 1 row in 100 at 384 and 512
// experts, 3 of 8 experts with K 2, none at 64 to 256. Lane l holds experts l, l + 32, ...
template <bool KEYED, class Rows>
__device__ __noinline__ void exact_row(
    const Forward* p, const Rows rows, int64_t row, const float* bias, const int* kept, int done, uint32_t id_mask,
    uint32_t* chosen) {
  constexpr int kEach = 512 / kWarp;
  const int lane = threadIdx.x % kWarp;
  uint32_t key[kEach], open = 0;  // bit i: expert lane + 32 i may still be chosen
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int e = lane + kWarp * i;
    key[i] = 0;
    if (e < p->experts && (!KEYED || p->groups == 0 || kept[e >> p->group_shift])) {
      const float x = rows.at(row, e), k = KEYED ? sigmoid(x) + bias[e] : x;
      key[i] = is_finite(x) && is_finite(k) ? ordered(k) : 0u;
      open |= 1u << i;
    }
  }
  for (int r = 0; r < done; ++r) {
    const uint32_t id = chosen[r] & id_mask;
    if (id % kWarp == lane) open &= ~(1u << id / kWarp);
  }
  for (int round = done; round < p->top_k; ++round) {
    uint32_t best = 0;
    int at = -1;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if ((open >> i & 1u) && (at < 0 || key[i] > best)) best = key[i], at = i;
    }
    const uint32_t row_best = __reduce_max_sync(kFull, best);
    const unsigned mine = at >= 0 && best == row_best ? lane + kWarp * at : INT_MAX;
    const unsigned id = __reduce_min_sync(kFull, mine);
    if (mine == id) open &= ~(1u << at);
    if (lane == 0) chosen[round] = id;
  }
  __syncwarp();
}

// Selects the end of the tile's doubtful rows again, if the row of lane l, `here` there, has been selected. Ids without a field take the place of packed keys: the id is what is read from either.
template <int L, int C, bool KEYED, class Rows>
__device__ __forceinline__ void settle_rows(
    const Forward& p, const Rows& rows, int64_t first_row, int count, bool here, const float* bias, const int* kept,
    uint32_t* chosen) {
  using Pack = Packed<L, C>;
  const int at = threadIdx.x % kWarp;
  const bool mine = here && at < count && first_row + at < p.tokens;
  const bool doubt = mine && chosen[at * p.top_k + p.top_k - 1] >> Pack::kBits >= Pack::kFar;
  for (unsigned left = __ballot_sync(kFull, doubt); left != 0; left &= left - 1) {
    const int row = __ffs(left) - 1;
    uint32_t* of_row = chosen + row * p.top_k;
    const bool sure = at < p.top_k && of_row[at < p.top_k ? at : 0] >> Pack::kBits < Pack::kFar;
    const int done = __popc(__ballot_sync(kFull, sure));
    exact_row<KEYED>(&p, rows, first_row + row, bias, kept + row * p.groups, done, Pack::kIdMask, of_row);
  }
}

// Sigmoid scores in place of the logits and their sum, and the softmax sums that z needs, from one exponential an expert. Without
// a maximum: returns false, and the row has to be loaded again, if that leaves the range of fp32 in a row of the warp.
template <int L, int C>
__device__ __forceinline__ bool sigmoid_and_z(bool live, float (&x)[C * 8], RowStats& s) {
  float sum[2] = {0.0f, 0.0f}, scores[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    const float e = exp_compensated(x[i]);
    sum[i % 2] += e;
    x[i] = e * reciprocal(1.0f + e);
    scores[i % 2] += x[i];
  }
  const float total = row_sum<L>(sum[0] + sum[1]), score = row_sum<L>(scores[0] + scores[1]);
  if (!__all_sync(kFull, !live || (total > 1e-30f && total < 1e30f))) return false;
  s.lse = logf(total);
  s.inverse = reciprocal(score + kEps);
  return true;
}

// Unnormalised scores in place of the logits, and what normalises them; z needs the softmax sums whatever the score. `known`: the
// row's maximum is in s.max.
template <int L, int C, bool SOFTMAX>
__device__ __forceinline__ void scores_in_place_lean(const Forward& p, bool known, float (&x)[C * 8], RowStats& s) {
  if (SOFTMAX ? p.need_scores || p.want_z : p.want_z) {
    if (!known) {
      float top[2] = {x[0], x[1]};
#pragma unroll
      for (int i = 2; i < C * 8; ++i) top[i % 2] = fmaxf(top[i % 2], x[i]);
      s.max = row_max<L>(fmaxf(top[0], top[1]));
    }
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

// Shared memory of a block. The buffers of the warps come first, for they are read in 16-byte words.
template <int THREADS>
struct LeanMemory {
  struct Scratch {
    double z[THREADS / kWarp];
    int events[6];
  };
  int32_t *buffers, *hist, *hist_aux;
  float* bias;
  Scratch& scratch;

  __device__ __forceinline__ LeanMemory(const Forward& p, int32_t* shared, Scratch& own)
      : buffers(shared),
        hist(shared + p.block_words),
        hist_aux(p.live_apart ? hist + p.experts : hist),
        bias(reinterpret_cast<float*>(hist_aux + p.experts)),
        scratch(own) {}

  __device__ __forceinline__ void clear(const Forward& p) const {
#pragma unroll 1
    for (int e = threadIdx.x; e < p.experts; e += THREADS) hist[e] = 0, hist_aux[e] = 0;
    if (threadIdx.x < 6) scratch.events[threadIdx.x] = 0;
  }

  __device__ __forceinline__ void load_bias(const Forward& p, int bucket) const {
    for (int e = threadIdx.x; e < bucket; e += THREADS) {
      bias[e] = p.bias.data != nullptr && e < p.experts ? load_float(p.bias, e) : 0.0f;
    }
  }
};

}  // namespace moe_layer::router
