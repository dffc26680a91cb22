// The lean forward kernel: what a training step asks for, and nothing else, in little code.
//
// router_fwd_body.cuh serves every option, in 120 to 220 KiB of instructions; on an H200 it issued in 31% of the cycles, with 16
// warps an SM. This kernel takes aligned rows of at most 512 experts, softmax or sigmoid, K <= 16, one sequence, no replay, no
// dense outputs, and leaves near ties to calls out of line: E 256 grouped 38 us instead of 88, E 512 31 instead of 52 (bf16).
// A warp selects for 32/L rows at a time into shared memory; then one lane a (row, slot) weighs them, 32/W rows at a time with
// W = the power of two that holds K, so that neither half wastes lanes on the other's shape.
#pragma once

#include "router_lean_parts.cuh"

namespace moe_layer::router {

template <int L, int C, int MODE>
__global__ void __launch_bounds__(kLeanThreads, 1)
    lean_kernel(const __grid_constant__ Forward p, const LeanShape shape) {
  using Lay = Layout<L, C>;
  constexpr int kWarps = kLeanThreads / kWarp;
  constexpr bool kKeyed = MODE == kSigmoidKeyed, kSoft = MODE == kSoftmaxPlain;
  extern __shared__ __align__(16) int32_t shared[];
  __shared__ double z_warp[kWarps];
  __shared__ int events[6];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, gl = lane % L, group = lane / L;
  int32_t* hist = shared;
  int32_t* hist_aux = p.live_apart ? hist + p.experts : hist;
  float* bias = reinterpret_cast<float*>(hist + (p.live_apart ? 2 : 1) * p.experts);
  int32_t* buffer = reinterpret_cast<int32_t*>(bias + (kKeyed ? Lay::kBucket : 0));
  int* ids = buffer + warp * lean_words(shape, p.groups, p.live_apart);
  int* scratch = ids + shape.rows * shape.stride;  // [rows, 2 * stride]
  int* unbiased = scratch + shape.rows * shape.stride * 2;
  float* total = reinterpret_cast<float*>(unbiased + (p.live_apart ? shape.rows * shape.stride : 0));
  int* kept = reinterpret_cast<int*>(total + shape.rows * p.groups);
  float* stats = reinterpret_cast<float*>(kept + shape.rows * (p.groups + 2));  // [rows, 2] softmax of "pre" weights
  int* counts =
      kept + shape.rows * p.groups;  // [2, rows] candidates of nearly tied rows: selection, unbiased selection

  for (int e = threadIdx.x; e < p.experts; e += kLeanThreads) hist[e] = 0, hist_aux[e] = 0;
  if (threadIdx.x < 6) events[threadIdx.x] = 0;
  if constexpr (kKeyed) {
    for (int e = threadIdx.x; e < Lay::kBucket; e += kLeanThreads) {
      bias[e] = p.bias.data != nullptr && e < p.experts ? load_float(p.bias, e) : 0.0f;
    }
  }
  __syncthreads();

  float sums[C * 8];
#pragma unroll
  for (int i = 0; i < C * 8; ++i) sums[i] = 0.0f;
  double z = 0.0;
  const bool pads = p.experts < Lay::kBucket;
  const auto [begin, end] = tiles_of_block(p);
  for (int64_t tile = begin + warp; tile < end; tile += kWarps) {
    const int64_t first_row = tile * shape.rows;
    bool near = false, near_unbiased = false;
    for (int step = 0; step < shape.rows; step += Lay::kRows) {
      const int at = step + group;
      const int64_t row = first_row + at;
      const bool live = row < p.tokens && (p.valid == nullptr || p.valid[row]);
      float x[C * 8];
      load_aligned<L, C>(p.logits, row, live, p.experts, gl, kPad, x);
      const uint32_t bad = bad_bits(x);
      const unsigned bad_lanes = __ballot_sync(kFull, bad != 0);
      bool row_nan = false, row_bad = false;
      if (bad_lanes != 0) {
        row_bad = (bad_lanes >> (group * L) & (L == 32 ? kFull : (1u << L) - 1u)) != 0;
        count_event(events, 5, row_bad && gl == 0);
        bool nan = false;
#pragma unroll
        for (int i = 0; i < C * 8; ++i) {
          nan |= x[i] != x[i];
          if (row_bad && Lay::expert(i, gl) >= p.experts) x[i] = -INFINITY;
        }
        row_nan = row_or<L>(nan ? 1u : 0u) != 0;
      }

      uint32_t v[C * 8];
      int* row_ids = ids + at * shape.stride;
      if constexpr (!kKeyed) pack_logits_lean<L, C>(p, x, bad, pads, gl, v);
      RowStats s;
      scores_in_place_lean<L, C, kSoft>(p, x, s);
      if (p.aux != kNoAux && live) {
#pragma unroll
        for (int i = 0; i < C * 8; ++i) sums[i] = fmaf(x[i], s.inverse, sums[i]);
      }
      if (row_nan) s.lse = NAN;
      if (p.want_z && live && gl == 0) z += static_cast<double>(s.lse * s.lse);
      if (kSoft && p.weight_rule == kPreSoftmax && gl == 0) {
        stats[2 * at] = s.max, stats[2 * at + 1] = s.inverse;
      }

      if constexpr (kKeyed) {
#pragma unroll
        for (int i = 0; i < C * 8; ++i) x[i] += bias[Lay::expert(i, gl)];
        const GroupMemory memory = {total + at * p.groups, kept + at * p.groups, nullptr};
        pack_keys_lean<L, C>(p, x, bad, gl, memory, v);
      }
      const int count = select_rows<L, C>(p, v, kKeyed || p.logits.kind == kF32, true, live, gl, row_ids);
      if (gl == 0) counts[at] = count;
      near |= count > 0;
      if (kKeyed && p.live_apart) {
        // Loaded again, from L1: 16 registers held through the selection above would cost warps.
        load_aligned<L, C>(p.logits, row, live, p.experts, gl, kPad, x);
        pack_logits_lean<L, C>(p, x, bad, pads, gl, v);
        int* row_unbiased = unbiased + at * shape.stride;
        const int count_unbiased = select_rows<L, C>(p, v, p.logits.kind == kF32, false, live, gl, row_unbiased);
        if (gl == 0) counts[shape.rows + at] = count_unbiased;
        near_unbiased |= count_unbiased > 0;
      }
    }
    __syncwarp();
    if (__any_sync(kFull, near)) refine_rows<L, kKeyed>(&p, first_row, shape.rows, bias, kept, counts, ids, scratch);
    if (kKeyed && __any_sync(kFull, near_unbiased)) {
      refine_rows<L, false>(&p, first_row, shape.rows, nullptr, nullptr, counts + shape.rows, unbiased, scratch);
    }

    // ---- weights: one lane a (row, slot)
    const int slot = lane % shape.slot_lanes, per_pass = kWarp / shape.slot_lanes;
    for (int first = 0; first < shape.rows; first += per_pass) {
      const int at = first + lane / shape.slot_lanes;
      const int64_t row = first_row + at;
      const bool inside = row < p.tokens && slot < p.top_k;
      const bool live = inside && (p.valid == nullptr || p.valid[row]);
      const int id = live ? ids[at * shape.stride + slot] : -1;
      const float x = live ? load_float(p.logits, row * p.experts + id) : kPad;
      float y;
      if (kSoft && p.weight_rule == kOverChosen) {
        float top = x;
        for (int o = shape.slot_lanes / 2; o > 0; o >>= 1) top = fmaxf(top, __shfl_xor_sync(kFull, top, o));
        y = expf(x - top);
      } else if (kSoft) {
        y = expf(x - stats[2 * at]) * stats[2 * at + 1];
      } else {
        y = sigmoid(x);
      }
      y = live ? y : 0.0f;
      if (p.weight_rule == kOverChosen || p.weight_rule == kScoreNormalised) {
        float sum = y;
        for (int o = shape.slot_lanes / 2; o > 0; o >>= 1) sum += __shfl_xor_sync(kFull, sum, o);
        y = __fdividef(y, p.weight_rule == kOverChosen ? sum : sum + kEps);
      }
      if (inside) {
        const int64_t out = row * p.top_k + slot;
        static_cast<float*>(p.weights)[out] = live ? y * p.scale : 0.0f;
        p.ids[out] = id;
      }
      if (live) {
        atomicAdd(&hist[id], 1);
        if (kKeyed && p.live_apart) atomicAdd(&hist_aux[unbiased[at * shape.stride + slot]], 1);
      }
    }
    __syncwarp();  // the ids have been read before the next tile writes its own
  }

  // ---- the block's sums
  wait_for_zeros();
  if (p.want_z) {
    for (int o = kWarp / 2; o > 0; o >>= 1) z += __shfl_xor_sync(kFull, z, o);
    if (lane == 0) z_warp[warp] = z;
  }
  __syncthreads();
  if (threadIdx.x < 6 && events[threadIdx.x] != 0) atomicAdd(&p.events[threadIdx.x], events[threadIdx.x]);
  flush_counts(p, hist, hist_aux, 0);
  if (p.aux != kNoAux) {
    float* part = reinterpret_cast<float*>(buffer);  // [warps, bucket]
#pragma unroll
    for (int i = 0; i < C * 8; ++i) {
      for (int o = L; o < kWarp; o <<= 1) sums[i] += __shfl_xor_sync(kFull, sums[i], o);
      if (lane < L) part[warp * Lay::kBucket + Lay::expert(i, gl)] = sums[i];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < p.experts; e += kLeanThreads) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += part[w * Lay::kBucket + e];
      add_fixed(p.sums + e, sum, p.sum_scale);
    }
  }
  if (p.want_z && threadIdx.x == 0) {
    double sum = 0.0;
    for (int w = 0; w < kWarps; ++w) sum += z_warp[w];
    p.z_parts[blockIdx.x] = sum;
  }
  if (p.aux == kNoAux && !p.want_z) return;
  if (arrive_last(p.ticket)) finish_sums(p);
}

