// Forward kernels whose selection key is a score, with a bias or group limits.
#include "router_fwd_body.cuh"

namespace moe_layer::router {

void launch_forward_keyed(const Forward& args, int blocks, cudaStream_t stream) {
  launch_forward<true>(args, blocks, stream);
}

}  // namespace moe_layer::router
