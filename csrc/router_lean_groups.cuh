// Group limits of the lean forward kernel where a row's 8 lanes hold 4 experts of each of its 8 groups of 32 (DeepSeek-V3).
//
// In this layout value 4 q + j of a lane is expert 32 q + 4 lane + j: quad q lies in group q. So a group's two best keys are found by
// all lanes alike, and after the choice of at most 4 groups every lane is left with at most 4 quads, half of its keys, of which
// the experts are selected. The quads go through shared memory, because registers cannot be indexed by a group that differs from
// row to row.
#pragma once

#include "router_lean_parts.cuh"

namespace moe_layer::router {

struct Quads {
  static constexpr int kLanes = 8, kQuads = 8, kValues = 32, kKept = 4, kIdBits = 8;
  static constexpr int kWords = kWarp * kValues;  // of a warp's keys in shared memory

  __device__ static __forceinline__ int first(int quad, int gl) { return 32 * quad + 4 * gl; }
};

inline bool quads_fit(const Forward& p) {
  return p.experts == 256 && p.groups == 8 && p.group_topk <= Quads::kKept && p.group_count <= 2;
}

// Whether one of the 256 biases is not finite. All lanes of the warp call it.
__device__ __forceinline__ bool has_broken(const float* bias, int lane) {
  bool broken = false;
#pragma unroll
  for (int e = 0; e < 256; e += kWarp) broken |= !is_finite(bias[e + lane]);
  return __any_sync(kFull, broken);
}

// A lane's quads of a row; 0 without a row.
template <bool WIDE>
__device__ __forceinline__ void load_quads(const FloatArray& a, int row, bool live, int gl, float (&x)[32]) {
  if constexpr (WIDE) {
    const float4* source = reinterpret_cast<const float4*>(static_cast<const float*>(a.data) + row * 256) + gl;
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      const float4 v = live ? __ldg(source + 8 * q) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      x[4 * q] = v.x, x[4 * q + 1] = v.y, x[4 * q + 2] = v.z, x[4 * q + 3] = v.w;
    }
  } else {
    const uint2* source = reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(a.data) + row * 256) + gl;
    uint2 raw[8];  // all loads are on their way before one is widened
#pragma unroll
    for (int q = 0; q < 8; ++q) raw[q] = live ? __ldg(source + 8 * q) : make_uint2(0u, 0u);
    if (a.kind == kBF16) {
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        Eight<kBF16>::pair(raw[q].x, x[4 * q], x[4 * q + 1]), Eight<kBF16>::pair(raw[q].y, x[4 * q + 2], x[4 * q + 3]);
      }
    } else {
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        Eight<kF16>::pair(raw[q].x, x[4 * q], x[4 * q + 1]), Eight<kF16>::pair(raw[q].y, x[4 * q + 2], x[4 * q + 3]);
      }
    }
  }
}

// Packed keys of the logits, for the experts that the aux loss counts. All are finite.
template <bool WIDE>
__device__ __forceinline__ void pack_quads(const float (&x)[32], int gl, uint32_t (&v)[32]) {
  constexpr uint32_t kFlipped = 0x7fffffffu & ~((1u << Quads::kIdBits) - 1);
  const uint32_t base = 4 * gl;
  if constexpr (WIDE) {
#pragma unroll
    for (int i = 0; i < 32; ++i) v[i] = inverted(x[i]);
    const uint32_t best = row_min<8>(min_of<32>(v));
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      v[i] = (__viaddmin_u32(v[i], 0u - best, Packed<8, 4>::kFar) << Quads::kIdBits) | base | (32 * (i / 4) + i % 4);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const uint32_t bits = __float_as_uint(x[i] + 0.0f), sign = static_cast<int32_t>(bits) >> 31;
      v[i] = (bits ^ (~sign & kFlipped)) | base | (32 * (i / 4) + i % 4);
    }
  }
}