inline bool lean_fits(const Forward& p, bool keyed) {
  const bool score = p.score == kSigmoid || (p.score == kSoftmax && !keyed);
  return p.vector && p.experts <= 512 && score && p.cu_seqlens.data == nullptr && p.replay.data == nullptr &&
         p.probs == nullptr && p.scores == nullptr && p.map_format == kNoMap && (p.groups == 0 || p.group_chunked);
}

template <int L, int MODE>
void launch_lean(Forward args, int sms, cudaStream_t stream, bool overlap) {
  using Lay = Layout<L, 2>;
  constexpr int kWarps = kLeanThreads / kWarp;
  LeanShape shape;
  shape.slot_lanes = 1;
  while (shape.slot_lanes < args.top_k) shape.slot_lanes *= 2;
  shape.rows = Lay::kRows > kWarp / shape.slot_lanes ? Lay::kRows : kWarp / shape.slot_lanes;
  if (shape.rows > 8 && shape.rows > Lay::kRows) shape.rows = Lay::kRows > 8 ? Lay::kRows : 8;
  if (kWarp / shape.slot_lanes > shape.rows) shape.slot_lanes = kWarp / shape.rows;
  shape.stride = args.top_k + kExtra;
  const int words = lean_words(shape, args.groups, args.live_apart) * kWarps, parts = kWarps * Lay::kBucket;
  const int64_t bytes = 4ll * ((args.live_apart ? 2 : 1) * args.experts + (MODE == kSigmoidKeyed ? Lay::kBucket : 0) +
                               (words > parts ? words : parts));
  auto kernel = lean_kernel<L, 2, MODE>;
  allow_shared_memory(kernel, bytes);
  const int64_t tiles = ceil_div<int64_t>(args.tokens, shape.rows);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  const int blocks = static_cast<int>(tiles < sms ? tiles : sms);
  cut_tiles(args, tiles, blocks);
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kLeanThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args, shape));
}

template <int MODE>
void launch_lean_mode(const Forward& args, int sms, cudaStream_t stream, bool overlap) {
  switch (lanes_for(args.experts)) {
    case 4: return launch_lean<4, MODE>(args, sms, stream, overlap);
    case 8: return launch_lean<8, MODE>(args, sms, stream, overlap);
    case 16: return launch_lean<16, MODE>(args, sms, stream, overlap);
    default: return launch_lean<32, MODE>(args, sms, stream, overlap);
  }
}

}  // namespace moe_layer::router
