// Lean forward kernels whose selection key is the logit.
#include "router_fwd_lean.cuh"

namespace moe_layer::router {

void launch_lean_plain(const Forward& args, int sms, cudaStream_t stream) {
  if (args.score == kSoftmax) {
    launch_lean_mode<kSoftmaxPlain>(args, sms, stream);
  } else {
    launch_lean_mode<kSigmoidPlain>(args, sms, stream);
  }
}

}  // namespace moe_layer::router
