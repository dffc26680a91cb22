// Lean forward kernels whose selection key is the sigmoid (+ bias), with or without group limits.
#include "router_fwd_lean.cuh"

namespace moe_layer::router {

bool launch_lean_keyed(const Forward& args, int sms, cudaStream_t stream, bool overlap) {
  if (!lean_fits(args, true)) return false;
  launch_lean_mode<kSigmoidKeyed>(args, sms, stream, overlap);
  return true;
}

}  // namespace moe_layer::router
