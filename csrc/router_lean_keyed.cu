// Lean forward kernels whose selection key is the sigmoid (+ bias), with or without group limits.
#include "router_fwd_lean.cuh"

namespace moe_layer::router {

void launch_lean_keyed(const Forward& args, int sms, cudaStream_t stream) {
  launch_lean_mode<kSigmoidKeyed>(args, sms, stream);
}

}  // namespace moe_layer::router
