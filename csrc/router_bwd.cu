// Backward of the router: one kernel from the gradients of weights, score sums, z, dense probabilities and scores to d logits.
//
// With gradients of the K weights alone a row reads its K logits and writes zeros around K numbers; anything dense (and "pre"
// softmax without renormalisation) reads the row once. Contributions of the K slots meet the dense part in shared memory, so
// that a bf16 result is rounded once and every row is written with 16-byte stores. Formulas: route_topk_ref.py.

#include "router_args.cuh"

namespace moe_layer::router {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Row {
  int gl;
  int64_t row;
  bool inside, live;
};

// Id of a slot and the gradient of its weight, as they lie in memory.
struct SlotLoad {
  int id = -1;
  float gradient = 0.0f;
};

__device__ __forceinline__ SlotLoad load_slot(const Backward& p, const Row& at, int slot) {
  SlotLoad s;
  if (!at.inside || slot >= p.top_k) return s;
  const int64_t index = at.row * p.top_k + slot;
  s.id = p.ids[index];
  if (p.d_weights.data != nullptr) s.gradient = load_float(p.d_weights, index);
  return s;
}

// Gradient of weight `slot`, times the scale; 0 where the recorded weight was used, which has no gradient.
__device__ __forceinline__ float slot_gradient(const Backward& p, int64_t row, int slot, const SlotLoad& s) {
  float g = s.gradient;
  if (p.d_probs.data != nullptr) g += load_float(p.d_probs, row * p.experts + s.id);
  if (p.replay.data != nullptr && load_id(p.replay, row * p.top_k + slot, p.experts) == s.id) g = 0.0f;
  return g * p.scale;
}

// Adds the K slots' contributions to `stage` (this row's [E] floats, zeroed). Returns sum(g * p) of "pre" softmax, else 0.
template <int L>
__device__ __forceinline__ float stage_slots(
    const Backward& p, const Row& at, const SlotLoad& first, float max, float inverse, float* values, float* stage) {
  const int32_t* ids = p.ids + at.row * p.top_k;
  float* grads = values + p.top_k;
  float top = -INFINITY;
  for (int slot = at.gl; slot < p.top_k; slot += L) {
    const SlotLoad s = slot < L ? first : load_slot(p, at, slot);
    const bool used = at.live && s.id >= 0;
    values[slot] = used ? load_float(p.logits, at.row * p.experts + s.id) : -INFINITY;
    grads[slot] = used ? slot_gradient(p, at.row, slot, s) : 0.0f;
    top = fmaxf(top, values[slot]);
  }
  if (p.weight_rule == kOverChosen) top = row_max<L>(top);
  float sum = 0.0f, dot = 0.0f;
  for (int slot = at.gl; slot < p.top_k; slot += L) {
    const int id = !at.live ? -1 : slot < L ? first.id : ids[slot];
    float y = 0.0f;
    if (id >= 0) {
      if (p.weight_rule == kOverChosen) {
        y = expf(values[slot] - top);
      } else if (p.weight_rule == kPreSoftmax) {
        y = exp_above_fast(values[slot], max) * inverse;  // to the bit as in dense_softmax, which subtracts
      } else {
        y = score_of(values[slot], p.score);
      }
    }
    sum += y;
    dot += grads[slot] * y;
    if (p.weight_rule == kOverChosen || p.weight_rule == kPreSoftmax) values[slot] = y;
  }
  sum = row_sum<L>(sum), dot = row_sum<L>(dot);
  float rest =
      0.0f;  // what the K gradients of a softmax over the chosen add up to: 0 but for rounding, see softmax_backward
  if (p.weight_rule == kOverChosen) {
    const float inverse_sum = sum == 0.0f ? 0.0f : 1.0f / sum, mean = dot * inverse_sum;
    for (int slot = at.gl; slot < p.top_k; slot += L) {
      values[slot] *= inverse_sum;
      grads[slot] = values[slot] * (grads[slot] - mean);
      rest += grads[slot];
    }
    rest = row_sum<L>(rest);
  }
  for (int slot = at.gl; slot < p.top_k; slot += L) {
    const int id = !at.live ? -1 : slot < L ? first.id : ids[slot];
    if (id < 0) continue;
    const float g = grads[slot];
    float out;
    if (p.weight_rule == kOverChosen) {
      out = fmaf(-values[slot], rest, g);
    } else if (p.weight_rule == kPreSoftmax) {
      out = g * values[slot];
    } else {
      const float x = values[slot], y = score_of(x, p.score), total = sum + kEps;
      const float u = p.weight_rule == kScoreNormalised ? g / total - dot / (total * total) : g;
      out = u * score_slope(x, y, p.score);
    }
    stage[id] += out;  // ids of a row differ: nobody else adds here
  }
  return p.weight_rule == kPreSoftmax ? dot : 0.0f;
}

struct RowSums {
  float max = 0.0f, inverse = 0.0f, lse = 0.0f;  // softmax over E
};

template <int L, int C>
__device__ __forceinline__ void load_floats(
    const void* data, const Backward& p, int64_t row, bool live, int gl, float (&x)[C * 8]) {
  if (p.vector) {
    load_vectors<kF32, L, C>(data, row, live, p.experts, gl, 0.0f, x);
  } else {
    load_scalars<float, L, C>(data, row, live, p.experts, gl, 0.0f, x);
  }
}

// Gradient of the normalised scores: the sequence's d_score_sum (the same row for all its tokens) plus d_scores, both fp32.
template <int L, int C>
__device__ __forceinline__ void score_gradient(const Backward& p, const Row& at, float (&g)[C * 8]) {
#pragma unroll
  for (int i = 0; i < C * 8; ++i) g[i] = 0.0f;
  if (p.d_score_sum.data != nullptr) {
    const int sequence = at.live ? sequence_of(p.cu_seqlens, p.sequences, at.row) : -1;
    load_floats<L, C>(p.d_score_sum.data, p, sequence, sequence >= 0, at.gl, g);
  }
  if (p.d_scores.data != nullptr) {
    float more[C * 8];
    load_floats<L, C>(p.d_scores.data, p, at.row, at.live, at.gl, more);
#pragma unroll
    for (int i = 0; i < C * 8; ++i) g[i] += more[i];
  }
}

// exp(x - max) of the row into e (which may be x), and its sums.
template <int L, int C>
__device__ __forceinline__ void softmax_sums(const float (&x)[C * 8], float (&e)[C * 8], RowSums& s) {
  float top = x[0], sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 1; i < C * 8; ++i) top = fmaxf(top, x[i]);
  s.max = row_max<L>(top);
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    e[i] = exp_above_fast(x[i], s.max);
    sum[i % 4] += e[i];
  }
  const float total = row_sum<L>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  s.inverse = reciprocal(total);
  s.lse = s.max + logf(total);
}

