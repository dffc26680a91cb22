// What the lean forward kernel does with a tile's chosen experts: weights, ids and counts; and with a block's sums of scores.
#pragma once

#include "router_lean_groups.cuh"
#include "router_lean_replay.cuh"

namespace moe_layer::router {

// The warps' sums of scores, added over the block's rows in a fixed order, to part[E] in global memory.
template <int L, int C, bool QUADS, int THREADS>
__device__ __forceinline__ void store_score_sums(
    const Forward& p, const float (&sums)[C * 8], float* terms, float* target) {
  constexpr int kBucket = Layout<L, C>::kBucket, kWarps = THREADS / kWarp;
  const int lane = threadIdx.x % kWarp;
  float all[C * 8];
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    all[i] = sums[i];
#pragma unroll
    for (int o = L; o < kWarp; o <<= 1) all[i] += __shfl_xor_sync(kFull, all[i], o);
  }
  if (lane < L) {
    float4* mine = reinterpret_cast<float4*>(terms + threadIdx.x / kWarp * kBucket);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int at = QUADS ? Quads::first(2 * c, lane) / 4 : Layout<L, C>::first(c, lane) / 4;
      mine[at] = make_float4(all[8 * c], all[8 * c + 1], all[8 * c + 2], all[8 * c + 3]);
      mine[at + (QUADS ? 8 : 1)] = make_float4(all[8 * c + 4], all[8 * c + 5], all[8 * c + 6], all[8 * c + 7]);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < p.experts; e += THREADS) {
    float total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total[w % 2] += terms[w * kBucket + e];
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

// Weights of a tile's experts and what is written with them, one lane a (row, slot), where all rows are valid and all ids are chosen, or
// all are forced. `logits` are those of the tile.
template <int L, int C, int MODE, class Near>
__device__ __forceinline__ void weigh_tile(
    const Forward& p, const LeanShape& shape, const Near& logits, int64_t first_row, int rows, const uint32_t* chosen,
    const int* forced, const uint32_t* unbiased, const float* stats, int32_t* hist, int32_t* hist_aux) {
  constexpr uint32_t kIdMask = Layout<L, C>::kIdMask;
  const int lane = threadIdx.x % kWarp, slot = lane & (shape.slot_lanes - 1);
  const int64_t out = first_row * p.top_k;
#pragma unroll 1
  for (int first = 0; first < rows; first += kWarp >> shape.slot_shift) {
    const int at = first + (lane >> shape.slot_shift), index = at * p.top_k + slot;
    const bool inside = at < rows && slot < p.top_k;
    const int id = !inside ? 0 : forced != nullptr ? forced[index] : static_cast<int>(chosen[index] & kIdMask);
    const float x = inside ? logits.at(at, id) : kPad;
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
    if (p.live_apart) atomicAdd(&hist_aux[unbiased[index] & kIdMask], 1);
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
    if (replays) id = fill ? fill_slot(p, shape, at, held, id) : held;
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
