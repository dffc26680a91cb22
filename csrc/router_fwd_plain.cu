// Forward kernels whose selection key is the logit.
#include "router_fwd_body.cuh"

namespace moe_layer::router {

void launch_forward_plain(const Forward& args, int blocks, cudaStream_t stream) {
  launch_forward<false>(args, blocks, stream);
}

}  // namespace moe_layer::router
