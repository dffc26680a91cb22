// The body of the forward kernel and its launch: see router_fwd_kernel.cuh for the parts.
#pragma once

#include "router_fwd_outputs.cuh"

namespace moe_layer::router {

// Live selection of this lane's row into m.live (and the live unbiased ids into the aux histogram, if they are another set).
template <int L, int C, bool KEYED>
__device__ __forceinline__ void select_live(
    const Forward& p, const Place& at, uint32_t (&v)[C * 8], const RowStats& s, const float* bias,
    const WarpMemory& m) {
  int* live = m.live + at.group * p.top_k;
  const bool check = KEYED || !p.exact_keys;
  const bool near = select_packed<L, C>(v, p.top_k, p.experts, check, true, at.gl, live);
  __syncwarp();
  if (check) repair<L>(p, near && at.live, KEYED, at, s, bias, m.kept, m.live);
}

// The set that the aux loss counts when bias, groups or replay make it another one than the ids returned.
template <int L, int C>
__device__ __forceinline__ void select_unbiased(
    const Forward& p, const Place& at, const RowStats& s, const WarpMemory& m, int* ids) {
  float x[C * 8];
  load_row<L, C>(p.logits, p.vector, at.row, at.live, p.experts, at.gl, kPad, x);
  uint32_t v[C * 8];
  pack_logits<L, C>(p, x, bad_bits(x), at, v);
  const bool near = select_packed<L, C>(v, p.top_k, p.experts, !p.exact_keys, false, at.gl, ids + at.group * p.top_k);
  __syncwarp();
  if (!p.exact_keys) repair<L>(p, near && at.live, false, at, s, nullptr, nullptr, ids);
}

template <int L, int C, bool KEYED, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) forward_kernel(const __grid_constant__ Forward p) {
  using Lay = Layout<L, C>;
  constexpr int kWarps = THREADS / kWarp;
  extern __shared__ __align__(16) int32_t shared[];
  __shared__ double z_warp[kWarps];
  __shared__ int events[6];
  int32_t* hist = shared;
  int32_t* hist_aux = p.live_apart ? hist + p.experts : hist;
  float* bias = reinterpret_cast<float*>(hist + (p.live_apart ? 2 : 1) * p.experts);
  int32_t* buffer = reinterpret_cast<int32_t*>(bias + (KEYED ? Lay::kBucket : 0));
  const int warp = threadIdx.x / kWarp;
  const WarpMemory m = carve(p, buffer + warp * p.warp_words, Lay::kRows, Lay::kBucket);

  for (int e = threadIdx.x; e < p.experts; e += THREADS) hist[e] = 0, hist_aux[e] = 0;
  if (threadIdx.x < 6) events[threadIdx.x] = 0;
  if constexpr (KEYED) {
    for (int e = threadIdx.x; e < Lay::kBucket; e += THREADS) {
      bias[e] = p.bias.data != nullptr && e < p.experts ? load_float(p.bias, e) : 0.0f;
    }
  }
  Place at;
  at.lane = threadIdx.x % kWarp, at.gl = at.lane % L, at.group = at.lane / L;
  at.row_lanes = (L == 32 ? kFull : (1u << L) - 1u) << (at.group * L);
  const auto [begin, end] = tiles_of_block(p);
  int block_sequence = 0;
  if (p.aux != kNoAux && p.cu_seqlens.data != nullptr) {
    const int64_t last_row = end * Lay::kRows < p.tokens ? end * Lay::kRows : p.tokens;
    block_sequence = sequence_of(p.cu_seqlens, p.sequences, begin * Lay::kRows);
    // -1 at both ends may have whole sequences in between
    if (block_sequence < 0 || sequence_of(p.cu_seqlens, p.sequences, last_row - 1) != block_sequence)
      block_sequence = kMixed;
    if (block_sequence == kMixed) wait_for_zeros();
  }
  __syncthreads();

  float sums[C * 8];
#pragma unroll
  for (int i = 0; i < C * 8; ++i) sums[i] = 0.0f;
  double z = 0.0;
  float* staging = m.keys + at.group * (Lay::kBucket + Lay::kBucket / 32);
  int sequence = block_sequence == kMixed ? -1 : block_sequence;

  for (int64_t tile = begin + warp; tile < end; tile += kWarps) {
    at.row = tile * Lay::kRows + at.group;
    at.inside = at.row < p.tokens;
    at.live = at.inside && (p.valid == nullptr || p.valid[at.row]);
    float x[C * 8];
    load_row<L, C>(p.logits, p.vector, at.row, at.live, p.experts, at.gl, kPad, x);
    if (block_sequence == kMixed) {
      const int next = at.inside ? sequence_of(p.cu_seqlens, p.sequences, at.row) : -1;
      if (next != sequence) flush_sums<L, C>(p, sums, sequence, at.gl, staging);
      sequence = next;
    }
    __syncwarp();  // the previous tile's shared memory has been read by every lane

    const uint32_t bad = bad_bits(x);
    const unsigned bad_lanes = __ballot_sync(kFull, bad != 0);
    const bool any_bad = bad_lanes != 0, row_bad = (bad_lanes & at.row_lanes) != 0;
    bool row_nan = false;
    if (any_bad) {
      count_event(events, 5, row_bad && at.gl == 0);
      bool nan = false;
#pragma unroll
      for (int i = 0; i < C * 8; ++i) {
        nan |= x[i] != x[i];
        if (row_bad && Lay::expert(i, at.gl) >= p.experts)
          x[i] = -INFINITY;  // or a row of -inf would have a finite maximum
      }
      row_nan = row_or<L>(nan ? 1u : 0u) != 0;
    }

    uint32_t missing = 0;
    bool need_live = true;
    int* ids = m.ids + at.group * p.top_k;
    if (p.replay.data != nullptr) {
      missing = read_replay<L>(p, at, ids, events);
      need_live = __any_sync(kFull, missing != 0) || (!KEYED && p.live_apart);
    }

    uint32_t v[C * 8];
    RowStats s;
    const bool pre_key = KEYED && p.score == kSoftmax && !p.key_is_logit;
    if constexpr (!KEYED) pack_logits<L, C>(p, x, bad, at, v);
    const GroupMemory groups = {m.total + at.group * p.groups, m.kept + at.group * p.groups, staging};
    if (KEYED && p.key_is_logit) {
      float key[C * 8];
#pragma unroll
      for (int i = 0; i < C * 8; ++i) key[i] = x[i] + bias[Lay::expert(i, at.gl)];
      pack_keys<L, C>(p, key, bad, at, groups, v);
    }
    if (pre_key && any_bad) finite_softmax<L, C>(x, bad, s);
    scores_in_place<L, C, KEYED>(p, x, s);
    if (row_nan) s.lse = NAN;
    if (p.scores != nullptr) write_scores<L, C>(p, at, x, s.inverse);
    if (p.aux != kNoAux && at.live) {
#pragma unroll
      for (int i = 0; i < C * 8; ++i) sums[i] = fmaf(x[i], s.inverse, sums[i]);
    }
    if (p.want_z && at.live && at.gl == 0) z += static_cast<double>(s.lse * s.lse);
    if (KEYED && !p.key_is_logit) {
      if (pre_key && any_bad) {
        load_row<L, C>(p.logits, p.vector, at.row, at.live, p.experts, at.gl, kPad, x);
#pragma unroll
        for (int i = 0; i < C * 8; ++i) x[i] = expf(x[i] - s.key_max) * s.key_inverse;
      } else {
        s.key_max = s.max, s.key_inverse = s.inverse;
        const float factor = pre_key ? s.inverse : 1.0f;
#pragma unroll
        for (int i = 0; i < C * 8; ++i) x[i] = x[i] * factor;
      }
#pragma unroll
      for (int i = 0; i < C * 8; ++i) x[i] = x[i] + bias[Lay::expert(i, at.gl)];
      pack_keys<L, C>(p, x, bad, at, groups, v);
    }

    if (need_live) select_live<L, C, KEYED>(p, at, v, s, bias, m);
    if (p.live_apart) {
      int* counted = m.live;
      if constexpr (KEYED) {
        counted = reinterpret_cast<int*>(m.values);
        select_unbiased<L, C>(p, at, s, m, counted);
      }
      for (int slot = at.gl; at.live && slot < p.top_k; slot += L) {
        const int id = counted[at.group * p.top_k + slot];
        if (block_sequence != kMixed) {
          atomicAdd(&hist_aux[id], 1);
        } else if (sequence >= 0) {
          atomicAdd(&p.aux_counts[static_cast<int64_t>(sequence) * p.experts + id], 1);
        }
      }
      __syncwarp();
    }
    if (p.replay.data == nullptr) {
      ids = m.live + at.group * p.top_k;
    } else if (__any_sync(kFull, missing != 0)) {
      int* filled = reinterpret_cast<int*>(m.values) + at.group * p.top_k;
      fill_slots<L>(ids, m.live + at.group * p.top_k, missing, p.top_k, at.gl, filled);
      __syncwarp();
      for (int slot = at.gl; slot < p.top_k; slot += L) ids[slot] = filled[slot];
      __syncwarp();
    }

    for (int slot = at.gl; at.live && slot < p.top_k; slot += L) {
      const int id = ids[slot];
      atomicAdd(&hist[id], 1);
      if (p.aux != kNoAux && !p.live_apart && block_sequence == kMixed && sequence >= 0) {
        atomicAdd(&p.aux_counts[static_cast<int64_t>(sequence) * p.experts + id], 1);
      }
    }
    float* values = m.values + at.group * p.top_k;
    write_weights<L>(p, at, s, ids, values);
    if (p.probs != nullptr || p.map_format != kNoMap) {
      __syncwarp();
      write_dense<L, C>(p, at, ids, values, m.bits + at.group * ((Lay::kBucket + 31) / 32));
    }
  }

  // ---- the block's sums
  wait_for_zeros();
  if (p.want_z) {
    for (int o = kWarp / 2; o > 0; o >>= 1) z += __shfl_xor_sync(kFull, z, o);
    if (at.lane == 0) z_warp[warp] = z;
  }
  if (p.aux != kNoAux && block_sequence == kMixed) flush_sums<L, C>(p, sums, sequence, at.gl, staging);
  __syncthreads();  // counts are complete, the warps' buffers are free
  if (threadIdx.x < 6 && events[threadIdx.x] != 0) atomicAdd(&p.events[threadIdx.x], events[threadIdx.x]);
  flush_counts(p, hist, hist_aux, block_sequence);
  if (p.aux != kNoAux && block_sequence >= 0) {
    float* part = reinterpret_cast<float*>(buffer);  // [warps, bucket]
#pragma unroll
    for (int i = 0; i < C * 8; ++i) {
      for (int o = L; o < kWarp; o <<= 1) sums[i] += __shfl_xor_sync(kFull, sums[i], o);
      if (at.lane < L) part[warp * Lay::kBucket + Lay::expert(i, at.gl)] = sums[i];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < p.experts; e += THREADS) {
      float total = 0.0f;
      for (int w = 0; w < kWarps; ++w) total += part[w * Lay::kBucket + e];
      add_fixed(p.sums + static_cast<int64_t>(block_sequence) * p.experts + e, total, p.sum_scale);
    }
  }
  if (p.want_z && threadIdx.x == 0) {
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += z_warp[w];
    p.z_parts[blockIdx.x] = total;
  }
  if (p.aux == kNoAux && !p.want_z) return;
  if (arrive_last(p.ticket)) finish_sums(p);
}