// d logits through softmax scores and z, in place of exp(x - max); with "pre" weights including `stage`, what the row's slots
// sent, from which `through` times p is subtracted. Apart from z these gradients add up to 0, but in a saturated row only up to
// rounding; what is left goes back in proportion to p (softmax_backward in route_topk_ref.py).
template <int L, int C>
__device__ __forceinline__ void dense_softmax(
    const Backward& p, const Row& at, const RowSums& s, bool scores, bool staged, float through, const float* stage,
    float (&e)[C * 8]) {
  const float z = p.d_z.data != nullptr ? 2.0f * load_float(p.d_z, 0) * s.lse : 0.0f;
#pragma unroll
  for (int i = 0; i < C * 8; ++i) e[i] *= s.inverse;
  if (!scores && !staged) {
#pragma unroll
    for (int i = 0; i < C * 8; ++i) e[i] *= z;
    return;
  }
  float g[C * 8], dot[2] = {0.0f, 0.0f}, sum[2] = {0.0f, 0.0f};
  score_gradient<L, C>(p, at, g);
#pragma unroll
  for (int i = 0; i < C * 8; ++i) dot[i % 2] = fmaf(g[i], e[i], dot[i % 2]);
  const float shift = row_sum<L>(dot[0] + dot[1]) + through;
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    g[i] = e[i] * (g[i] - shift);
    if (staged) g[i] += stage[8 * ((i / 8) * L + at.gl) + i % 8];
    sum[i % 2] += g[i];
  }
  const float rest = row_sum<L>(sum[0] + sum[1]);
