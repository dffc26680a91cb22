// The forward kernel: one pass over the logits for weights, ids, counts, loss sums, events and dense outputs.
//
// One block an SM; the block owns a contiguous run of rows, its warps take 32/L rows at a time. Column sums (the scores' sums
// over tokens) stay in registers until the end, then go once per block, as 64-bit fixed point, to an [S, E] array in L2:
// integer additions commute, so the result has the same bits in every run. The block that arrives last turns them into floats.
// KEYED: with a bias or groups the key is a score, otherwise it is the logit.
#pragma once

#include "router_select.cuh"

namespace moe_layer::router {

constexpr int kMixed = -2;  // this block's rows belong to several sequences

// ------------------------------------------------------------------------------------------------------ shared memory

struct WarpMemory {
  int* live;       // [rows, K] the live selection
  int* ids;        // [rows, K] the ids returned
  float* values;   // [rows, K]
  uint32_t* bits;  // [rows, bucket/32] routing bits, if a bit map is wanted
  float* total;    // [rows, G]
  int* kept;       // [rows, G]
  float* keys;     // [rows, padded(bucket)], only if groups cut chunks or a block can meet several sequences
};

// Words of shared memory per warp; the same arithmetic as carve().
inline int warp_words(const Forward& p, int rows, int bucket, bool keyed) {
  int words = rows * p.top_k * 3;
  if (p.map_format == kBitmap) words += rows * ceil_div(bucket, 32);
  words += rows * p.groups * 2;
  const bool scanned = keyed && p.groups > 0 && !p.group_chunked,
             mixed = p.aux != kNoAux && p.cu_seqlens.data != nullptr;
  if (scanned || mixed) words += rows * (bucket + bucket / 32);
  return words;
}

__device__ __forceinline__ WarpMemory carve(const Forward& p, int32_t* base, int rows, int bucket) {
  WarpMemory m;
  m.live = base;
  m.ids = m.live + rows * p.top_k;
  m.values = reinterpret_cast<float*>(m.ids + rows * p.top_k);
  int32_t* next = base + rows * p.top_k * 3;
  m.bits = reinterpret_cast<uint32_t*>(next);
  if (p.map_format == kBitmap) next += rows * ((bucket + 31) / 32);
  m.total = reinterpret_cast<float*>(next);
  m.kept = next + rows * p.groups;
  m.keys = reinterpret_cast<float*>(m.kept + rows * p.groups);
  return m;
}

// ------------------------------------------------------------------------------------------------------------ loss sums

// Called, not inlined: it runs once per expert and block, and inlined its fp64 arithmetic would cost the row loop registers.
__device__ __forceinline__ void add_fixed(unsigned long long* target, float value, double scale) {
  if (!is_finite(value)) {
    atomicOr(target, kPoison);
  } else if (value != 0.0f) {
    atomicAdd(target, static_cast<unsigned long long>(__double2ll_rn(static_cast<double>(value) * scale)));
  }
}

__device__ __forceinline__ void wait_for_zeros() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();  // the kernel that zeroes counts and sums may still run beside this one
#endif
}

// Rows of several sequences in one block: a row's lanes send their sums away whenever their sequence changes. Through shared
// memory and a loop, because unrolled over the registers this rare path would set the register count of the whole kernel.
template <int L, int C>
__device__ __forceinline__ void flush_sums(
    const Forward& p, float (&sums)[C * 8], int sequence, int gl, float* staging) {
#pragma unroll
  for (int i = 0; i < C * 8; ++i) staging[8 * (L * (i / 8) + gl) + i % 8] = sums[i], sums[i] = 0.0f;
  if (sequence < 0) return;
#pragma unroll 1
  for (int i = 0; i < C * 8; ++i) {
    const int e = Layout<L, C>::expert(i, gl);
    if (e < p.experts) add_fixed(p.sums + static_cast<int64_t>(sequence) * p.experts + e, staging[e], p.sum_scale);
  }
}

// ---------------------------------------------------------------------------------------------------------------- a row

struct Place {  // where this lane stands
  int lane, gl, group;
  unsigned row_lanes;  // mask of the lanes of the same row
  int64_t row;
  bool inside, live;  // row < T; and valid
};

struct RowStats {
  float max = 0.0f,
        inverse = 0.0f;  // softmax over all E: p = exp(x - max) * inverse; other scores: p = score * inverse
  float key_max = 0.0f, key_inverse = 0.0f;  // the softmax over finite logits (keys of "pre" softmax)
  float lse = 0.0f;
};

