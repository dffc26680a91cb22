// Rows in one byte an element with a scale per 128 columns. Twin of moe_layer/ops/stash.py; a warp does one block.

#include <cuda_fp8.h>

#include "common.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 256;
constexpr int kBlock = 128;
constexpr int kPerLane = kBlock / kWarp;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const T* __restrict__ h, uint8_t* __restrict__ packed, int64_t items, int32_t columns, int32_t blocks) {
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (item >= items) return;  // the whole warp
  const int64_t row = item / blocks;
  const int block = static_cast<int>(item - row * blocks), lane = threadIdx.x % kWarp;
  const int first = block * kBlock + lane * kPerLane;
  float value[kPerLane];
  float peak = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    value[i] = first + i < columns ? to_float(h[row * columns + first + i]) : 0.0f;
    if (isfinite(value[i])) peak = fmaxf(peak, fabsf(value[i]));
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, step));
  const float scale = fmaxf(__fdiv_rn(peak, 448.0f), 0x1p-126f);
  const int64_t width = columns + 4 * static_cast<int64_t>(blocks);
  uint8_t* out = packed + row * width;
  if (first < columns) {  // columns is a multiple of 4: all of the lane's elements or none
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float scaled = isfinite(value[i]) ? __fdiv_rn(value[i], scale) : __int_as_float(0x7fffffff);
      codes |= static_cast<uint32_t>(__nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3)) << (8 * i);
    }
    *reinterpret_cast<uint32_t*>(out + first) = codes;
  }
  if (lane == 0) *reinterpret_cast<float*>(out + columns + 4 * block) = scale;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) unpack_kernel(
    const uint8_t* __restrict__ packed, T* __restrict__ h, int64_t items, int32_t columns, int32_t blocks) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;  // four columns
  if (item >= items) return;
  const int fours = columns / 4;
  const int64_t row = item / fours;
  const int first = static_cast<int>(item - row * fours) * 4;
  const uint8_t* source = packed + row * (columns + 4 * static_cast<int64_t>(blocks));
  const uint32_t codes = *reinterpret_cast<const uint32_t*>(source + first);
  const float scale = *reinterpret_cast<const float*>(source + columns + 4 * (first / kBlock));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __nv_fp8_e4m3 code;
    code.__x = static_cast<__nv_fp8_storage_t>(codes >> (8 * i));
    h[row * columns + first + i] = from_float<T>(__fmul_rn(static_cast<float>(code), scale));
  }
}

int grid_of(int64_t threads, const char* name) {
  const int64_t blocks = ceil_div<int64_t>(threads, kThreads);
  STD_TORCH_CHECK(blocks <= INT32_MAX, name, ": too many rows for one launch");
  return static_cast<int>(blocks);
}

Tensor pack_fp8(const Tensor& h_in) {
  const Tensor h = torch::stable::contiguous(h_in);
  check_tensor(h, "h", h.scalar_type(), 2);
  STD_TORCH_CHECK(h.size(1) % 4 == 0, "h must have a multiple of 4 columns, got ", h.size(1));
  const int32_t columns = to_int32(h.size(1), "columns"), blocks = ceil_div(columns, kBlock);
  const DeviceGuard guard(h.get_device_index());
  Tensor packed = new_empty(h, {h.size(0), columns + 4 * static_cast<int64_t>(blocks)}, ScalarType::Byte);
  const int64_t items = h.size(0) * blocks;
  if (items == 0) return packed;
  const cudaStream_t stream = current_stream(h);
  dispatch_float(h.scalar_type(), "h", [&](auto zero) {
    using T = decltype(zero);
    pack_kernel<T><<<grid_of(items * kWarp, "pack_fp8"), kThreads, 0, stream>>>(
        in_ptr<T>(h), out_ptr<uint8_t>(packed), items, columns, blocks);
  });
  MOE_LAUNCH_CHECK();
  return packed;
}

Tensor unpack_fp8(const Tensor& packed_in, int64_t columns_in, ScalarType dtype) {
  const Tensor packed = torch::stable::contiguous(packed_in);
  check_tensor(packed, "packed", ScalarType::Byte, 2);
  const int32_t columns = to_int32(columns_in, "columns"), blocks = ceil_div(columns, kBlock);
  check_size(packed, "packed", 1, columns + 4 * static_cast<int64_t>(blocks));
  STD_TORCH_CHECK(columns % 4 == 0, "columns must be a multiple of 4, got ", columns);
  const DeviceGuard guard(packed.get_device_index());
  Tensor h = new_empty(packed, {packed.size(0), columns}, dtype);
  const int64_t items = packed.size(0) * (columns / 4);
  if (items == 0) return h;
  const cudaStream_t stream = current_stream(packed);
  dispatch_float(dtype, "dtype", [&](auto zero) {
    using T = decltype(zero);
    unpack_kernel<T><<<grid_of(items, "unpack_fp8"), kThreads, 0, stream>>>(
        in_ptr<uint8_t>(packed), out_ptr<T>(h), items, columns, blocks);
  });
  MOE_LAUNCH_CHECK();
  return h;
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) {
  m.impl("pack_fp8", TORCH_BOX(&moe_layer::pack_fp8));
  m.impl("unpack_fp8", TORCH_BOX(&moe_layer::unpack_fp8));
}
