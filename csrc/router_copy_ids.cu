// moe_layer::copy_ids on CUDA: integer ids into a caller's int16, int32 or int64 buffer; capturable, no allocation.

#include "router_args.cuh"

namespace moe_layer::router {
namespace {

constexpr int kThreads = 256;

template <typename Out>
__global__ void __launch_bounds__(kThreads)
    copy_ids_kernel(const __grid_constant__ IntArray ids, int64_t numel, Out* out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < numel; i += stride) {
    out[i] = static_cast<Out>(load_int(ids, i));
  }
}

void copy_ids(const Tensor& ids_any, Tensor out) {
  STD_TORCH_CHECK(ids_any.is_cuda() && out.is_cuda(), "ids and out must be CUDA tensors");
  check_same_device(out, "out", ids_any);
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous; pass a contiguous tensor");
  STD_TORCH_CHECK(out.numel() == ids_any.numel(), "out has ", out.numel(), " elements, ids ", ids_any.numel());
  const DeviceGuard guard(ids_any.get_device_index());
  const Tensor ids = ids_any.is_contiguous() ? ids_any : torch::stable::contiguous(ids_any);
  const int64_t numel = ids.numel();
  if (numel == 0) return;  // a grid of zero blocks is a launch error
  const IntArray source = {ids.const_data_ptr(), int_kind(ids, "ids")};
  const int out_kind = int_kind(out, "out");
  STD_TORCH_CHECK(out_kind == kI16 || out_kind == kI32 || out_kind == kI64, "out must be int16, int32 or int64");
  const int sms = sm_count(ids.get_device_index());
  launch_copy_ids(source, numel, out.mutable_data_ptr(), out_kind, sms, current_stream(ids));
}

}  // namespace

void launch_copy_ids(const IntArray& ids, int64_t numel, void* out, int out_kind, int sms, cudaStream_t stream) {
  const int64_t needed = ceil_div<int64_t>(numel, kThreads), most = 8ll * sms;
  const int blocks = static_cast<int>(needed < most ? needed : most);
  switch (out_kind) {
    case kI16: copy_ids_kernel<<<blocks, kThreads, 0, stream>>>(ids, numel, static_cast<int16_t*>(out)); break;
    case kI32: copy_ids_kernel<<<blocks, kThreads, 0, stream>>>(ids, numel, static_cast<int32_t*>(out)); break;
    default: copy_ids_kernel<<<blocks, kThreads, 0, stream>>>(ids, numel, static_cast<int64_t*>(out)); break;
  }
  MOE_LAUNCH_CHECK();
}

}  // namespace moe_layer::router

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("copy_ids", TORCH_BOX(&moe_layer::router::copy_ids)); }