#pragma unroll
  for (int i = 0; i < C * 8; ++i) e[i] = fmaf(e[i], z - rest, g[i]);
}

// Sigmoid scores and z: one exponential an expert, and all sums at once. Returns false, with x as it was, if a sum of exponentials
// without a maximum leaves the range of fp32 in a row of the warp.
template <int L, int C>
__device__ __forceinline__ bool dense_sigmoid_and_z(const Backward& p, const Row& at, float (&x)[C * 8]) {
  float g[C * 8], e[C * 8], y[C * 8], sum[2] = {0.0f, 0.0f}, scores[2] = {0.0f, 0.0f}, dot[2] = {0.0f, 0.0f};
  score_gradient<L, C>(p, at, g);
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    e[i] = exp_compensated(x[i]);
    y[i] = e[i] * reciprocal(1.0f + e[i]);
    sum[i % 2] += e[i], scores[i % 2] += y[i], dot[i % 2] = fmaf(g[i], y[i], dot[i % 2]);
  }
  const float total = row_sum<L>(sum[0] + sum[1]);
  const float inverse = 1.0f / (row_sum<L>(scores[0] + scores[1]) + kEps),
              shift = row_sum<L>(dot[0] + dot[1]) * inverse;
  if (!__all_sync(kFull, !at.live || (total > 1e-30f && total < 1e30f))) return false;
  const float z = 2.0f * load_float(p.d_z, 0) * logf(total) * reciprocal(total);
#pragma unroll
  for (int i = 0; i < C * 8; ++i) x[i] = fmaf((g[i] - shift) * inverse, y[i] * (1.0f - y[i]), z * e[i]);
  return true;
}

