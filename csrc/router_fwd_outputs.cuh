// What the forward kernel writes: weights, dense outputs, counts, and the loss sums once the last block has arrived.
#pragma once

#include "router_fwd_kernel.cuh"

namespace moe_layer::router {

// --------------------------------------------------------------------------------------------------------------- outputs

// Weights of the row's K ids, written with the ids; `values` keeps them for the dense output.
template <int L>
__device__ __forceinline__ void write_weights(
    const Forward& p, const Place& at, const RowStats& s, const int* ids, float* values) {
  float top = -INFINITY, sum = 0.0f;
  for (int slot = at.gl; slot < p.top_k; slot += L) {
    const float x = at.live ? load_float(p.logits, at.row * p.experts + ids[slot]) : 0.0f;
    values[slot] = x;
    top = fmaxf(top, x);
  }
  if (p.weight_rule == kOverChosen) top = row_max<L>(top);
  for (int slot = at.gl; slot < p.top_k; slot += L) {
    const float x = values[slot];
    float y;
    if (p.weight_rule == kOverChosen) {
      y = expf(x - top);
    } else if (p.weight_rule == kPreSoftmax) {
      y = expf(x - s.max) * s.inverse;
    } else {
      y = score_of(x, p.score);
    }
    values[slot] = y;
    sum += y;
  }
  float divisor = 1.0f;
  if (p.weight_rule == kOverChosen || p.weight_rule == kScoreNormalised) {
    sum = row_sum<L>(sum);
    divisor = p.weight_rule == kOverChosen ? sum : sum + kEps;
  }
  if (!at.inside) return;
  for (int slot = at.gl; slot < p.top_k; slot += L) {
    const int64_t out = at.row * p.top_k + slot;
    const int id = ids[slot];
    // Divided as in the lean kernel: a replayed row has the very weights of the live row.
    float w = __fdividef(values[slot], divisor) * p.scale;
    if (p.recorded.data != nullptr && at.live && load_id(p.replay, out, p.experts) == id)
      w = load_float(p.recorded, out);
    w = at.live ? w : 0.0f;
    values[slot] = w;
    static_cast<float*>(p.weights)[out] = w;
    p.ids[out] = at.live ? id : -1;
  }
}

// Zeros for one row of `experts` elements, 8 bytes at a time where rows are multiples of 8 bytes.
template <int L>
__device__ __forceinline__ void zero_row(void* data, int64_t start, int experts, int element, int gl) {
  char* row = static_cast<char*>(data) + start * element;
  const int bytes = experts * element;
  if (bytes % 8 == 0) {
    for (int b = 8 * gl; b < bytes; b += 8 * L) *reinterpret_cast<uint2*>(row + b) = make_uint2(0u, 0u);
  } else {
    for (int b = gl; b < bytes; b += L) row[b] = 0;
  }
}

// Dense outputs of the row: zeros first, then its K entries; __syncwarp orders the two among the lanes that share the row.
template <int L, int C>
__device__ __forceinline__ void write_dense(
    const Forward& p, Place at, const int* ids, const float* values, uint32_t* bits) {
  using Lay = Layout<L, C>;
  const int64_t start = at.row * p.experts;
  if (p.map_format == kBitmap) {
    for (int word = at.gl; word < (Lay::kBucket + 31) / 32; word += L) bits[word] = 0;
  }
  if (at.inside && p.probs != nullptr) zero_row<L>(p.probs, start, p.experts, p.logits.kind == kF32 ? 4 : 2, at.gl);
  if (at.inside && p.map_format == kBytemap) zero_row<L>(p.map, start, p.experts, 1, at.gl);
  __syncwarp();
  if (at.live) {
    for (int slot = at.gl; slot < p.top_k; slot += L) {
      const int id = ids[slot];
      if (p.probs != nullptr) store_float(p.probs, p.logits.kind, start + id, values[slot]);
      if (p.map_format == kBytemap) p.map[start + id] = 1;
      if (p.map_format == kBitmap) atomicOr(&bits[id / 32], 1u << (id % 32));
    }
  }
  __syncwarp();
  if (p.map_format != kBitmap || !at.inside) return;
  const int width = (p.experts + 7) / 8;
  for (int byte = at.gl; byte < width; byte += L)
    p.map[at.row * width + byte] = bits[byte / 4] >> (8 * (byte % 4)) & 0xffu;
}

template <int L, int C>
__device__ __forceinline__ void write_scores(
    const Forward& p, const Place& at, const float (&x)[C * 8], float inverse) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int first = Layout<L, C>::first(c, at.gl);
    float out[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = at.live ? x[8 * c + j] * inverse : 0.0f;
    if (!at.inside || first >= p.experts) continue;
    if (p.vector) {
      store8(p.scores, kF32, at.row * p.experts + first, out);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (first + j < p.experts) static_cast<float*>(p.scores)[at.row * p.experts + first + j] = out[j];
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------- end of the block

// Histograms and sums of the block to global memory; the last block finishes the floats.
__device__ __forceinline__ void flush_counts(
    const Forward& p, const int32_t* hist, const int32_t* hist_aux, int sequence) {
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    if (hist[e] != 0) atomicAdd(&p.counts[e], hist[e]);
    if (p.aux != kNoAux && sequence >= 0 && hist_aux[e] != 0) {
      atomicAdd(&p.aux_counts[static_cast<int64_t>(sequence) * p.experts + e], hist_aux[e]);
    }
  }
}

__device__ __forceinline__ void finish_sums(const Forward& p) {
  const int64_t sums = p.aux == kNoAux ? 0 : static_cast<int64_t>(p.sequences) * p.experts;
  for (int64_t i = threadIdx.x; i < sums; i += blockDim.x) {
    const unsigned long long fixed = __ldcg(p.sums + i);
    const float value = static_cast<float>(static_cast<double>(static_cast<long long>(fixed)) * p.sum_unscale);
    static_cast<float*>(p.score_sum)[i] = fixed & kPoison ? NAN : value;
  }
  if (p.want_z && threadIdx.x < kWarp) {
    double z = 0.0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += kWarp) z += __ldcg(p.z_parts + b);
    for (int o = kWarp / 2; o > 0; o >>= 1) z += __shfl_xor_sync(kFull, z, o);
    if (threadIdx.x == 0) static_cast<float*>(p.z_sum)[0] = static_cast<float>(z);
  }
}

// Every thread calls it after its last write to global memory. True in the block that arrives last, which sees all the writes.
__device__ __forceinline__ bool arrive_last(unsigned* ticket) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace moe_layer::router