template <int L, int C, bool KEYED, int THREADS>
void launch(Forward args, int blocks, cudaStream_t stream) {
  using Lay = Layout<L, C>;
  constexpr int kWarps = THREADS / kWarp;
  args.warp_words = warp_words(args, Lay::kRows, Lay::kBucket, KEYED);
  cut_tiles(args, ceil_div<int64_t>(args.tokens, Lay::kRows), blocks);
  const int parts = args.aux == kNoAux ? 0 : kWarps * Lay::kBucket;
  const int buffer = args.warp_words * kWarps > parts ? args.warp_words * kWarps : parts;
  const int64_t bytes = 4ll * ((args.live_apart ? 2 : 1) * args.experts + (KEYED ? Lay::kBucket : 0) + buffer);
  auto kernel = forward_kernel<L, C, KEYED, THREADS>;
  allow_shared_memory(kernel, bytes);
  launch_beside(kernel, blocks, THREADS, bytes, stream, args);
}

template <bool KEYED>
void launch_forward(const Forward& args, int blocks, cudaStream_t stream) {
  switch (bucket_for(args.experts)) {
    case 64:  // no kernel of its own: what is common at 64 experts runs in the lean kernels
    case 128: return launch<8, 2, KEYED, kForwardThreads>(args, blocks, stream);
    case 256: return launch<16, 2, KEYED, kForwardThreads>(args, blocks, stream);
    case 512: return launch<32, 2, KEYED, kForwardThreads>(args, blocks, stream);
    default: return launch<32, 4, KEYED, 384>(args, blocks, stream);
  }
}

}  // namespace moe_layer::router
