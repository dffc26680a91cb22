// Lean forward kernels for fp32 logits whose selection key is the sigmoid (+ bias), with or without group limits.
#include "router_fwd_lean.cuh"

namespace moe_layer::router {

template <>
void launch_lean_keyed<true>(const Forward& args, int sms, cudaStream_t stream) {
  launch_lean_mode<kSigmoidKeyed, true>(args, sms, stream);
}

}  // namespace moe_layer::router
