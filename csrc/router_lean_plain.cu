// Lean forward kernels whose selection key is the logit.
#include "router_fwd_lean.cuh"

namespace moe_layer::router {

bool launch_lean_plain(const Forward& args, int sms, cudaStream_t stream, bool overlap) {
  if (!lean_fits(args, false)) return false;
  if (args.score == kSoftmax) {
    launch_lean_mode<kSoftmaxPlain>(args, sms, stream, overlap);
  } else {
    launch_lean_mode<kSigmoidPlain>(args, sms, stream, overlap);
  }
  return true;
}

}  // namespace moe_layer::router
