// Lean forward kernels for fp32 logits whose selection key is the logit.
#include "router_fwd_lean.cuh"

namespace moe_layer::router {

template <>
void launch_lean_plain<true>(const Forward& args, int sms, cudaStream_t stream) {
  if (args.score == kSoftmax) {
    launch_lean_mode<kSoftmaxPlain, true>(args, sms, stream);
  } else {
    launch_lean_mode<kSigmoidPlain, true>(args, sms, stream);
  }
}

}  // namespace moe_layer::router
