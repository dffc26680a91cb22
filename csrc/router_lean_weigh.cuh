// What the lean forward kernel does with a tile's chosen experts: weights, ids and counts; and with a block's sums of scores.
#pragma once

#include "router_lean_groups.cuh"
#include "router_lean_replay.cuh"

namespace moe_layer::router {

// Lanes O, O / 2 .. L apart hold sums of the same experts. They swap halves of them and add, HALF of them first, until each is left with
// other ones, from value `first` on: 24 shuffles do what 64 would if every lane learnt every sum.
template <int L, int O, int HALF, int N>
__device__ __forceinline__ void share_sums(float (&all)[N], int& first) {
  if constexpr (HALF == 0) {
    all[0] += __shfl_xor_sync(kFull, all[0], O);
  } else {
    const bool upper = (threadIdx.x & O) != 0;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      const float low = all[i], high = all[i + HALF];
      all[i] = (upper ? high : low) + __shfl_xor_sync(kFull, upper ? low : high, O);
    }
    first += upper ? HALF : 0;
  }
  if constexpr (O > L) share_sums<L, O / 2, HALF / 2>(all, first);
}

// A warp's sums of scores to its terms[bucket] in shared memory.
template <int L, int C, bool QUADS>
__device__ __forceinline__ void keep_score_sums(const float (&sums)[C * 8], float* terms) {
  constexpr int kValues = C * 8, kShared = kWarp / L;
  constexpr int kEach = kShared < kValues ? kValues / kShared : 1, kWide = kEach % 4 == 0 ? 4 : kEach;
  const int gl = threadIdx.x % L;
  float all[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) all[i] = sums[i];
  int first = 0;
  share_sums<L, kWarp / 2, kValues / 2>(all, first);
#pragma unroll
  for (int i = 0; i < kEach; i += kWide) {
    const int value = first + i;
    float* to = terms + (QUADS ? Quads::first(value / 4, gl) + value % 4 : Layout<L, C>::expert(value, gl));
    if constexpr (kWide == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(all[i], all[i + 1], all[i + 2], all[i + 3]);
    } else {
#pragma unroll
      for (int k = 0; k < kWide; ++k) to[k] = all[i + k];
    }
  }
}

// The block's sums, its warps' terms[warps, bucket] added in a fixed order, to target[E] in global memory.
template <int BUCKET, int THREADS>
__device__ __forceinline__ void add_score_sums(const Forward& p, const float* terms, float* target) {
#pragma unroll 1
  for (int e = threadIdx.x; e < p.experts; e += THREADS) {
    float total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < THREADS / kWarp; ++w) total[w % 2] += terms[w * BUCKET + e];
    target[e] = total[0] + total[1];
  }
}

// Largest value and sum over the lanes of a row's slots, at most 16. Straight code: a loop takes seven instructions a step, not two.
__device__ __forceinline__ float slots_max(const LeanShape& shape, float v) {
  switch (shape.slot_shift) {
    case 4: v = fmaxf(v, __shfl_xor_sync(kFull, v, 8)); [[fallthrough]];
    case 3: v = fmaxf(v, __shfl_xor_sync(kFull, v, 4)); [[fallthrough]];
    case 2: v = fmaxf(v, __shfl_xor_sync(kFull, v, 2)); [[fallthrough]];
    case 1: v = fmaxf(v, __shfl_xor_sync(kFull, v, 1)); [[fallthrough]];
    default: return v;
  }
}

__device__ __forceinline__ float slots_sum(const LeanShape& shape, float v) {
  switch (shape.slot_shift) {
    case 4: v += __shfl_xor_sync(kFull, v, 8); [[fallthrough]];
    case 3: v += __shfl_xor_sync(kFull, v, 4); [[fallthrough]];
    case 2: v += __shfl_xor_sync(kFull, v, 2); [[fallthrough]];
    case 1: v += __shfl_xor_sync(kFull, v, 1); [[fallthrough]];
    default: return v;
  }
}

