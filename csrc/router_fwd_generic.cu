// The general forward kernel: fp64 logits, more than 1024 experts or K above 32. A block sorts a row in shared memory.
// Correct before fast; sums still go through fixed point, so they have the same bits in every run.

#include "router_generic.cuh"

namespace moe_layer::router {
namespace {

constexpr uint16_t kBlocked = 0x4000, kNone = 0x8000;  // classes behind experts without a finite key, whose key is 0

struct RowMemory {
  uint64_t* key;    // [n2] ordered keys; after the sort, first slot of every replayed expert
  uint16_t* order;  // [n2] ids, best first after the sort
  double* total;    // [G]
  uint8_t* kept;    // [G]
};

struct Softmax {
  double max = 0.0, sum = 1.0;
};

template <typename A>
__device__ Softmax softmax_of(const Forward& p, int64_t start, bool finite_only) {
  double top = -INFINITY, sum = 0.0;
  for (int e = threadIdx.x; e < p.experts; e += kGenericThreads) {
    const double x = load_as<A>(p.logits, start + e);
    if (!finite_only || is_finite(x)) top = fmax(top, x);
  }
  Softmax s;
  s.max = block_max(top);
  for (int e = threadIdx.x; e < p.experts; e += kGenericThreads) {
    const A x = load_as<A>(p.logits, start + e);
    if (!finite_only || is_finite(x)) sum += exp_as<A>(x - static_cast<A>(s.max));
  }
  s.sum = block_sum(sum);
  return s;
}

// Sums of the groups' best keys, and which groups stay. One warp a group; each pick is the best key after the last one.
__device__ void limit_groups(const Forward& p, const RowMemory& m) {
  const int lane = threadIdx.x % kWarp;
  for (int group = threadIdx.x / kWarp; group < p.groups; group += kGenericWarps) {
    double last = INFINITY, sum = 0.0;
    int last_id = -1;
    for (int pick = 0; pick < p.group_count; ++pick) {
      double best = -INFINITY;
      int best_id = INT_MAX;
      for (int e = group * p.group_size + lane; e < (group + 1) * p.group_size; e += kWarp) {
        const double k = m.key[e] == 0 ? static_cast<double>(kBrokenKey) : unordered(m.key[e]);
        if ((k < last || (k == last && e > last_id)) && k > best) best = k, best_id = e;
      }
      for (int o = kWarp / 2; o > 0; o >>= 1) {
        const double other = __shfl_xor_sync(kFull, best, o);
        const int other_id = __shfl_xor_sync(kFull, best_id, o);
        if (other > best || (other == best && other_id < best_id)) best = other, best_id = other_id;
      }
      // fp32 keys are summed in fp32: the reference breaks ties between groups on that sum
      sum = pick == 0 ? best : p.logits.kind == kF64 ? sum + best : static_cast<float>(sum) + static_cast<float>(best);
      last = best, last_id = best_id;
    }
    if (lane == 0) m.total[group] = sum;
  }
  __syncthreads();
  for (int group = threadIdx.x; group < p.groups; group += kGenericThreads) {
    int rank = 0;
    for (int other = 0; other < p.groups; ++other) {
      rank += m.total[other] > m.total[group] || (m.total[other] == m.total[group] && other < group);
    }
    m.kept[group] = rank < p.group_topk;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += kGenericThreads) {
    if (!m.kept[e / p.group_size]) m.key[e] = 0, m.order[e] = static_cast<uint16_t>(e) | kBlocked;
  }
  __syncthreads();
}

// Bitonic sort of (key descending, id ascending).
__device__ void sort_row(const RowMemory& m, int n2) {
  for (int size = 2; size <= n2; size <<= 1) {
    for (int stride = size / 2; stride > 0; stride >>= 1) {
      for (int t = threadIdx.x; t < n2 / 2; t += kGenericThreads) {
        const int i = 2 * t - (t & (stride - 1)), j = i + stride;
        const bool before = m.key[i] > m.key[j] || (m.key[i] == m.key[j] && m.order[i] < m.order[j]);
        if (before != ((i & size) == 0)) {
          const uint64_t key = m.key[i];
          const uint16_t id = m.order[i];
          m.key[i] = m.key[j], m.order[i] = m.order[j];
          m.key[j] = key, m.order[j] = id;
        }
      }
      __syncthreads();
    }
  }
}

// Fills m.order with the row's experts, best first. `keyed` false: by logit, without groups.
template <typename A>
__device__ void order_row(
    const Forward& p, int64_t start, int n2, bool keyed, const Softmax& finite, const RowMemory& m) {
  __syncthreads();
  for (int e = threadIdx.x; e < n2; e += kGenericThreads) {
    m.order[e] = static_cast<uint16_t>(e) | (e < p.experts ? 0 : kNone);
    m.key[e] = 0;
    if (e >= p.experts) continue;
    const A x = load_as<A>(p.logits, start + e);
    A key = x;
    if (keyed && !p.key_is_logit) {
      key = p.score == kSoftmax ? exp_as<A>(x - static_cast<A>(finite.max)) / static_cast<A>(finite.sum)
                                : score_of(x, p.score);
    }
    if (keyed && p.bias.data != nullptr) key += load_as<A>(p.bias, e);
    if (is_finite(x) && is_finite(key)) m.key[e] = ordered(static_cast<double>(key));
  }
  __syncthreads();
  if (keyed && p.groups > 0) limit_groups(p, m);
  sort_row(m, n2);
}

// Ids of a replayed row to global memory: replayed slots keep their place, the others take the best experts left.
__device__ void replay_row(const Forward& p, int64_t row, const RowMemory& m) {
  int* first_slot = reinterpret_cast<int*>(m.key);
  for (int e = threadIdx.x; e < p.experts; e += kGenericThreads) first_slot[e] = INT_MAX;
  __syncthreads();
  for (int slot = threadIdx.x; slot < p.top_k; slot += kGenericThreads) {
    const int id = load_id(p.replay, row * p.top_k + slot, p.experts);
    if (id >= 0 && id < p.experts) atomicMin(&first_slot[id], slot);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int next = 0, states[4] = {0, 0, 0, 0};
    for (int slot = 0; slot < p.top_k; ++slot) {
      int id = load_id(p.replay, row * p.top_k + slot, p.experts);
      const int state = id < 0 ? 1 : id >= p.experts ? 3 : first_slot[id] == slot ? 0 : 2;
      ++states[state];
      if (state != 0) {
        while (first_slot[m.order[next]] != INT_MAX) ++next;
        id = m.order[next++];
      }
      p.ids[row * p.top_k + slot] = id;
    }
    if (states[0] != 0) atomicAdd(&p.events[0], 1);
    for (int k = 0; k < 4; ++k) {
      if (states[k] != 0) atomicAdd(&p.events[1 + k], states[k]);
    }
  }
  __syncthreads();
}

template <typename A>
__device__ void write_row(const Forward& p, int64_t row, bool live, const Softmax& all) {
  const int64_t start = row * p.experts, slots = row * p.top_k;
  const int wide = p.logits.kind == kF64 ? kF64 : kF32, width = (p.experts + 7) / 8;
  double top = -INFINITY, sum = 0.0;
  if (p.weight_rule == kOverChosen) {
    for (int s = threadIdx.x; live && s < p.top_k; s += kGenericThreads) {
      top = fmax(top, static_cast<double>(load_as<A>(p.logits, start + p.ids[slots + s])));
    }
    top = block_max(top);
  }
  auto raw = [&](int s) -> A {
    const A x = load_as<A>(p.logits, start + p.ids[slots + s]);
    if (p.weight_rule == kOverChosen) return exp_as<A>(x - static_cast<A>(top));
    if (p.weight_rule == kPreSoftmax) return exp_as<A>(x - static_cast<A>(all.max)) / static_cast<A>(all.sum);
    return score_of(x, p.score);
  };
  for (int s = threadIdx.x; live && s < p.top_k; s += kGenericThreads) sum += raw(s);
  sum = block_sum(sum);
  const bool divide = p.weight_rule == kOverChosen || p.weight_rule == kScoreNormalised;
  const A divisor = !divide ? A(1) : static_cast<A>(p.weight_rule == kOverChosen ? sum : sum + 1e-20);
  for (int e = threadIdx.x; e < p.experts; e += kGenericThreads) {
    if (p.probs != nullptr) store_as<A>(p.probs, p.logits.kind, start + e, A(0));
    if (p.map_format == kBytemap) p.map[start + e] = 0;
  }
  for (int b = threadIdx.x; p.map_format == kBitmap && b < width; b += kGenericThreads) {
    unsigned bits = 0;
    for (int s = 0; live && s < p.top_k; ++s) {
      const int id = p.ids[slots + s];
      if (id / 8 == b) bits |= 1u << (id % 8);
    }
    p.map[row * width + b] = static_cast<uint8_t>(bits);
  }
  __syncthreads();
  for (int s = threadIdx.x; s < p.top_k; s += kGenericThreads) {
    A w = A(0);
    if (live) {
      const int id = p.ids[slots + s];
      w = raw(s) / divisor * static_cast<A>(p.scale_wide);
      if (p.recorded.data != nullptr && load_id(p.replay, slots + s, p.experts) == id)
        w = load_as<A>(p.recorded, slots + s);
      if (p.probs != nullptr) store_as<A>(p.probs, p.logits.kind, start + id, w);
      if (p.map_format == kBytemap) p.map[start + id] = 1;
      atomicAdd(&p.counts[id], 1);
    } else {
      p.ids[slots + s] = -1;
    }
    store_as<A>(p.weights, wide, slots + s, w);
  }
}

// Scores over all E: written, and added to the sums of the row's sequence.
template <typename A>
__device__ void write_scores(const Forward& p, int64_t row, bool live, int sequence, const Softmax& all) {
  const int64_t start = row * p.experts;
  double total = 0.0;
  if (p.score != kSoftmax) {
    for (int e = threadIdx.x; e < p.experts; e += kGenericThreads)
      total += score_of(load_as<A>(p.logits, start + e), p.score);
    total = block_sum(total) + 1e-20;
  }
  for (int e = threadIdx.x; e < p.experts; e += kGenericThreads) {
    const A x = load_as<A>(p.logits, start + e);
    A y = p.score == kSoftmax ? exp_as<A>(x - static_cast<A>(all.max)) / static_cast<A>(all.sum)
                              : score_of(x, p.score) / static_cast<A>(total);
    if (!live) y = A(0);
    if (p.scores != nullptr) store_as<A>(p.scores, p.logits.kind == kF64 ? kF64 : kF32, start + e, y);
    if (p.aux == kNoAux || sequence < 0 || !live) continue;
    unsigned long long* target = p.sums + static_cast<int64_t>(sequence) * p.experts + e;
    if (is_finite(y)) {
      atomicAdd(target, static_cast<unsigned long long>(__double2ll_rn(static_cast<double>(y) * p.sum_scale)));
    } else {
      atomicOr(target, kPoison);
    }
  }
}

__device__ void finish(const Forward& p) {
  const int wide = p.logits.kind == kF64 ? kF64 : kF32;
  const int64_t sums = p.aux == kNoAux ? 0 : static_cast<int64_t>(p.sequences) * p.experts;
  for (int64_t i = threadIdx.x; i < sums; i += kGenericThreads) {
    const unsigned long long fixed = __ldcg(p.sums + i);
    const double value = static_cast<double>(static_cast<long long>(fixed)) * p.sum_unscale;
    store_as<double>(p.score_sum, wide, i, fixed & kPoison ? NAN : value);
  }
  if (p.want_z && threadIdx.x == 0) {
    double z = 0.0;
    for (unsigned b = 0; b < gridDim.x; ++b) z += __ldcg(p.z_parts + b);
    store_as<double>(p.z_sum, wide, 0, z);
  }
}

template <typename A>
__global__ void __launch_bounds__(kGenericThreads) forward_generic_kernel(const __grid_constant__ Forward p, int n2) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ bool last;
  RowMemory m;
  m.key = reinterpret_cast<uint64_t*>(shared);
  m.total = reinterpret_cast<double*>(m.key + n2);
  m.order = reinterpret_cast<uint16_t*>(m.total + p.groups);
  m.kept = reinterpret_cast<uint8_t*>(m.order + n2);
  const bool keyed = p.bias.data != nullptr || p.groups > 0;
  const bool pre_key = keyed && !p.key_is_logit && p.score == kSoftmax;
  double z = 0.0;
  for (int64_t row = blockIdx.x; row < p.tokens; row += gridDim.x) {
    const int64_t start = row * p.experts;
    const bool live = p.valid == nullptr || p.valid[row];
    const int sequence = p.aux == kNoAux ? -1 : sequence_of(p.cu_seqlens, p.sequences, row);
    int bad = 0, nan = 0;
    for (int e = threadIdx.x; e < p.experts; e += kGenericThreads) {
      const A x = load_as<A>(p.logits, start + e);
      bad |= !is_finite(x), nan |= x != x;
    }
    bad = __syncthreads_or(bad), nan = __syncthreads_or(nan);
    if (bad && live && threadIdx.x == 0) atomicAdd(&p.events[5], 1);
    Softmax all, finite;
    if (p.want_z || p.score == kSoftmax) all = softmax_of<A>(p, start, false);
    finite = pre_key && bad ? softmax_of<A>(p, start, true) : all;

    if (p.live_apart && live) {
      order_row<A>(p, start, n2, false, finite, m);
      for (int s = threadIdx.x; sequence >= 0 && s < p.top_k; s += kGenericThreads) {
        atomicAdd(&p.aux_counts[static_cast<int64_t>(sequence) * p.experts + m.order[s]], 1);
      }
    }
    if (live) {
      order_row<A>(p, start, n2, keyed, finite, m);
      if (p.replay.data != nullptr) {
        replay_row(p, row, m);
      } else {
        for (int s = threadIdx.x; s < p.top_k; s += kGenericThreads) p.ids[row * p.top_k + s] = m.order[s];
        __syncthreads();
      }
      for (int s = threadIdx.x; p.aux != kNoAux && !p.live_apart && sequence >= 0 && s < p.top_k;
           s += kGenericThreads) {
        atomicAdd(&p.aux_counts[static_cast<int64_t>(sequence) * p.experts + p.ids[row * p.top_k + s]], 1);
      }
    }
    write_row<A>(p, row, live, all);
    if (p.aux != kNoAux || p.scores != nullptr) write_scores<A>(p, row, live, sequence, all);
    if (p.want_z && live) {
      const double lse = nan ? NAN : is_finite(all.max) ? all.max + log(all.sum) : all.max;
      z += lse * lse;
    }
    __syncthreads();
  }
  if (p.aux == kNoAux && !p.want_z) return;
  if (threadIdx.x == 0) p.z_parts[blockIdx.x] = z;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(p.ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) finish(p);
}

template <typename A>
void launch(const Forward& args, int blocks, cudaStream_t stream) {
  int n2 = 2;
  while (n2 < args.experts) n2 *= 2;
  const int64_t bytes = n2 * 10ll + args.groups * 9ll;
  allow_shared_memory(forward_generic_kernel<A>, bytes);
  forward_generic_kernel<A><<<blocks, kGenericThreads, bytes, stream>>>(args, n2);
  MOE_LAUNCH_CHECK();
}

}  // namespace

void launch_forward_generic(const Forward& args, int blocks, cudaStream_t stream) {
  if (args.logits.kind == kF64) {
    launch<double>(args, blocks, stream);
  } else {
    launch<float>(args, blocks, stream);
  }
}

}  // namespace moe_layer::router
