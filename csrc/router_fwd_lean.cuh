// The lean forward kernel: what a training step asks for, and nothing else, in little code.
//
// router_fwd_body.cuh serves every option, in 120 to 220 KiB of instructions, and waits for them: on an H200 it issued in 31% of
// the cycles. This kernel takes aligned rows of at most 512 experts, softmax or sigmoid, K <= 16, one sequence, live or replayed
// ids, no dense outputs. A warp selects for 32/L rows at a time into shared memory; then one lane a (row, slot) weighs them.
//
// Every block writes its own counts, sums and events with plain stores; router_finish.cu, launched beside this kernel, adds them
// up. So nothing has to be zeroed before, and no block waits for another one.
#pragma once

#include "router_lean_parts.cuh"

namespace moe_layer::router {

// The warps' sums of scores, added over the block's rows in a fixed order, to part[E] in global memory.
template <int L, int C, int THREADS>
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
      const int at = Layout<L, C>::first(c, lane) / 4;
      mine[at] = make_float4(all[8 * c], all[8 * c + 1], all[8 * c + 2], all[8 * c + 3]);
      mine[at + 1] = make_float4(all[8 * c + 4], all[8 * c + 5], all[8 * c + 6], all[8 * c + 7]);
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

// Weights of a tile's experts and what is written with them, one lane a (row, slot), where all rows are valid and all ids are chosen, or
// all are forced. The general case is in the kernel, in more instructions.
template <int L, int C, int MODE, class Rows>
__device__ __forceinline__ void weigh_tile(
    const Forward& p, const LeanShape& shape, const Rows& all_rows, int64_t first_row, const uint32_t* chosen,
    const int* forced, const uint32_t* unbiased, const float* stats, int32_t* hist, int32_t* hist_aux) {
  constexpr uint32_t kIdMask = Layout<L, C>::kIdMask;
  const int lane = threadIdx.x % kWarp, slot = lane & (shape.slot_lanes - 1);
  const int64_t left = p.tokens - first_row, out = first_row * p.top_k;
  const int rows = left < shape.rows ? static_cast<int>(left) : shape.rows;
  const auto logits = all_rows.from(first_row);
#pragma unroll 1
  for (int first = 0; first < rows; first += kWarp >> shape.slot_shift) {
    const int at = first + (lane >> shape.slot_shift), index = at * p.top_k + slot;
    const bool inside = at < rows && slot < p.top_k;
    const int id = !inside ? 0 : forced != nullptr ? forced[index] : static_cast<int>(chosen[index] & kIdMask);
    const float x = inside ? logits.at(at, id) : kPad;
    float y;
    if (MODE == kSoftmaxPlain && p.weight_rule == kOverChosen) {
      float top = x;
      for (int o = shape.slot_lanes / 2; o > 0; o >>= 1) top = fmaxf(top, __shfl_xor_sync(kFull, top, o));
      y = expf(x - top);
    } else if (MODE == kSoftmaxPlain) {
      y = inside ? expf(x - stats[2 * at]) * stats[2 * at + 1] : 0.0f;
    } else {
      y = sigmoid(x);
    }
    y = inside ? y : 0.0f;
    if (p.weight_rule == kOverChosen || p.weight_rule == kScoreNormalised) {
      float sum = y;
      for (int o = shape.slot_lanes / 2; o > 0; o >>= 1) sum += __shfl_xor_sync(kFull, sum, o);
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

// What a block of THREADS threads does with the rows of its tiles, up to its row of p.part. `memory` has been cleared.
template <int L, int C, int MODE, class Rows, int THREADS>
__device__ __forceinline__ void lean_block(
    const Forward& p, const LeanShape& shape, const Rows& rows, const LeanMemory<THREADS>& memory, Tiles tiles) {
  using Lay = Layout<L, C>;
  constexpr int kWarps = THREADS / kWarp;
  constexpr bool kKeyed = MODE == kSigmoidKeyed, kSoft = MODE == kSoftmaxPlain, WIDE = Rows::kWide;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, gl = lane % L, group = lane / L;
  int32_t *hist = memory.hist, *hist_aux = memory.hist_aux;
  float* bias = memory.bias;
  int* events = memory.scratch.events;
  const int list = shape.rows * p.top_k;
  uint32_t* chosen = reinterpret_cast<uint32_t*>(memory.buffers + warp * p.warp_words);
  uint32_t* unbiased = kKeyed && p.live_apart ? chosen + list : chosen;
  int* forced = reinterpret_cast<int*>(unbiased + list);
  float* total = reinterpret_cast<float*>(forced + (p.replay.data != nullptr ? list : 0));
  int* kept = reinterpret_cast<int*>(total + shape.rows * p.groups);
  float* stats = reinterpret_cast<float*>(kept + shape.rows * p.groups);  // [rows, 2] softmax of "pre" weights

  float sums[C * 8];
#pragma unroll
  for (int i = 0; i < C * 8; ++i) sums[i] = 0.0f;
  double z = 0.0;
  Replayed replayed;
  const auto [begin, end] = tiles;
  // A tile's rows are asked for while the warp works on the tile before: 4 KiB of logits, a line a lane, and the forced ids.
  auto prefetch = [&](int64_t tile) {
    const int row_bytes = p.experts * (WIDE ? 4 : 2), id_shift = p.replay.kind > 0 ? p.replay.kind - 1 : 0;
    const int64_t first_row = tile * shape.rows, at = first_row * row_bytes + 128 * lane;
    if (tile >= end || 128 * lane >= shape.rows * row_bytes || at >= p.tokens * row_bytes) return;
    if (Rows::kGlobal) prefetch_line(static_cast<const char*>(p.logits.data) + at);
    if (p.replay.data == nullptr) return;
    const int64_t id_at = (first_row * p.top_k << id_shift) + 128 * lane;  // bytes: 1 of kU8 and kI8, then doubled
    if (128 * lane < shape.rows * p.top_k << id_shift && id_at < p.tokens * p.top_k << id_shift)
      prefetch_line(static_cast<const char*>(p.replay.data) + id_at);
  };
  prefetch(begin + warp);
  for (int64_t tile = begin + warp; tile < end; tile += kWarps) {
    const int64_t first_row = tile * shape.rows;
    prefetch(tile + kWarps);
    // With forced ids the selection serves the slots that are missing, and without bias and groups the aux loss.
    bool fill = true, wanted = true;
    if (p.replay.data != nullptr) {
      fill = read_forced(p, shape, first_row, forced, replayed, events);
      wanted = fill || (!kKeyed && p.live_apart);
    }
    for (int step = 0; step < shape.rows; step += Lay::kRows) {
      const int at = step + group;
      const int64_t row = first_row + at;
      const bool live = row < p.tokens && (p.valid == nullptr || p.valid[row]);
      float x[C * 8];
      rows.template load<L, C>(row, live, gl, x);
      const uint32_t bad = bad_bits(x);
      const unsigned bad_lanes = __ballot_sync(kFull, bad != 0);
      bool row_nan = false;
      if (bad_lanes != 0) {
        const bool row_bad = (bad_lanes >> (group * L) & (L == 32 ? kFull : (1u << L) - 1u)) != 0;
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
      RowStats s;
      const bool known = !kKeyed && wanted && bad_lanes == 0;  // the best packed key holds the row's maximum
      if (!kKeyed && wanted) {
        s.max = pack_logits_lean<L, C, WIDE>(p, x, bad, gl, v);
        const uint32_t best = row_min<L>(min_of<C * 8>(v));
        // A key of 16 bits: zeros below it, which an inverted key of a positive number has as ones.
        if (!WIDE) s.max = uninverted(static_cast<int32_t>(best) < 0 ? best & ~Lay::kIdMask : best | Lay::kIdMask);
        select_rows<L, C>(v, best, p.top_k, gl, chosen + at * p.top_k);
      }
      bool scored = false;
      if (!kSoft && p.need_scores && p.want_z && bad_lanes == 0) {
        scored = sigmoid_and_z<L, C>(live, x, s);
        if (!scored) rows.template load<L, C>(row, live, gl, x);
      }
      if (!scored) scores_in_place_lean<L, C, kSoft>(p, known, x, s);
      if (p.aux != kNoAux && live) {
#pragma unroll
        for (int i = 0; i < C * 8; ++i) sums[i] = fmaf(x[i], s.inverse, sums[i]);
      }
      if (row_nan) s.lse = NAN;
      if (p.want_z && live && gl == 0) z += static_cast<double>(s.lse * s.lse);
      if (kSoft && p.weight_rule == kPreSoftmax && gl == 0) stats[2 * at] = s.max, stats[2 * at + 1] = s.inverse;
      if (kKeyed && wanted) {
        const float4* bias4 = reinterpret_cast<const float4*>(bias);
#pragma unroll
        for (int q = 0; q < C * 2; ++q) {
          const float4 b = bias4[Lay::first(q / 2, gl) / 4 + q % 2];
          x[4 * q] += b.x, x[4 * q + 1] += b.y, x[4 * q + 2] += b.z, x[4 * q + 3] += b.w;
        }
        const GroupMemory memory = {total + at * p.groups, kept + at * p.groups, nullptr};
        pack_keys_lean<L, C>(p, x, bad, gl, memory, v);
      }

      // Under bias or groups: once for the ids, and once more for the experts that the aux loss counts. A loop, because twice the
      // code is twice the instructions to fetch.
      bool first = kKeyed && wanted, second = kKeyed && p.live_apart;
#pragma unroll 1
      while (first || second) {
        uint32_t* list_of_row = (first ? chosen : unbiased) + at * p.top_k;
        if (!first) {  // loaded again, from L1: 16 registers held through the selection above would cost warps
          second = false;
          rows.template load<L, C>(row, live, gl, x);
          pack_logits_lean<L, C, WIDE>(p, x, bad, gl, v);
        }
        first = false;
        select_rows<L, C>(v, row_min<L>(min_of<C * 8>(v)), p.top_k, gl, list_of_row);
      }
    }
    __syncwarp();
    if ((kKeyed || WIDE) && wanted) settle_rows<L, C, kKeyed>(p, rows, first_row, shape.rows, bias, kept, chosen);
    if (kKeyed && WIDE && p.live_apart) {
      settle_rows<L, C, false>(p, rows, first_row, shape.rows, nullptr, nullptr, unbiased);
    }

    // ---- weights: one lane a (row, slot)
    const bool replays = p.replay.data != nullptr;
    if (p.valid == nullptr && p.recorded.data == nullptr && !(replays && fill)) {
      weigh_tile<L, C, MODE>(
          p, shape, rows, first_row, chosen, replays ? forced : nullptr, unbiased, stats, hist, hist_aux);
      __syncwarp();  // the ids have been read before the next tile writes its own
      continue;
    }
    for (int first = 0; first < shape.rows; first += kWarp >> shape.slot_shift) {
      const Slot at = slot_of_lane(p, shape, first_row, first);
      const int index = at.at * p.top_k + at.slot;
      int id = at.live && wanted ? static_cast<int>(chosen[index] & Lay::kIdMask) : -1;
      if (at.live && p.live_apart) atomicAdd(&hist_aux[unbiased[index] & Lay::kIdMask], 1);
      const int held = at.live && p.replay.data != nullptr ? forced[index] : -1;
      if (p.replay.data != nullptr) id = fill ? fill_slot(p, shape, at, held, id) : held;
      const float x = at.live ? rows.at(at.row, id) : kPad;
      float y;
      if (kSoft && p.weight_rule == kOverChosen) {
        float top = x;
        for (int o = shape.slot_lanes / 2; o > 0; o >>= 1) top = fmaxf(top, __shfl_xor_sync(kFull, top, o));
        y = expf(x - top);
      } else if (kSoft) {
        y = at.live ? expf(x - stats[2 * at.at]) * stats[2 * at.at + 1] : 0.0f;
      } else {
        y = sigmoid(x);
      }
      y = at.live ? y : 0.0f;
      if (p.weight_rule == kOverChosen || p.weight_rule == kScoreNormalised) {
        float sum = y;
        for (int o = shape.slot_lanes / 2; o > 0; o >>= 1) sum += __shfl_xor_sync(kFull, sum, o);
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
    __syncwarp();  // the ids have been read before the next tile writes its own
  }

  // ---- the block's sums, in its own row of p.part
  for (int o = kWarp / 2; p.want_z && o > 0; o >>= 1) z += __shfl_xor_sync(kFull, z, o);
  if (lane == 0) {
    memory.scratch.z[warp] = z;
    if (replayed.slots != 0) atomicAdd(&events[0], replayed.rows), atomicAdd(&events[1], replayed.slots);
  }
  __syncthreads();  // counts are complete, the warps' buffers are free
  const PartRow part = part_row(p, blockIdx.x);
#pragma unroll 1
  for (int e = threadIdx.x; e < p.experts; e += THREADS) {
    part.counts[e] = hist[e];
    if (p.live_apart) part.aux_counts[e] = hist_aux[e];
  }
  if (threadIdx.x < 6) part.events[threadIdx.x] = events[threadIdx.x];
  if (threadIdx.x == THREADS - 1) {
    double sum[2] = {0.0, 0.0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum[w % 2] += memory.scratch.z[w];
    *part.z = sum[0] + sum[1];
  }
  if (p.aux != kNoAux) {
    store_score_sums<L, C, THREADS>(p, sums, reinterpret_cast<float*>(memory.buffers), part.score_sum);
  }
}

template <int L, int C, int MODE, bool WIDE, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) lean_kernel(const __grid_constant__ Forward p, const LeanShape shape) {
  extern __shared__ __align__(16) int32_t shared[];
  __shared__ typename LeanMemory<THREADS>::Scratch scratch;
  const LeanMemory<THREADS> memory(p, shared, scratch);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // router_finish.cu may get ready
#endif
  memory.clear(p);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();  // this kernel was launched beside the one before it in the stream
#endif
  if (MODE == kSigmoidKeyed) memory.load_bias(p, Layout<L, C>::kBucket);
  __syncthreads();
  lean_block<L, C, MODE, GlobalRows<WIDE>, THREADS>(p, shape, GlobalRows<WIDE>{p}, memory, tiles_of_block(p));
}

// Sizes of a block's shared memory, to args; in bytes, the result.
template <int L, int C, int MODE, int THREADS>
int64_t lean_bytes(Forward& args, const LeanShape& shape) {
  constexpr int kWarps = THREADS / kWarp, kBucket = Layout<L, C>::kBucket;
  args.warp_words = lean_words(args, shape, MODE == kSigmoidKeyed);
  const int terms = kWarps * kBucket;  // store_score_sums
  args.block_words = round_up(args.warp_words * kWarps > terms ? args.warp_words * kWarps : terms, 4);
  return 4ll * (args.block_words + (args.live_apart ? 2 : 1) * args.experts + (MODE == kSigmoidKeyed ? kBucket : 0));
}

template <int L, int C, int MODE, bool WIDE, int THREADS>
void launch_lean(Forward args, int sms, cudaStream_t stream) {
  using Lay = Layout<L, C>;
  constexpr int kWarps = THREADS / kWarp;
  LeanShape shape = {Lay::kRows, 1, 0};
  while (shape.slot_lanes < args.top_k) shape.slot_lanes *= 2, ++shape.slot_shift;
  // Rows enough to keep the lanes of the weights busy, unless warps would stay without rows.
  const int together = kWarp / shape.slot_lanes < 8 ? kWarp / shape.slot_lanes : 8;
  if (together > shape.rows && args.tokens >= static_cast<int64_t>(together) * kWarps * sms / 2) shape.rows = together;
  const int64_t bytes = lean_bytes<L, C, MODE, THREADS>(args, shape);
  auto kernel = lean_kernel<L, C, MODE, WIDE, THREADS>;
  allow_shared_memory(kernel, bytes);
  const int64_t tiles = ceil_div<int64_t>(args.tokens, shape.rows);
  const int blocks = lean_blocks(args, sms);
  cut_tiles(args, tiles, blocks);
  launch_beside(kernel, blocks, THREADS, bytes, stream, args, shape);
}

// Lanes of a row and chunks of a lane by size: the fewer lanes share a row, the fewer steps a selection takes, and more than 32 values
// a lane do not fit the registers. 16 warps: 24 or 32 of them, or rows over more lanes, took as much time at 128 experts and up to 40%
// more elsewhere (H200).
template <int MODE, bool WIDE>
void launch_lean_mode(const Forward& args, int sms, cudaStream_t stream) {
  constexpr int kThreads = 512;
  const int experts = args.experts;
  if (experts == 8) return launch_lean<1, 1, MODE, WIDE, kThreads>(args, sms, stream);
  if (experts <= 64) return launch_lean<4, 2, MODE, WIDE, kThreads>(args, sms, stream);
  if (experts <= 128) return launch_lean<8, 2, MODE, WIDE, kThreads>(args, sms, stream);
  // With fewer than 64 rows an SM, 4 rows a warp would leave warps idle.
  if (experts <= 256 && args.tokens < 64ll * sms) return launch_lean<16, 2, MODE, WIDE, kThreads>(args, sms, stream);
  if (experts <= 256) return launch_lean<8, 4, MODE, WIDE, kThreads>(args, sms, stream);
  if (experts <= 384) return launch_lean<16, 3, MODE, WIDE, kThreads>(args, sms, stream);
  return launch_lean<16, 4, MODE, WIDE, kThreads>(args, sms, stream);
}

}  // namespace moe_layer::router