// Not finite: bit i for expert i of this lane. Adds a term per logit that is 0 unless the logit is inf or NaN: cheaper than E tests.
template <int N>
__device__ __forceinline__ uint32_t bad_bits(const float (&x)[N]) {
  float probe[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < N; ++i) probe[i % 2] = fmaf(x[i], 0.0f, probe[i % 2]);
  uint32_t bits = 0;
  if (probe[0] + probe[1] != 0.0f) {
#pragma unroll
    for (int i = 0; i < N; ++i) bits |= is_finite(x[i]) ? 0u : 1u << i;
  }
  return bits;
}

// exp(x - max).
template <bool KEYED>
__device__ __forceinline__ float exp_above(float x, float max) {
  return KEYED ? expf(x - max) : exp_above_fast(x, max);  // keys must agree with the CPU's within a few ulp
}

template <int L, int C, bool KEYED>
__device__ __forceinline__ void softmax_stats(const Forward& p, bool keep, float (&x)[C * 8], RowStats& s) {
  float top[2] = {x[0], x[1]};
#pragma unroll
  for (int i = 2; i < C * 8; ++i) top[i % 2] = fmaxf(top[i % 2], x[i]);
  s.max = row_max<L>(fmaxf(top[0], top[1]));
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    const float e = exp_above<KEYED>(x[i], s.max);
    sum[i % 4] += e;
    x[i] = keep ? e : x[i];
  }
  const float total = row_sum<L>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  s.inverse = KEYED ? 1.0f / total : reciprocal(total);  // as in the lean kernel, whose keys are logits
  s.lse = is_finite(s.max) ? s.max + logf(total) : s.max;
}

// Keys of "pre" softmax in a row with inf or NaN: the softmax runs over the finite logits, the others are left out.
template <int L, int C>
__device__ __forceinline__ void finite_softmax(const float (&x)[C * 8], uint32_t bad, RowStats& s) {
  float top = -INFINITY, total = 0.0f;
#pragma unroll
  for (int i = 0; i < C * 8; ++i) top = (bad >> i) & 1u ? top : fmaxf(top, x[i]);
  s.key_max = row_max<L>(top);
#pragma unroll
  for (int i = 0; i < C * 8; ++i) total += (bad >> i) & 1u ? 0.0f : expf(x[i] - s.key_max);
  s.key_inverse = 1.0f / row_sum<L>(total);
}

// Turns x into unnormalised scores (if they are wanted) and finds what normalises them.
template <int L, int C, bool KEYED>
__device__ __forceinline__ void scores_in_place(const Forward& p, float (&x)[C * 8], RowStats& s) {
  const bool softmax = p.score == kSoftmax;
  if (p.want_z || (softmax && p.need_scores)) softmax_stats<L, C, KEYED>(p, softmax && p.need_scores, x, s);
  if (!softmax && p.need_scores) {
    if (p.score == kSigmoid) {
#pragma unroll
      for (int i = 0; i < C * 8; ++i) x[i] = sigmoid(x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < C * 8; ++i) x[i] = score_of(x[i], kSqrtSoftplus);
    }
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < C * 8; ++i) sum[i % 4] += x[i];
    s.inverse = reciprocal(row_sum<L>((sum[0] + sum[1]) + (sum[2] + sum[3])) + kEps);
  }
}

// Packed keys of the logits; 0 for pads and for what is not finite (pads have no id of their own and are never reached).
template <int L, int C>
__device__ __forceinline__ void pack_logits(
    const Forward& p, const float (&x)[C * 8], uint32_t bad, const Place& at, uint32_t (&v)[C * 8]) {
  using Lay = Layout<L, C>;
#pragma unroll
  for (int i = 0; i < C * 8; ++i) v[i] = Lay::pack(ordered(x[i]), i, at.gl);
  if (bad != 0) {
#pragma unroll
    for (int i = 0; i < C * 8; ++i) v[i] = (bad >> i) & 1u ? Lay::pack(0u, i, at.gl) : v[i];
  }
  if (p.experts < Lay::kBucket) {
#pragma unroll
    for (int i = 0; i < C * 8; ++i) v[i] = Lay::expert(i, at.gl) < p.experts ? v[i] : 0u;
  }
}

