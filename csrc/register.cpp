// What this library says about itself. Kernels register themselves, each in its own .cu (see common.cuh).
//
// moe_layer/ops/_ext.py reads the text through ctypes for `moe-layer env` and to refuse a library that was built
// without the visible GPU's architecture, which CUDA would report as "no kernel image" at the first launch.

#include <cuda_runtime_api.h>

#include <torch/headeronly/version.h>

#ifndef MOE_LAYER_ARCHS
#error "build with csrc/build.py, which defines MOE_LAYER_ARCHS"
#endif

#define MOE_STRING_(x) #x
#define MOE_STRING(x) MOE_STRING_(x)

extern "C" __attribute__((visibility("default"))) const char* moe_layer_build_info() {
  return "torch_headers=" TORCH_VERSION ";cuda=" MOE_STRING(CUDART_VERSION) ";archs=" MOE_STRING(
      MOE_LAYER_ARCHS) ";version=" MOE_STRING(MOE_LAYER_VERSION) ";sources=" MOE_STRING(MOE_LAYER_SOURCES);
}
