// The general backward kernel: fp64 logits, more than 1024 experts or K above 32. One block a row; sums run in fp64.

#include "router_generic.cuh"

namespace moe_layer::router {
namespace {

template <typename A>
__global__ void __launch_bounds__(kGenericThreads) backward_generic_kernel(const __grid_constant__ Backward p) {
  extern __shared__ __align__(16) unsigned char shared[];
  A* stage = reinterpret_cast<A*>(shared);  // [E] contributions of the K slots
  const bool slots = p.d_weights.data != nullptr || p.d_probs.data != nullptr;
  const bool scores = p.d_score_sum.data != nullptr || p.d_scores.data != nullptr;
  const bool softmax = p.dense && (p.score == kSoftmax || p.d_z.data != nullptr);
  for (int64_t row = blockIdx.x; row < p.tokens; row += gridDim.x) {
    const int64_t start = row * p.experts, at = row * p.top_k;
    const bool live = p.ids[at] >= 0;
    const int sequence = p.d_score_sum.data != nullptr ? sequence_of(p.cu_seqlens, p.sequences, row) : -1;
    for (int e = threadIdx.x; e < p.experts; e += kGenericThreads) stage[e] = A(0);
    double max = 0.0, sum = 1.0;
    if (softmax && live) {
      double top = -INFINITY, total = 0.0;
      for (int e = threadIdx.x; e < p.experts; e += kGenericThreads)
        top = fmax(top, static_cast<double>(load_as<A>(p.logits, start + e)));
      max = block_max(top);
      for (int e = threadIdx.x; e < p.experts; e += kGenericThreads)
        total += exp_as<A>(load_as<A>(p.logits, start + e) - static_cast<A>(max));
      sum = block_sum(total);
    }
    auto probability = [&](A x) -> A { return exp_as<A>(x - static_cast<A>(max)) / static_cast<A>(sum); };
    __syncthreads();

    double through = 0.0;
    if (slots && live) {
      auto gradient = [&](int s, int id) -> A {
        if (p.replay.data != nullptr && load_id(p.replay, at + s, p.experts) == id) return A(0);
        A g = p.d_weights.data != nullptr ? load_as<A>(p.d_weights, at + s) : A(0);
        if (p.d_probs.data != nullptr) g += load_as<A>(p.d_probs, start + id);
        return g * static_cast<A>(p.scale_wide);
      };
      double top = -INFINITY, total = 0.0, dot = 0.0;
      for (int s = threadIdx.x; s < p.top_k; s += kGenericThreads) {
        if (p.ids[at + s] >= 0) top = fmax(top, static_cast<double>(load_as<A>(p.logits, start + p.ids[at + s])));
      }
      top = block_max(top);
      auto value = [&](A x) -> A {
        if (p.weight_rule == kOverChosen) return exp_as<A>(x - static_cast<A>(top));
        return p.weight_rule == kPreSoftmax ? probability(x) : score_of(x, p.score);
      };
      for (int s = threadIdx.x; s < p.top_k; s += kGenericThreads) {
        const int id = p.ids[at + s];
        if (id < 0) continue;
        const A y = value(load_as<A>(p.logits, start + id));
        total += y;
        dot += static_cast<double>(gradient(s, id)) * y;
      }
      total = block_sum(total), dot = block_sum(dot);
      double rest =
          0.0;  // what the K gradients add up to: 0 but for rounding, see softmax_backward in route_topk_ref.py
      for (int s = threadIdx.x; s < p.top_k; s += kGenericThreads) {
        const int id = p.ids[at + s];
        if (id < 0) continue;
        const A x = load_as<A>(p.logits, start + id), y = value(x), g = gradient(s, id);
        if (p.weight_rule == kOverChosen) {
          stage[id] = y / static_cast<A>(total) * (g - static_cast<A>(dot / total));
          rest += stage[id];
        } else if (p.weight_rule == kPreSoftmax) {
          stage[id] = g * y;
        } else {
          const double norm = total + 1e-20;
          const A u = p.weight_rule == kScoreNormalised ? static_cast<A>(g / norm - dot / (norm * norm)) : g;
          stage[id] = u * score_slope(x, y, p.score);
        }
      }
      if (p.weight_rule == kOverChosen) {
        rest = block_sum(rest);
        for (int s = threadIdx.x; s < p.top_k; s += kGenericThreads) {
          const int id = p.ids[at + s];
          if (id >= 0)
            stage[id] -= value(load_as<A>(p.logits, start + id)) / static_cast<A>(total) * static_cast<A>(rest);
        }
      }
      if (p.weight_rule == kPreSoftmax) through = dot;
    }

    auto score_gradient = [&](int e) -> A {
      A g = sequence >= 0 ? load_as<A>(p.d_score_sum, static_cast<int64_t>(sequence) * p.experts + e) : A(0);
      return p.d_scores.data != nullptr ? g + load_as<A>(p.d_scores, start + e) : g;
    };
    double total = 0.0, dot = 0.0;
    if (scores && live) {
      for (int e = threadIdx.x; e < p.experts; e += kGenericThreads) {
        const A x = load_as<A>(p.logits, start + e);
        const A y = p.score == kSoftmax ? probability(x) : score_of(x, p.score);
        total += y;
        dot += static_cast<double>(score_gradient(e)) * y;
      }
      total = block_sum(total) + 1e-20, dot = block_sum(dot);
    }
    const double z = p.d_z.data != nullptr ? 2.0 * load_as<A>(p.d_z, 0) * (max + log(sum)) : 0.0;
    // With softmax scores or "pre" weights the gradients over all E add up to 0 but for rounding, which goes back likewise.
    const bool whole = live && p.dense && p.score == kSoftmax;
    const bool staged = whole && slots && p.weight_rule == kPreSoftmax;
    auto through_softmax = [&](int e, A probability_e) -> A {
      return probability_e * static_cast<A>((scores ? score_gradient(e) : A(0)) - dot - through) +
             (staged ? stage[e] : A(0));
    };
    __syncthreads();  // the slots are staged
    double rest = 0.0;
    if (whole && (scores || staged)) {
      for (int e = threadIdx.x; e < p.experts; e += kGenericThreads)
        rest += through_softmax(e, probability(load_as<A>(p.logits, start + e)));
      rest = block_sum(rest);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < p.experts; e += kGenericThreads) {
      A out = staged ? A(0) : stage[e];
      if (live && p.dense) {
        const A x = load_as<A>(p.logits, start + e);
        if (p.score == kSoftmax) {
          const A p_e = probability(x);
          out += through_softmax(e, p_e) + p_e * static_cast<A>(z - rest);
        } else {
          if (p.d_z.data != nullptr) out += probability(x) * static_cast<A>(z);
          const A y = score_of(x, p.score);
          if (scores)
            out += static_cast<A>(score_gradient(e) / total - dot / (total * total)) * score_slope(x, y, p.score);
        }
      }
      store_as<A>(p.d_logits, p.logits.kind, start + e, live ? out : A(0));
    }
    __syncthreads();
  }
}

template <typename A>
void launch(const Backward& args, int blocks, cudaStream_t stream) {
  const int64_t bytes = static_cast<int64_t>(args.experts) * sizeof(A);
  allow_shared_memory(backward_generic_kernel<A>, bytes);
  backward_generic_kernel<A><<<blocks, kGenericThreads, bytes, stream>>>(args);
  MOE_LAUNCH_CHECK();
}

}  // namespace

void launch_backward_generic(const Backward& args, int blocks, cudaStream_t stream) {
  if (args.logits.kind == kF64) {
    launch<double>(args, blocks, stream);
  } else {
    launch<float>(args, blocks, stream);
  }
}

}  // namespace moe_layer::router