__device__ __forceinline__ void merge_best_two(float& high, float& low, float other_high, float other_low) {
  low = fmaxf(fminf(high, other_high), fmaxf(low, other_low));
  high = fmaxf(high, other_high);
}

// Lane `gl` of the row gets the sum of the one or two best keys of group gl. The lanes halve the groups they are still in charge of,
// so that 14 shuffles do what 48 would if every lane learnt every sum.
__device__ __forceinline__ float group_sum_of_lane(const float (&key)[32], int group_count, int gl) {
  float high[8], low[8];
#pragma unroll
  for (int q = 0; q < 8; ++q) {
    const float a = key[4 * q], b = key[4 * q + 1], c = key[4 * q + 2], d = key[4 * q + 3];
    high[q] = fmaxf(a, b), low[q] = fminf(a, b);
    merge_best_two(high[q], low[q], fmaxf(c, d), fminf(c, d));
  }
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (gl & half) != 0;
#pragma unroll
    for (int q = 0; q < half; ++q) {
      const float sent_high = upper ? high[q] : high[q + half], sent_low = upper ? low[q] : low[q + half];
      high[q] = upper ? high[q + half] : high[q], low[q] = upper ? low[q + half] : low[q];
      const float other_high = __shfl_xor_sync(kFull, sent_high, half),
                  other_low = __shfl_xor_sync(kFull, sent_low, half);
      merge_best_two(high[q], low[q], other_high, other_low);
    }
  }
  return group_count == 1 ? high[0] : high[0] + low[0];
}

// Bit g: group g stays. Ties go to the lower group. `kept` in shared memory is for rows that are selected again.
__device__ __forceinline__ uint32_t kept_groups(float total, int group_topk, int gl, int* kept) {
  const uint32_t mine = ordered(total);
  int rank = 0;
#pragma unroll
  for (int o = 1; o < 8; ++o) {
    const int top = o >= 4 ? 4 : o >= 2 ? 2 : 1;  // the other lane, gl ^ o, is the lower one if gl has this bit
    rank += __shfl_xor_sync(kFull, mine, o) >= mine + ((gl & top) != 0 ? 0u : 1u);
  }
  kept[gl] = rank < group_topk;
  return __ballot_sync(kFull, rank < group_topk) >> (threadIdx.x % kWarp & ~7) & 0xffu;
}

// Packed keys of the experts of the groups that stay, at most 16 a lane. All keys are finite. `memory`: kWords of the warp.
__device__ __forceinline__ void pack_kept_quads(
    const float (&key)[32], uint32_t groups, int gl, float* memory, uint32_t (&v)[16]) {
  float4* mine = reinterpret_cast<float4*>(memory) + threadIdx.x % kWarp;  // nobody else's: no barrier
#pragma unroll
  for (int q = 0; q < 8; ++q) {
    mine[kWarp * q] = make_float4(key[4 * q], key[4 * q + 1], key[4 * q + 2], key[4 * q + 3]);
  }
  uint32_t base[4], best = ~0u;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const int quad = groups != 0 ? __ffs(groups) - 1 : 0;
    base[s] = groups != 0 ? Quads::first(quad, gl) : ~0u;
    groups &= groups - 1;
    const float4 k = mine[kWarp * quad];
    v[4 * s] = inverted(k.x), v[4 * s + 1] = inverted(k.y), v[4 * s + 2] = inverted(k.z), v[4 * s + 3] = inverted(k.w);
    const uint32_t least = min(__vimin3_u32(v[4 * s], v[4 * s + 1], v[4 * s + 2]), v[4 * s + 3]);
    best = min(best, base[s] == ~0u ? ~0u : least);
  }
  best = row_min<8>(best);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    v[i] = (__viaddmin_u32(v[i], 0u - best, Packed<8, 4>::kFar) << Quads::kIdBits) | base[i / 4] | (i % 4);
  }
}

}  // namespace moe_layer::router