// Weights of a tile's experts and what is written with them, one lane a (row, slot), where all rows are valid. The experts are ids, with a
// packed key above them or not; `keyed` says that this is the logit's. `logits` are those of the tile. hist_aux counts `unbiased`; if COMPARES
// it counts what makes it differ from hist, which only rows of the steps in `selected` do, and the rows in `counted`, of which the better
// half has been counted.
template <int L, int C, int MODE, bool COMPARES, class Near>
__device__ __forceinline__ void weigh_tile(
    const Forward& p, const LeanShape& shape, const Near& logits, int64_t first_row, int rows, const uint32_t* experts,
    bool keyed, const uint32_t* unbiased, uint32_t selected, uint32_t counted, const float* stats, int32_t* hist,
    int32_t* hist_aux) {
  constexpr uint32_t kIdMask = Layout<L, C>::kIdMask;
  const int lane = threadIdx.x % kWarp, slot = lane & (shape.slot_lanes - 1);
  const int64_t out = first_row * p.top_k;
#pragma unroll 1
  for (int first = 0; first < rows; first += kWarp >> shape.slot_shift) {
    const int at = first + (lane >> shape.slot_shift), index = at * p.top_k + slot;
    const bool inside = at < rows && slot < p.top_k;
    const uint32_t expert = inside ? experts[index] : 0;
    const int id = static_cast<int>(expert & kIdMask);
    const float x = !inside ? kPad : keyed ? narrow_key<L, C>(expert) : logits.at(at, id);
    float y;
    if (MODE == kSoftmaxPlain && p.weight_rule == kOverChosen) {
      y = expf(x - slots_max(shape, x));
    } else if (MODE == kSoftmaxPlain) {
      y = inside ? expf(x - stats[2 * at]) * stats[2 * at + 1] : 0.0f;
    } else {
      y = sigmoid(x);
    }
    y = inside ? y : 0.0f;
    if (p.weight_rule == kOverChosen || p.weight_rule == kScoreNormalised) {
      const float sum = slots_sum(shape, y);
      y = __fdividef(y, p.weight_rule == kOverChosen ? sum : sum + kEps);
    }
    if (!inside) continue;
    static_cast<float*>(p.weights)[out + index] = y * p.scale;
    p.ids[out + index] = id;
    if (p.id_buffer != nullptr) store_int(p.id_buffer, p.id_buffer_kind, out + index, id);
    atomicAdd(&hist[id], 1);
    if (!p.live_apart) continue;
    const bool listed = !COMPARES || (selected >> at / Layout<L, C>::kRows & 1u) != 0;
    if (listed) atomicAdd(&hist_aux[unbiased[index] & kIdMask], 1);
    if (COMPARES && (listed || (counted >> at & 1u) != 0)) atomicAdd(&hist_aux[id], -1);
  }
}

// The same with missing slots, rows that are not valid or recorded weights. Apart, for its registers.
template <int MODE, class Rows>
__device__ __noinline__ void weigh_rows(
    const Forward* args, const LeanShape shape, const Rows rows, int64_t first_row, bool wanted, bool fill,
    uint32_t id_mask, const uint32_t* chosen, const int* forced, const uint32_t* unbiased, const float* stats,
    int32_t* hist, int32_t* hist_aux) {
  const Forward& p = *args;
  const bool replays = p.replay.data != nullptr;
  for (int first = 0; first < shape.rows; first += kWarp >> shape.slot_shift) {
    const Slot at = slot_of_lane(p, shape, first_row, first);
    const int index = at.at * p.top_k + at.slot;
    int id = at.live && wanted ? static_cast<int>(chosen[index] & id_mask) : -1;
    if (at.live && p.live_apart) atomicAdd(&hist_aux[unbiased[index] & id_mask], 1);
    const int held = at.live && replays ? forced[index] : -1;
    if (replays) id = fill ? fill_slot(shape, at, held, id, held_in_row(shape, held, id)) : held;
    const float x = at.live ? rows.at(at.row, id) : kPad;
    float y;
    if (MODE == kSoftmaxPlain && p.weight_rule == kOverChosen) {
      y = expf(x - slots_max(shape, x));
    } else if (MODE == kSoftmaxPlain) {
      y = at.live ? expf(x - stats[2 * at.at]) * stats[2 * at.at + 1] : 0.0f;
    } else {
      y = sigmoid(x);
    }
    y = at.live ? y : 0.0f;
    if (p.weight_rule == kOverChosen || p.weight_rule == kScoreNormalised) {
      const float sum = slots_sum(shape, y);
      y = __fdividef(y, p.weight_rule == kOverChosen ? sum : sum + kEps);
    }
    if (at.inside) {
      const int64_t out = at.row * p.top_k + at.slot;
      const bool recorded = held >= 0 && p.recorded.data != nullptr;
      static_cast<float*>(p.weights)[out] = recorded ? load_float(p.recorded, out) : at.live ? y * p.scale : 0.0f;
      p.ids[out] = at.live ? id : -1;
      if (p.id_buffer != nullptr) store_int(p.id_buffer, p.id_buffer_kind, out, at.live ? id : -1);
    }
    if (at.live) atomicAdd(&hist[id], 1);
  }
}

}  // namespace moe_layer::router
