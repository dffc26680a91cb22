// Parts of the lean forward kernel (router_fwd_lean.cuh): shapes, near ties, selection, scores, packed keys.
#pragma once

#include "router_fwd_outputs.cuh"

namespace moe_layer::router {

enum Mode : int { kSoftmaxPlain, kSigmoidPlain, kSigmoidKeyed };

constexpr int kExtra = 4;  // near ties followed past the K-th expert before the row is selected with whole keys
#ifndef MOE_ROUTER_LEAN_THREADS
#define MOE_ROUTER_LEAN_THREADS 768
#endif
constexpr int kLeanThreads = MOE_ROUTER_LEAN_THREADS;

struct LeanShape {
  int rows;        // rows of a tile: the larger of 32/L and 32/W
  int slot_lanes;  // W
  int stride;      // ids of a row in shared memory, K + kExtra
};

// Shared memory of a warp, in words: ids, the unbiased ids, refined keys and ids, then the groups' sums and flags.
__host__ __device__ inline int lean_words(const LeanShape& t, int groups, bool apart) {
  return t.rows * t.stride * (apart ? 4 : 3) + t.rows * (groups * 2 + 4);
}

// One row selected with whole keys by the calling warp: many keys agree in all packed bits (a router of zeros, say).
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

// Puts the candidates of the tile's rows in the order of their whole keys; only the first K of them stay. counts[at] is what
// select_rows returned. Called between selection and weights, when few registers are live.
template <int L, bool KEYED>
__device__ __noinline__ void refine_rows(
    const Forward* p, int64_t first_row, int rows, const float* bias, const int* kept, const int* counts, int* ids,
    int* scratch) {
  const int lane = threadIdx.x % kWarp, gl = lane % L, stride = p->top_k + kExtra;
  for (int step = 0; step < rows; step += kWarp / L) {
    const int at = step + lane / L, count = counts[at];
    int* mine = ids + at * stride;
    uint32_t* keys = reinterpret_cast<uint32_t*>(scratch + at * 2 * stride);
    int* sorted = scratch + at * 2 * stride + stride;
    for (int s = gl; s < count; s += L) {
      const float x = load_float(p->logits, (first_row + at) * p->experts + mine[s]);
      const float k = KEYED ? sigmoid(x) + bias[mine[s]] : x;
      keys[s] = is_finite(x) && is_finite(k) ? ordered(k) : 0u;
    }
    __syncwarp();
    for (int s = gl; s < count; s += L) {
      int rank = 0;
      for (int other = 0; other < count; ++other)
        rank += keys[other] > keys[s] || (keys[other] == keys[s] && mine[other] < mine[s]);
      sorted[rank] = mine[s];
    }
    __syncwarp();
    for (int s = gl; count > 0 && s < p->top_k; s += L) mine[s] = sorted[s];
    unsigned overflow = __ballot_sync(kFull, count == p->top_k + kExtra && gl == 0);
    for (; overflow != 0; overflow &= overflow - 1) {
      const int row = step + (__ffs(overflow) - 1) / L;
      exact_row<KEYED>(p, first_row + row, bias, kept + row * p->groups, ids + row * stride);
    }
  }
  __syncwarp();
}

// Candidates of a row for refine_rows: K, more if the K-th is nearly tied with what follows; 0 if the packed order is certain.
// The K best of this lane's row go to ids[0..K) in shared memory, further candidates behind them.
template <int L, int C>
__device__ __forceinline__ int select_rows(
    const Forward& p, const uint32_t (&v)[C * 8], bool check, bool order_matters, bool live, int gl, int* ids) {
  using Lay = Layout<L, C>;
  bool near = false;
  uint32_t previous = 0;
  uint32_t local = max_below(v, 0u);
  for (int round = 0; round < p.top_k; ++round) {
    const uint32_t best = row_max<L>(local);
    if (gl == 0) ids[round] = Lay::id(best);
    near |= order_matters && previous > Lay::kIdMask && (previous ^ best) <= Lay::kIdMask;
    previous = best;
    local = max_below(v, best);
  }
  if (!check || !live) near = false;
  int count = p.top_k;
  bool more = check && live;
#pragma unroll 1
  for (int extra = 0; check && p.top_k + extra < p.experts && extra < kExtra; ++extra) {
    const uint32_t best = row_max<L>(local);
    more = more && previous > Lay::kIdMask && (previous ^ best) <= Lay::kIdMask;
    if (!__any_sync(kFull, more)) break;
    if (more && gl == 0) ids[p.top_k + extra] = Lay::id(best);
    count += more;
    previous = best;
    local = max_below(v, best);
  }
  return near || count > p.top_k ? count : 0;
}

// Unnormalised scores in place of the logits, and what normalises them; z needs the softmax sums whatever the score.
template <int L, int C, bool SOFTMAX>
__device__ __forceinline__ void scores_in_place_lean(const Forward& p, float (&x)[C * 8], RowStats& s) {
  if (SOFTMAX ? p.need_scores || p.want_z : p.want_z) {
    float top[2] = {x[0], x[1]};
#pragma unroll
    for (int i = 2; i < C * 8; ++i) top[i % 2] = fmaxf(top[i % 2], x[i]);
    s.max = row_max<L>(fmaxf(top[0], top[1]));
    const float offset = s.max * kLog2e;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < C * 8; ++i) {
      const float e = exp2_fast(fmaf(x[i], kLog2e, -offset));
      sum[i % 4] += e;
      if constexpr (SOFTMAX) x[i] = e;
    }
    const float total = row_sum<L>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    s.inverse = reciprocal(total);
    s.lse = is_finite(s.max) ? fmaf(offset, kLn2, logf(total)) : s.max;
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

// Packed keys of the logits: 0 in the key field of what is not finite, 0 altogether where there is no expert.
template <int L, int C>
__device__ __forceinline__ void pack_logits_lean(
    const Forward& p, const float (&x)[C * 8], uint32_t bad, bool pads, int gl, uint32_t (&v)[C * 8]) {
  using Lay = Layout<L, C>;
#pragma unroll
  for (int i = 0; i < C * 8; ++i) v[i] = Lay::pack(ordered(x[i]), i, gl);
  if (bad != 0) {
#pragma unroll
    for (int i = 0; i < C * 8; ++i) v[i] = (bad >> i) & 1u ? Lay::pack(0u, i, gl) : v[i];
  }
  if (pads) {
#pragma unroll
    for (int i = 0; i < C * 8; ++i) v[i] = Lay::expert(i, gl) < p.experts ? v[i] : 0u;
  }
}

// Packed keys of score + bias under the group limits.
template <int L, int C>
__device__ __forceinline__ void pack_keys_lean(
    const Forward& p, const float (&key)[C * 8], uint32_t bad, int gl, const GroupMemory& memory,
    uint32_t (&v)[C * 8]) {
  using Lay = Layout<L, C>;
  const uint32_t usable = ~(bad | bad_bits(key));
  uint32_t allowed = 0xffffffffu;
  if (p.groups > 0) {
    group_sums_chunked<L, C>(p, key, usable, gl, memory.total);
    allowed = allowed_chunks<L, C>(p, gl, memory);
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const bool present = (allowed >> c & 1u) && Lay::first(c, gl) < p.experts;
#pragma unroll
    for (int j = 0; j < 8; ++j) v[8 * c + j] = present ? Lay::pack(ordered(key[8 * c + j]), 8 * c + j, gl) : 0u;
  }
  if (usable != 0xffffffffu) {
#pragma unroll
    for (int i = 0; i < C * 8; ++i) v[i] = (usable >> i) & 1u || v[i] == 0u ? v[i] : Lay::pack(0u, i, gl);
  }
}

}  // namespace moe_layer::router