// The same for sigmoid and sqrtsoftplus scores, in place of the logits.
template <int L, int C>
__device__ __forceinline__ void dense_score(const Backward& p, const Row& at, bool scores, float (&x)[C * 8]) {
  if (scores && p.d_z.data != nullptr && p.score == kSigmoid && dense_sigmoid_and_z<L, C>(p, at, x)) return;
  float out[C * 8];
#pragma unroll
  for (int i = 0; i < C * 8; ++i) out[i] = 0.0f;
  if (p.d_z.data != nullptr) {
    RowSums s;
    softmax_sums<L, C>(x, out, s);
    const float z = 2.0f * load_float(p.d_z, 0) * s.lse * s.inverse;
#pragma unroll
    for (int i = 0; i < C * 8; ++i) out[i] *= z;
  }
  if (scores) {
    float g[C * 8], y[C * 8], total = 0.0f, dot = 0.0f;
    score_gradient<L, C>(p, at, g);
#pragma unroll
    for (int i = 0; i < C * 8; ++i) y[i] = p.score == kSigmoid ? sigmoid(x[i]) : score_of(x[i], kSqrtSoftplus);
#pragma unroll
    for (int i = 0; i < C * 8; ++i) total += y[i], dot = fmaf(g[i], y[i], dot);
    const float inverse = 1.0f / (row_sum<L>(total) + kEps);
    const float shift = row_sum<L>(dot) * inverse;
#pragma unroll
    for (int i = 0; i < C * 8; ++i) {
      const float slope = p.score == kSigmoid ? y[i] * (1.0f - y[i]) : sigmoid(x[i]) * reciprocal(2.0f * y[i] + kEps);
      out[i] = fmaf((g[i] - shift) * inverse, slope, out[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < C * 8; ++i) x[i] = out[i];
}

enum Kind : int { kSparse, kDenseSoftmax, kDenseScore };

template <int L, int C, int KIND>
__global__ void __launch_bounds__(
    kThreads, KIND == kSparse         ? 4
              : C > 2                 ? 1
              : KIND == kDenseSoftmax ? 3
                                      : 2) backward_kernel(const __grid_constant__ Backward p) {
  constexpr int kBucket = L * C * 8, kRows = kWarp / L;
  extern __shared__ __align__(16) float shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / L;
  float* stage = shared + (warp * kRows + group) * kBucket;
  float* values = shared + kWarps * kRows * kBucket + (warp * kRows + group) * 2 * p.top_k;
  Row at;
  at.gl = lane % L;
  const bool slots = p.d_weights.data != nullptr || p.d_probs.data != nullptr;
  const bool scores = p.d_score_sum.data != nullptr || p.d_scores.data != nullptr;
  const int64_t tiles = ceil_div<int64_t>(p.tokens, kRows);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();  // launched beside the kernel before it in the stream
#endif

  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kWarps) {
    at.row = tile * kRows + group;
    at.inside = at.row < p.tokens;
    // All loads of the tile are on their way before the first one is waited for: the row of a token that is not valid too.
    const int id_of_row = at.inside ? p.ids[at.row * p.top_k] : -1;
    const SlotLoad first_slot = slots ? load_slot(p, at, at.gl) : SlotLoad{};
    float x[C * 8];
    RowSums s;
    if constexpr (KIND != kSparse) load_row<L, C>(p.logits, p.vector, at.row, at.inside, p.experts, at.gl, kPad, x);
    at.live = id_of_row >= 0;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float4* mine = reinterpret_cast<float4*>(stage + 8 * (c * L + at.gl));
      mine[0] = mine[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    __syncwarp();
    if constexpr (KIND == kDenseSoftmax) softmax_sums<L, C>(x, x, s);
    const bool staged = KIND == kDenseSoftmax && slots && p.weight_rule == kPreSoftmax;
    const float through = slots ? stage_slots<L>(p, at, first_slot, s.max, s.inverse, values, stage) : 0.0f;
    __syncwarp();
    if constexpr (KIND == kDenseSoftmax) dense_softmax<L, C>(p, at, s, scores, staged, through, stage, x);
    if constexpr (KIND == kDenseScore) dense_score<L, C>(p, at, scores, x);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int first = 8 * (c * L + at.gl);
      const float4 lo = *reinterpret_cast<const float4*>(stage + first),
                   hi = *reinterpret_cast<const float4*>(stage + first + 4);
      float out[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
      if constexpr (KIND != kSparse) {
#pragma unroll
        for (int j = 0; j < 8; ++j) out[j] = at.live ? (staged ? 0.0f : out[j]) + x[8 * c + j] : 0.0f;
      }
      if (!at.inside || first >= p.experts) continue;
      if (p.vector) {
        store8(p.d_logits, p.logits.kind, at.row * p.experts + first, out);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (first + j < p.experts) store_float(p.d_logits, p.logits.kind, at.row * p.experts + first + j, out[j]);
        }
      }
    }
    __syncwarp();  // the row has been read before the next one is staged
  }
}

template <int L, int C>
void launch(const Backward& args, int sms, cudaStream_t stream) {
  constexpr int kRows = kWarp / L;
  const int64_t bytes = 4ll * kWarps * kRows * (L * C * 8 + 2 * args.top_k);
  auto kernel = !args.dense              ? backward_kernel<L, C, kSparse>
                : args.score == kSoftmax ? backward_kernel<L, C, kDenseSoftmax>
                                         : backward_kernel<L, C, kDenseScore>;
  allow_shared_memory(kernel, bytes);
  const int64_t needed = ceil_div<int64_t>(ceil_div<int64_t>(args.tokens, kRows), kWarps);
  const int64_t most = 8ll * sms;
  launch_beside(kernel, static_cast<int>(needed < most ? needed : most), kThreads, bytes, stream, args);
}

}  // namespace

void launch_backward_rows(const Backward& args, int sms, cudaStream_t stream) {
  switch (bucket_for(args.experts)) {
    case 64: return launch<4, 2>(args, sms, stream);
    case 128: return launch<8, 2>(args, sms, stream);
    case 256: return launch<16, 2>(args, sms, stream);
    case 512: return launch<32, 2>(args, sms, stream);
    default: return launch<32, 4>(args, sms, stream);
  }
}

}  // namespace moe_layer::router
