// Backward of the router: one kernel from the gradients of weights, score sums, z, dense probabilities and scores to d logits.
//
// With gradients of the K weights alone a row reads its K logits and writes zeros around K numbers; anything dense (and "pre"
// softmax without renormalisation) reads the row once. Contributions of the K slots meet the dense part in shared memory, so
// that a bf16 result is rounded once and every row is written with 16-byte stores. Formulas: route_topk_ref.py.

#include "router_common.cuh"

namespace moe_layer::router {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct Row {
  int gl;
  int64_t row;
  bool inside, live;
};

// Gradient of weight `slot`, times the scale; 0 where the recorded weight was used, which has no gradient.
__device__ __forceinline__ float slot_gradient(const Backward& p, int64_t row, int slot, int id) {
  const int64_t at = row * p.top_k + slot;
  float g = p.d_weights.data != nullptr ? load_float(p.d_weights, at) : 0.0f;
  if (p.d_probs.data != nullptr) g += load_float(p.d_probs, row * p.experts + id);
  if (p.replay.data != nullptr && load_id(p.replay, at, p.experts) == id) g = 0.0f;
  return g * p.scale;
}

// Adds the K slots' contributions to `stage` (this row's [E] floats, zeroed). Returns sum(g * p) of "pre" softmax, else 0.
template <int L>
__device__ __forceinline__ float stage_slots(
    const Backward& p, const Row& at, float max, float inverse, float* values, float* stage) {
  const int32_t* ids = p.ids + at.row * p.top_k;
  float* grads = values + p.top_k;
  float top = -INFINITY;
  for (int slot = at.gl; slot < p.top_k; slot += L) {
    const int id = at.live ? ids[slot] : -1;
    values[slot] = id >= 0 ? load_float(p.logits, at.row * p.experts + id) : -INFINITY;
    grads[slot] = id >= 0 ? slot_gradient(p, at.row, slot, id) : 0.0f;
    top = fmaxf(top, values[slot]);
  }
  if (p.weight_rule == kOverChosen) top = row_max<L>(top);
  float sum = 0.0f, dot = 0.0f;
  for (int slot = at.gl; slot < p.top_k; slot += L) {
    const int id = at.live ? ids[slot] : -1;
    float y = 0.0f;
    if (id >= 0) {
      if (p.weight_rule == kOverChosen) {
        y = expf(values[slot] - top);
      } else if (p.weight_rule == kPreSoftmax) {
        y = expf(values[slot] - max) * inverse;
      } else {
        y = score_of(values[slot], p.score);
      }
    }
    sum += y;
    dot += grads[slot] * y;
    if (p.weight_rule == kOverChosen || p.weight_rule == kPreSoftmax) values[slot] = y;
  }
  sum = row_sum<L>(sum), dot = row_sum<L>(dot);
  for (int slot = at.gl; slot < p.top_k; slot += L) {
    const int id = at.live ? ids[slot] : -1;
    if (id < 0) continue;
    const float g = grads[slot];
    float out;
    if (p.weight_rule == kOverChosen) {
      const float w = values[slot] / sum;
      out = w * (g - dot / sum);
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
  float score_inverse = 0.0f, score_dot = 0.0f;  // normalised scores over E, and sum(g * score)
};

// Gradient of the normalised scores: the sequence's d_score_sum (the same row for all its tokens) plus d_scores.
template <int L, int C>
__device__ __forceinline__ void score_gradient(const Backward& p, const Row& at, float (&g)[C * 8]) {
#pragma unroll
  for (int i = 0; i < C * 8; ++i) g[i] = 0.0f;
  if (p.d_score_sum.data != nullptr) {
    const int sequence = at.live ? sequence_of(p.cu_seqlens, p.sequences, at.row) : -1;
    load_row<L, C>(p.d_score_sum, p.vector, sequence, sequence >= 0, p.experts, at.gl, 0.0f, g);
  }
  if (p.d_scores.data != nullptr) {
    float more[C * 8];
    load_row<L, C>(p.d_scores, p.vector, at.row, at.live, p.experts, at.gl, 0.0f, more);
#pragma unroll
    for (int i = 0; i < C * 8; ++i) g[i] += more[i];
  }
}

template <int L, int C>
__device__ __forceinline__ void softmax_sums(const float (&x)[C * 8], RowSums& s) {
  float top = x[0], sum = 0.0f;
#pragma unroll
  for (int i = 1; i < C * 8; ++i) top = fmaxf(top, x[i]);
  s.max = row_max<L>(top);
#pragma unroll
  for (int i = 0; i < C * 8; ++i) sum += expf(x[i] - s.max);
  sum = row_sum<L>(sum);
  s.inverse = 1.0f / sum;
  s.lse = s.max + logf(sum);
}

// The dense part of d logits for this lane's experts. `through` is what "pre" softmax subtracts from every expert.
template <int L, int C>
__device__ __forceinline__ void dense_part(
    const Backward& p, const float (&x)[C * 8], const float (&g)[C * 8], const RowSums& s, bool scores, float through,
    float (&out)[C * 8]) {
  const float z = p.d_z.data != nullptr ? 2.0f * load_float(p.d_z, 0) * s.lse : 0.0f;
  if (p.score == kSoftmax) {
    float dot = 0.0f;
    if (scores) {
#pragma unroll
      for (int i = 0; i < C * 8; ++i) dot += g[i] * (expf(x[i] - s.max) * s.inverse);
      dot = row_sum<L>(dot);
    }
#pragma unroll
    for (int i = 0; i < C * 8; ++i) out[i] = expf(x[i] - s.max) * s.inverse * ((g[i] - dot) - through + z);
    return;
  }
  float total = 0.0f, dot = 0.0f;
  float y[C * 8];
  if (scores) {
#pragma unroll
    for (int i = 0; i < C * 8; ++i) {
      y[i] = score_of(x[i], p.score);
      total += y[i];
      dot += g[i] * y[i];
    }
    total = row_sum<L>(total) + kEps, dot = row_sum<L>(dot);
  }
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    out[i] = p.d_z.data != nullptr ? expf(x[i] - s.max) * s.inverse * z : 0.0f;
    if (scores) out[i] += (g[i] / total - dot / (total * total)) * score_slope(x[i], y[i], p.score);
  }
}

template <int L, int C, bool DENSE>
__global__ void __launch_bounds__(
    kThreads, C > 2   ? 1
              : DENSE ? 2
                      : 4) backward_kernel(const __grid_constant__ Backward p) {
  constexpr int kBucket = L * C * 8, kRows = kWarp / L;
  extern __shared__ __align__(16) float shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / L;
  float* stage = shared + (warp * kRows + group) * kBucket;
  float* values = shared + kWarps * kRows * kBucket + (warp * kRows + group) * 2 * p.top_k;
  Row at;
  at.gl = lane % L;
  const bool slots = p.d_weights.data != nullptr || p.d_probs.data != nullptr;
  const bool scores = p.d_score_sum.data != nullptr || p.d_scores.data != nullptr;
  const bool softmax = DENSE && (p.score == kSoftmax || p.d_z.data != nullptr);
  const int64_t tiles = ceil_div<int64_t>(p.tokens, kRows);

  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kWarps) {
    at.row = tile * kRows + group;
    at.inside = at.row < p.tokens;
    at.live = at.inside && p.ids[at.row * p.top_k] >= 0;
    float x[C * 8], out[C * 8];
    RowSums s;
    if constexpr (DENSE) load_row<L, C>(p.logits, p.vector, at.row, at.live, p.experts, at.gl, kPad, x);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float4* mine = reinterpret_cast<float4*>(stage + 8 * (c * L + at.gl));
      mine[0] = mine[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    __syncwarp();
    if constexpr (DENSE) {
      if (softmax) softmax_sums<L, C>(x, s);
    }
    const float through = slots ? stage_slots<L>(p, at, s.max, s.inverse, values, stage) : 0.0f;
    if constexpr (DENSE) {
      float g[C * 8];
      score_gradient<L, C>(p, at, g);
      dense_part<L, C>(p, x, g, s, scores, through, out);
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int first = 8 * (c * L + at.gl);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float dense = DENSE && at.live ? out[8 * c + j] : 0.0f;
        out[8 * c + j] = stage[first + j] + dense;
      }
      if (!at.inside || first >= p.experts) continue;
      if (p.vector) {
        store8(p.d_logits, p.logits.kind, at.row * p.experts + first, &out[8 * c]);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (first + j < p.experts)
            store_float(p.d_logits, p.logits.kind, at.row * p.experts + first + j, out[8 * c + j]);
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
  auto kernel = args.dense ? backward_kernel<L, C, true> : backward_kernel<L, C, false>;
  allow_shared_memory(kernel, bytes);
  const int64_t needed = ceil_div<int64_t>(ceil_div<int64_t>(args.tokens, kRows), kWarps);
  const int64_t most = 8ll * sms;
  kernel<<<static_cast<int>(needed < most ? needed : most), kThreads, bytes, stream>>>(args);
  MOE_LAUNCH_CHECK();
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
