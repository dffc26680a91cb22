// Lean forward kernels for 16-bit logits whose selection key is the logit.
#include "router_fwd_lean.cuh"

namespace moe_layer::router {

template <>
void launch_lean_plain<false>(const Forward& args, int sms, cudaStream_t stream) {
  if (args.score == kSoftmax) {
    launch_lean_mode<kSoftmaxPlain, false>(args, sms, stream);
  } else {
    launch_lean_mode<kSigmoidPlain, false>(args, sms, stream);
  }
}

}  // namespace moe_layer::router
