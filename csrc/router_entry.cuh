// The host's way into the router's forward (router_fwd.cu), with or without the gate GEMM in front of it (router_gate.cu).
#pragma once

#include "router_args.cuh"

#include <string>
#include <tuple>

namespace moe_layer::router {

struct GateInput;
int64_t gate_tokens(const GateInput& gate);
int gate_blocks(const GateInput& gate);  // rows of Forward::part
void launch_gate(const Forward& args, const GateInput& gate, bool keyed, cudaStream_t stream);

using Outputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What a call asks for; names and meaning as in moe_layer/ops/route_topk.py.
struct Call {
  std::optional<Tensor> id_buffer, expert_bias, replay_ids, replay_weights, valid, cu_seqlens;
  int64_t top_k;
  std::string score_function, softmax_order;
  bool renormalize;
  double scaling_factor;
  int64_t num_groups, group_topk;
  std::string group_rule, weights_mode, aux_counts;
  bool want_z, want_probs, want_scores;
  std::string map_format;
  bool want_losses;
  double aux_coeff, z_coeff;
};

// Checks, outputs, workspace and launches of a call; `logits` is [T, E], or with `gate`, which makes them, [0, E] or their place.
Outputs forward(const GateInput* gate, const Tensor& logits, Call call);

}  // namespace moe_layer::router
