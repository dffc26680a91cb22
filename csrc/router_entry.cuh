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

// Checks, outputs, workspace and launches of a call; `logits` is [0, E] or a place for them if `gate` makes them.
Outputs forward(
    const GateInput* gate, std::optional<Tensor> id_buffer, const Tensor& logits, std::optional<Tensor> expert_bias,
    std::optional<Tensor> replay_ids, std::optional<Tensor> replay_weights, std::optional<Tensor> valid,
    std::optional<Tensor> cu_seqlens, int64_t top_k, std::string score_function, std::string softmax_order,
    bool renormalize, double scaling_factor, int64_t num_groups, int64_t group_topk, std::string group_rule,
    std::string weights_mode, std::string aux_counts, bool want_z, bool want_probs, bool want_scores,
    std::string map_format, bool want_losses, double aux_coeff, double z_coeff);

}  // namespace moe_layer::router
