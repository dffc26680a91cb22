// The lean forward kernel: what a training step asks for, and nothing else, in little code.
//
// router_fwd_body.cuh serves every option, in 120 to 220 KiB of instructions, and waits for them: on an H200 it issued in 31% of
// the cycles. This kernel takes aligned rows of at most 512 experts, softmax or sigmoid, K <= 16, one sequence, live or replayed
// ids, no dense outputs. A warp selects for 32/L rows at a time into shared memory; then one lane a (row, slot) weighs them.
//
// Every block writes its own counts, sums and events with plain stores; router_finish.cu, launched beside this kernel, adds them
// up. So nothing has to be zeroed before, and no block waits for another one.
#pragma once

#include "router_lean_weigh.cuh"

namespace moe_layer::router {

// What a kernel is asked for: anything; no forced ids and all rows valid; forced ids, all rows valid and no recorded weights.
enum Task : int { kAnyTask, kLiveTask, kReplayTask };

// Whether a lane gives so many of a row's best experts that a K above 8 needs long lists.
template <int L, int C, int MODE>
constexpr bool kLongLists = L == 8 && C == 4 && MODE != kSigmoidQuads;

// Shared memory of a warp beside its buffers, in words.
template <int L, int C, int MODE>
constexpr int kOwnWords = MODE == kSigmoidQuads    ? Quads::kWords
                          : kLongLists<L, C, MODE> ? LongList::kWords
                                                   : 0;

// What a block of THREADS threads does with the rows of its tiles, up to its row of p.part. `memory` has been cleared.
template <int L, int C, int MODE, class Rows, int THREADS, int TASK = kAnyTask>
__device__ __forceinline__ void lean_block(
    const Forward& p, const LeanShape& shape, const Rows& rows, const LeanMemory<THREADS>& memory, Tiles of_block) {
  using Lay = Layout<L, C>;
  constexpr int kWarps = THREADS / kWarp;
  constexpr bool kQuads = MODE == kSigmoidQuads, kKeyed = MODE == kSigmoidKeyed || kQuads,
                 kSoft = MODE == kSoftmaxPlain;
  constexpr bool WIDE = Rows::kWide, kRanks = L == 1 && WIDE && !kKeyed;
  // The forced experts with the best ones; not where many rows' best fp32 keys are too far apart for that.
  constexpr bool kCompares = TASK == kReplayTask && kSoft && L > 1 && !(WIDE && L == 16);
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
  uint32_t* worst = reinterpret_cast<uint32_t*>(stats + shape.rows * 2);  // find_worst
  uint32_t* seen = worst + shape.rows;                                    // fill_forced
  uint32_t* lists =  // in front of the histograms, of quads and selection
      reinterpret_cast<uint32_t*>(memory.buffers + p.block_words - (kWarps - warp) * kOwnWords<L, C, MODE>);
  float* quads = reinterpret_cast<float*>(lists);

  const bool replays = TASK == kReplayTask || (TASK == kAnyTask && p.replay.data != nullptr);
  const int row_bytes = p.experts * (WIDE ? 4 : 2), id_shift = p.replay.kind > 0 ? p.replay.kind - 1 : 0;
  // A tile's rows are asked for while the warp works on the tile before: 4 KiB of logits, a line a lane, and the forced ids.
  auto prefetch = [&](int64_t row, int count) {
    if constexpr (Rows::kGlobal) {
      if (128 * lane < count * row_bytes)
        prefetch_line(static_cast<const char*>(p.logits.data) + row * row_bytes + 128 * lane);
    }
    if (replays && 128 * lane < count * p.top_k << id_shift)  // bytes: 1 of kU8 and kI8, then doubled
      prefetch_line(static_cast<const char*>(p.replay.data) + (row * p.top_k << id_shift) + 128 * lane);
  };
  auto rows_from = [&](int64_t row) {
    return p.tokens - row < shape.rows ? static_cast<int>(p.tokens - row) : shape.rows;
  };
  int64_t first_row = (of_block.begin + warp) * shape.rows;
  int tiles = static_cast<int>(of_block.end - of_block.begin - warp + kWarps - 1) / kWarps;  // a warp without a tile: 0
  if (tiles > 0) prefetch(first_row, rows_from(first_row));
  if (replays) {
    for (int* at = reinterpret_cast<int*>(seen) + lane; at < memory.buffers + (warp + 1) * p.warp_words; at += kWarp) {
      *at = 0;
    }
    __syncwarp();
  }
  const bool broken_bias = kQuads && has_broken(bias, lane);

  float sums[C * 8];
#pragma unroll
  for (int i = 0; i < C * 8; ++i) sums[i] = 0.0f;
  double z = 0.0;
  // Of replayed rows and slots, kReplayTask counts the ones that were not, which are few.
  if (TASK == kReplayTask && threadIdx.x == 0 && of_block.begin < of_block.end) {
    const int64_t end = of_block.end * shape.rows < p.tokens ? of_block.end * shape.rows : p.tokens;
    const int rows_of_block = static_cast<int>(end - of_block.begin * shape.rows);
    atomicAdd(&events[0], rows_of_block), atomicAdd(&events[1], rows_of_block * p.top_k);
  }
  int2 forced_ids = {-1, -1};  // of the next tile's first passes
  if (TASK == kReplayTask && tiles > 0) forced_ids = first_forced(p, shape, first_row, rows_from(first_row));
  bool compares = kCompares && p.live_apart;  // until the forced experts of a tile are quite other ones than its best
  for (; tiles > 0; --tiles) {
    // Kept in registers: the compiler worked it out again from the block's index for every row, in forty instructions.
    asm volatile("" : "+l"(first_row));
    const int count = rows_from(first_row);
    const int64_t next_row = first_row + kWarps * shape.rows;
    if (tiles > 1) prefetch(next_row, rows_from(next_row));
    const auto logits = rows.from(first_row);
    // With forced ids the selection serves the slots that are missing, and without bias and groups the aux loss.
    bool fill = true, wanted = true;
    bool packed = !WIDE && !kKeyed && !replays;  // the experts' logits can be read from their packed keys
    uint32_t selected = 0, counted = 0;  // kCompares: a bit a step that was selected, a bit a row of compare_rows()
    float2 forced_logits = {0.0f, 0.0f};
    bool odd = false;  // of quads: a key of the tile is not finite, so its rows are selected again
    for (int step = 0; step < shape.rows; step += Lay::kRows) {
      const int at = step + group;
      const bool live = at < count && (TASK != kAnyTask || p.valid == nullptr || p.valid[first_row + at]);
      float x[C * 8];
      auto load = [&] {
        if constexpr (kQuads) {
          load_quads<WIDE>({logits.data, logits.kind}, at, live, gl, x);
        } else {
          logits.template load<L, C>(at, live, gl, x);
        }
      };
      load();
      if (replays && step == 0) {
        const Found wrong =
            TASK == kReplayTask ? copy_forced(p, shape, first_row, count, forced_ids, forced) : kDuplicatesFound;
        fill = false;
        if (wrong != kAllFound) {
          fill = check_forced(&p, shape, first_row, TASK == kReplayTask, wrong == kDuplicatesFound, forced, events);
          load();  // again: held through the call they would cost registers everywhere
        }
        if (compares && !fill) forced_logits = first_logits(shape, logits, forced_ids);
        if (TASK == kReplayTask && tiles > 1) forced_ids = first_forced(p, shape, next_row, rows_from(next_row));
        wanted = fill || (!kKeyed && p.live_apart);
      }
      const uint32_t bad = bad_bits(x);
      const unsigned bad_lanes = __ballot_sync(kFull, bad != 0);
      bool row_nan = false;
      if (bad_lanes != 0) {
        packed = false;
        const bool row_bad = (bad_lanes >> (group * L) & (L == 32 ? kFull : (1u << L) - 1u)) != 0;
        count_event(events, 5, row_bad && gl == 0);
        bool nan = false;
#pragma unroll
        for (int i = 0; i < C * 8; ++i) {
          nan |= x[i] != x[i];
          if (!kQuads && row_bad && Lay::expert(i, gl) >= p.experts) x[i] = -INFINITY;
        }
        row_nan = row_or<L>(nan ? 1u : 0u) != 0;
      }
#pragma unroll
      for (int i = 0; i < C * 8; ++i)
        asm("" : "+f"(x[i]));  // one register a logit from here on: ptxas kept two copies of each

      uint32_t v[C * 8], best = 0;
      RowStats s;
      const bool known = !kRanks && !kKeyed && wanted && bad_lanes == 0;  // the best packed key holds the row's maximum
      if (!kKeyed && wanted) {
        if constexpr (kRanks) {
          rank_rows(x, bad, p.top_k, chosen + at * p.top_k);
        } else {
          s.max = pack_logits_lean<L, C, WIDE>(p, x, bad, gl, v);
          best = row_min<L>(min_of<C * 8>(v));
          if (!WIDE) s.max = narrow_key<L, C>(best);
        }
      }
      if constexpr (kQuads) {
        odd |= bad_lanes != 0 || broken_bias;
        if (p.live_apart) {
          pack_quads<WIDE>(x, gl, v);
          select_rows<L, C, kLongLists<L, C, MODE>>(
              v, row_min<L>(min_of<C * 8>(v)), p.top_k, gl, unbiased + at * p.top_k, lists);
        }
      }
      bool scored = false;
      if (!kSoft && p.need_scores && p.want_z && bad_lanes == 0) {
        scored = sigmoid_and_z<L, C>(live, x, s);
        if (!scored) load();
      }
      if (!scored) scores_in_place_lean<L, C, kSoft>(p, known, x, s);
      if (p.aux != kNoAux && live) {
#pragma unroll
        for (int i = 0; i < C * 8; ++i) sums[i] = fmaf(x[i], s.inverse, sums[i]);
      }
      if (row_nan) s.lse = NAN;
      if (p.want_z && live && gl == 0) z += static_cast<double>(s.lse * s.lse);
      if (kSoft && p.weight_rule == kPreSoftmax && gl == 0) stats[2 * at] = s.max, stats[2 * at + 1] = s.inverse;
      // After the scores: their registers are free now.
      if (!kKeyed && !kRanks && wanted) {
        bool selects = true;
        if (compares && !fill) {
          if (step == 0) {
            find_worst<L, C, WIDE>(p, shape, logits, count, forced_logits, forced, worst);
            packed = !WIDE && bad_lanes == 0;
          }
          if (bad_lanes == 0) {
            selects = compare_rows<L, C, WIDE>(v, p.top_k, live, gl, at, worst[at], s.max, hist_aux, counted) ==
                      kOtherExperts;
            compares = !selects;
          }
        }
        if (selects) {
          select_rows<L, C, kLongLists<L, C, MODE>>(v, best, p.top_k, gl, chosen + at * p.top_k, lists);
          selected |= 1u << step / Lay::kRows;
        }
      }
      if (kKeyed && wanted) {
        const float4* bias4 = reinterpret_cast<const float4*>(bias);
#pragma unroll
        for (int q = 0; q < C * 2; ++q) {
          const float4 b = bias4[(kQuads ? Quads::first(q, gl) : Lay::first(q / 2, gl)) / 4 + (kQuads ? 0 : q % 2)];
          x[4 * q] += b.x, x[4 * q + 1] += b.y, x[4 * q + 2] += b.z, x[4 * q + 3] += b.w;
        }
      }
      if constexpr (kQuads) {
        if (wanted) {
          if (bad_lanes != 0 || broken_bias) {
            const uint32_t broken = bad | bad_bits(x);
#pragma unroll
            for (int i = 0; i < C * 8; ++i) x[i] = (broken >> i) & 1u ? kBrokenKey : x[i];
          }
          const float sum = group_sum_of_lane(x, p.group_count, gl);
          uint32_t few[16];
          pack_kept_quads(x, kept_groups(sum, p.group_topk, gl, kept + at * p.groups), gl, quads, few);
          select_rows<8, 2, false>(few, row_min<8>(min_of<16>(few)), p.top_k, gl, chosen + at * p.top_k, lists);
        }
      } else if (kKeyed && wanted) {
        const GroupMemory memory = {total + at * p.groups, kept + at * p.groups, nullptr};
        pack_keys_lean<L, C>(p, x, bad, gl, memory, v);
      }

      // Under bias or groups: once for the ids, and once more for the experts that the aux loss counts. A loop, because twice the
      // code is twice the instructions to fetch.
      if constexpr (kKeyed && !kQuads) {
        bool first = wanted, second = p.live_apart;
#pragma unroll 1
        while (first || second) {
          uint32_t* list_of_row = (first ? chosen : unbiased) + at * p.top_k;
          if (!first) {  // loaded again, from L1: 16 registers held through the selection above would cost warps
            second = false;
            load();
            pack_logits_lean<L, C, WIDE>(p, x, bad, gl, v);
          }
          first = false;
          select_rows<L, C, kLongLists<L, C, MODE>>(v, row_min<L>(min_of<C * 8>(v)), p.top_k, gl, list_of_row, lists);
        }
      }
    }
    __syncwarp();
    if (kQuads && odd) {
      for (int i = lane; i < list; i += kWarp) {
        chosen[i] = ~0u;
        if (p.live_apart) unbiased[i] = ~0u;
      }
      __syncwarp();
    }
    if ((kKeyed || (WIDE && !kRanks)) && wanted) {
      const bool here = !kCompares || (selected >> lane / Lay::kRows & 1u) != 0;
      settle_rows<L, C, kKeyed>(p, rows, first_row, shape.rows, here, bias, kept, chosen);
    }
    if (kKeyed && (WIDE || odd) && p.live_apart) {
      settle_rows<L, C, false>(p, rows, first_row, shape.rows, true, nullptr, nullptr, unbiased);
    }

    // ---- weights: one lane a (row, slot)
    if (TASK == kReplayTask && fill) fill_forced(&p, shape, first_row, Lay::kIdMask, chosen, forced, seen);
    if (TASK != kAnyTask || (p.valid == nullptr && p.recorded.data == nullptr && !(replays && fill))) {
      const uint32_t* experts = replays ? reinterpret_cast<uint32_t*>(forced) : chosen;
      weigh_tile<L, C, MODE, kCompares>(
          p, shape, logits, first_row, count, experts, packed, unbiased, selected, counted, stats, hist, hist_aux);
      __syncwarp();  // the ids have been read before the next tile writes its own
      first_row = next_row;
      continue;
    }
    if constexpr (TASK == kAnyTask) {
      weigh_rows<MODE>(
          &p, shape, rows, first_row, wanted, fill, Lay::kIdMask, chosen, forced, unbiased, stats, hist, hist_aux);
    }
    __syncwarp();  // the ids have been read before the next tile writes its own
    first_row = next_row;
  }

  // ---- the block's sums, in its own row of p.part
  for (int o = kWarp / 2; p.want_z && o > 0; o >>= 1) z += __shfl_xor_sync(kFull, z, o);
  if (lane == 0) memory.scratch.z[warp] = z;
  float* terms = reinterpret_cast<float*>(
      memory.buffers + p.block_words - kWarps * (kOwnWords<L, C, MODE> + Lay::kBucket));  // in front of `lists`
  if (p.aux != kNoAux) keep_score_sums<L, C, kQuads>(sums, terms + warp * Lay::kBucket);
  __syncthreads();  // counts are complete
  const PartRow part = part_row(p, blockIdx.x);
#pragma unroll 1
  for (int e = threadIdx.x; e < p.experts; e += THREADS) {
    part.counts[e] = hist[e];
    if (p.live_apart) part.aux_counts[e] = hist_aux[e] + (kCompares ? hist[e] : 0);  // weigh_tile
  }
  if (threadIdx.x < 6) part.events[threadIdx.x] = events[threadIdx.x];
  if (threadIdx.x == THREADS - 1) {
    double sum[2] = {0.0, 0.0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum[w % 2] += memory.scratch.z[w];
    *part.z = sum[0] + sum[1];
  }
  if (p.aux != kNoAux) add_score_sums<Lay::kBucket, THREADS>(p, terms, part.score_sum);
}

template <int L, int C, int MODE, bool WIDE, int TASK, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) lean_kernel(const __grid_constant__ Forward p, const LeanShape shape) {
  extern __shared__ __align__(16) int32_t shared[];
  __shared__ typename LeanMemory<THREADS>::Scratch scratch;
  const LeanMemory<THREADS> memory(p, shared, scratch);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // router_finish.cu may get ready
#endif
  const Tiles tiles = tiles_of_block(p);
  memory.clear(p);
  if (MODE < kSigmoidKeyed) __syncthreads();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();  // this kernel was launched beside the one before it in the stream
#endif
  if (MODE >= kSigmoidKeyed) {
    memory.load_bias(p, Layout<L, C>::kBucket);
    __syncthreads();
  }
  lean_block<L, C, MODE, GlobalRows<WIDE>, THREADS, TASK>(p, shape, GlobalRows<WIDE>{p}, memory, tiles);
}

// Sizes of a block's shared memory, to args; in bytes, the result.
template <int L, int C, int MODE, int THREADS>
int64_t lean_bytes(Forward& args, const LeanShape& shape) {
  constexpr int kWarps = THREADS / kWarp, kBucket = Layout<L, C>::kBucket;
  args.warp_words = lean_words(args, shape, MODE >= kSigmoidKeyed);
  args.block_words = round_up(args.warp_words * kWarps, 4) + kWarps * (kBucket + kOwnWords<L, C, MODE>);
  return 4ll * (args.block_words + (args.live_apart ? 2 : 1) * args.experts + (MODE >= kSigmoidKeyed ? kBucket : 0));
}

template <int L, int C, int MODE, bool WIDE, int TASK, int THREADS>
void launch_lean_as(Forward args, int sms, cudaStream_t stream) {
  const LeanShape shape = lean_shape(args, sms);
  const int64_t bytes = lean_bytes<L, C, MODE, THREADS>(args, shape);
  auto kernel = lean_kernel<L, C, MODE, WIDE, TASK, THREADS>;
  allow_shared_memory(kernel, bytes);
  const int64_t tiles = ceil_div<int64_t>(args.tokens, shape.rows);
  const int blocks = lean_blocks(args, sms);
  cut_tiles(args, tiles, blocks);
  launch_beside(kernel, blocks, THREADS, bytes, stream, args, shape);
}

// The plain softmax and DeepSeek-V3's groups have kernels of their own for live steps and for replayed ones: less code, fewer registers.
template <int L, int C, int MODE, bool WIDE, int THREADS>
void launch_lean(const Forward& args, int sms, cudaStream_t stream) {
  if constexpr (MODE == kSoftmaxPlain || MODE == kSigmoidQuads) {
    if (args.valid == nullptr && args.replay.data == nullptr)
      return launch_lean_as<L, C, MODE, WIDE, kLiveTask, THREADS>(args, sms, stream);
    if (args.valid == nullptr && args.recorded.data == nullptr)
      return launch_lean_as<L, C, MODE, WIDE, kReplayTask, THREADS>(args, sms, stream);
  }
  launch_lean_as<L, C, MODE, WIDE, kAnyTask, THREADS>(args, sms, stream);
}

// Lanes as lean_lanes() says; chunks of a lane by size.
template <int MODE, bool WIDE>
void launch_lean_mode(const Forward& args, int sms, cudaStream_t stream) {
  constexpr int kThreads = kLeanThreads;
  const int experts = args.experts;
  switch (lean_lanes(args, sms)) {
    case 1: return launch_lean<1, 1, MODE, WIDE, kThreads>(args, sms, stream);
    case 4: return launch_lean<4, 2, MODE, WIDE, kThreads>(args, sms, stream);
    case 8:
      if (experts <= 128) return launch_lean<8, 2, MODE, WIDE, kThreads>(args, sms, stream);
      if constexpr (MODE == kSigmoidKeyed) {
        if (quads_fit(args)) return launch_lean<8, 4, kSigmoidQuads, WIDE, kThreads>(args, sms, stream);
      }
      return launch_lean<8, 4, MODE, WIDE, kThreads>(args, sms, stream);
    default:
      if (experts <= 256) return launch_lean<16, 2, MODE, WIDE, kThreads>(args, sms, stream);
      if (experts <= 384) return launch_lean<16, 3, MODE, WIDE, kThreads>(args, sms, stream);
      return launch_lean<16, 4, MODE, WIDE, kThreads>(args, sms, stream);
  }
}

}  // namespace moe_layer::router