// The score (+ bias) of one expert of a row, as selection sees it, from the logit itself: the twin of keys in registers.
__device__ __forceinline__ float selection_key(
    const Forward& p, float x, float key_max, float key_inverse, float bias) {
  if (p.key_is_logit) return x + bias;
  if (p.score == kSoftmax) return expf(x - key_max) * key_inverse + bias;
  return score_of(x, p.score) + bias;
}

template <int L, int C>
__device__ __forceinline__ void pack_keys(
    const Forward& p, const float (&key)[C * 8], uint32_t bad, const Place& at, const GroupMemory& memory,
    uint32_t (&v)[C * 8]) {
  using Lay = Layout<L, C>;
  const uint32_t usable = ~(bad | bad_bits(key));
  const uint32_t allowed = p.groups > 0 ? allowed_by_groups<L, C>(p, key, usable, at.gl, memory) : 0xffffffffu;
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    const uint32_t packed = Lay::pack((usable >> i) & 1u ? ordered(key[i]) : 0u, i, at.gl);
    v[i] = (allowed >> i) & 1u ? packed : 0u;
  }
  if (p.experts < Lay::kBucket) {
#pragma unroll
    for (int i = 0; i < C * 8; ++i) v[i] = Lay::expert(i, at.gl) < p.experts ? v[i] : 0u;
  }
}

// ------------------------------------------------------------------------------------------------------------- selection

// Rows whose packed selection was doubtful, selected again one by one by the whole warp. `keyed` false: keys are logits.
template <int L>
__device__ __forceinline__ void repair(
    const Forward& p, bool near, bool keyed, const Place& at, const RowStats& s, const float* bias, const int* kept,
    int* ids) {
  unsigned doubtful = __ballot_sync(kFull, near);
  while (doubtful != 0) {
    const int leader = (__ffs(doubtful) - 1) / L * L;
    doubtful &= ~((L == 32 ? kFull : ((1u << L) - 1u)) << leader);
    const int group = leader / L;
    const int64_t start = __shfl_sync(kFull, at.row, leader) * p.experts;
    const float key_max = __shfl_sync(kFull, s.key_max, leader),
                key_inverse = __shfl_sync(kFull, s.key_inverse, leader);
    const int* row_kept = kept + group * p.groups;
    const Forward* args = &p;  // captured by value: a capture by reference would put the row's state on the stack
    auto key = [=](int e) -> uint32_t {
      const float x = load_float(args->logits, start + e);
      const float k = keyed ? selection_key(*args, x, key_max, key_inverse, bias[e]) : x;
      return is_finite(x) && is_finite(k) ? ordered(k) : 0u;
    };
    auto allowed = [=](int e) -> bool { return !keyed || args->groups == 0 || row_kept[e / args->group_size]; };
    __syncwarp();
    select_exact(key, allowed, p.top_k, p.experts, ids + group * p.top_k);
  }
}

// events[] in shared memory: rows replayed, slots replayed, missing, duplicate, out of range, rows that are not finite.
__device__ __forceinline__ void count_event(int* events, int which, bool hit) {
  const int hits = __popc(__ballot_sync(kFull, hit));
  if (hits != 0 && threadIdx.x % kWarp == 0) atomicAdd(&events[which], hits);
}

// Reads the replay row into m.ids; returns the mask of slots that need a live expert, in all lanes of the row.
template <int L>
__device__ __forceinline__ uint32_t read_replay(const Forward& p, const Place& at, int* wanted, int* events) {
  for (int slot = at.gl; slot < p.top_k; slot += L) {
    wanted[slot] = at.live ? load_id(p.replay, at.row * p.top_k + slot, p.experts) : -1;
  }
  __syncwarp();
  uint32_t missing = 0;
  bool any = false;
  for (int first = 0; first < p.top_k; first += L) {
    const int slot = first + at.gl;
    const bool here = at.live && slot < p.top_k;
    const int state = here ? slot_state(wanted, slot, p.experts) : -1;
    any |= state == kReplayed;
    if (here && state != kReplayed) missing |= 1u << slot;
#pragma unroll
    for (int k = 0; k < 4; ++k) count_event(events, 1 + k, state == k);
  }
  const bool row_any = row_or<L>(any ? 1u : 0u) != 0;
  count_event(events, 0, row_any && at.gl == 0);
  return row_or<L>(missing);
}

}  // namespace moe_layer::router
