// What every kernel file shares: argument checks, the current stream, dtype dispatch, launch arithmetic.
//
// Rules for csrc: include only torch/csrc/stable, torch/headeronly, the CUDA runtime and CUB, so that one library
// serves torch 2.11 and later and any Python. No schema is defined here: Python defines it (moe_layer/ops/NAME.py), and
// each .cu ends with its own STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("NAME", TORCH_BOX(&name)); }. A
// host entry is: checks, DeviceGuard, allocate outputs, launch on current_stream(), MOE_LAUNCH_CHECK().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>
#include <utility>

namespace moe_layer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int kWarp = 32;

// ---------------------------------------------------------------------------------------------------------- checks

// Kernels read raw pointers: a strided view or a CPU tensor would be read as garbage, not rejected, without this.
inline void check_tensor(const Tensor& t, const char* name, ScalarType dtype, int64_t ndim) {
  STD_TORCH_CHECK(t.is_cuda(), name, " must be a CUDA tensor; move it with .cuda()");
  STD_TORCH_CHECK(
      t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
      torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == ndim, name, " must have ", ndim, " dimensions, got ", t.dim());
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous; call .contiguous()");
}

inline void check_size(const Tensor& t, const char* name, int64_t axis, int64_t size) {
  STD_TORCH_CHECK(t.size(axis) == size, name, " must have size ", size, " on axis ", axis, ", got ", t.size(axis));
}

// Pointers of two devices in one kernel are an illegal access that surfaces much later.
inline void check_same_device(const Tensor& t, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(
      t.get_device_index() == other.get_device_index(), name, " is on cuda:", t.get_device_index(),
      " but the first argument is on cuda:", other.get_device_index());
}

// int32 indexing inside kernels is faster; this is where a caller that exceeds it is told.
inline int32_t to_int32(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, name, " is ", value, ", outside [0, 2^31)");
  return static_cast<int32_t>(value);
}

#define MOE_LAUNCH_CHECK() STD_CUDA_KERNEL_LAUNCH_CHECK()

// ------------------------------------------------------------------------------------------------- stream and device

// The one place that knows how to get torch's stream: Stream::nativeHandle() exists only from 2.13, the shim since 2.4.
inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int sm_count(int device) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Dynamic shared memory above 48 KiB must be asked for, per kernel and device; the launch fails otherwise.
template <typename Kernel>
inline void allow_shared_memory(Kernel kernel, int64_t bytes) {
  if (bytes > 48 * 1024) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  }
}

// Launches a kernel that calls await_previous_kernel() (or cudaGridDependencySynchronize()) before it reads or writes what
// others do: from sm_90 on beside the kernel before it in the stream (programmatic dependent launch), once all blocks of
// that one have called start_next_kernel() or ended, so that the launch itself costs no time on the device.
template <typename Kernel, typename... Args>
void launch_beside(Kernel kernel, int blocks, int threads, int64_t bytes, cudaStream_t stream, const Args&... args) {
  int device = 0, major = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = major >= 9 ? 1 : 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args...));
}

__device__ __forceinline__ void start_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

__device__ __forceinline__ void await_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Calls body(false) and, once the kernel before this one in the stream is done, body(true), which computes. The first call runs the same
// instructions without loading or storing, so that they are in the instruction cache by then: a launch of a few microseconds would
// otherwise spend much of its time on fetching them.
template <typename Body>
__device__ __forceinline__ void rehearse(Body&& body) {
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) await_previous_kernel();
    body(pass == 1);
  }
}

// ------------------------------------------------------------------------------------------------------- arithmetic

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <typename T>
__host__ __device__ constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

// ---------------------------------------------------------------------------------------------------------- pointers

template <typename T>
inline const T* in_ptr(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
inline T* out_ptr(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// An absent optional is a null pointer in the kernel.
template <typename T>
inline const T* in_ptr(const std::optional<Tensor>& t) {
  return t.has_value() ? in_ptr<T>(*t) : nullptr;
}

// Contiguous in memory; free where it is already (torch's op goes through the dispatcher either way).
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Uninitialised tensor on the device of `like`. By the C function: torch::stable::new_empty looks the op up by its name in
// every call, and a step of ours makes some forty tensors.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  constexpr size_t kMostDims = 4;
  STD_TORCH_CHECK(sizes.size() <= kMostDims, "new_empty serves at most ", kMostDims, " dimensions, got ", sizes.size());
  const int64_t* size = sizes.begin();
  const int64_t ndim = static_cast<int64_t>(sizes.size());
  int64_t strides[kMostDims] = {}, stride = 1;
  for (int64_t i = ndim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= size[i] > 1 ? size[i] : 1;
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, size, strides, type, device_type, like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor new_zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// Scratch bytes from torch's caching allocator, freed in stream order when the tensor goes out of scope.
inline Tensor scratch_bytes(const Tensor& like, int64_t bytes) { return new_empty(like, {bytes}, ScalarType::Byte); }

// ----------------------------------------------------------------------------------------------------- dtype dispatch

// Calls body(T{}) with the CUDA type of a floating dtype; `using scalar_t = decltype(zero)` inside. fp64 has no kernel:
// the Python reference serves it, so an fp64 tensor here is an error of the caller and says so.
template <typename Body>
inline void dispatch_float(ScalarType dtype, const char* name, Body&& body) {
  switch (dtype) {
    case ScalarType::Float: body(float{}); return;
    case ScalarType::BFloat16: body(__nv_bfloat16{}); return;
    case ScalarType::Half: body(__half{}); return;
    default:
      STD_TORCH_CHECK(
          false, name, " must be float32, bfloat16 or float16 on CUDA, got ", torch::headeronly::toString(dtype));
  }
}

// Calls body(std::integral_constant<int, V>{}) for the first V >= value, so that K and E become compile-time constants.
template <int V, int... Rest, typename Body>
inline void dispatch_at_least(int value, const char* name, Body&& body) {
  if (value <= V) {
    body(std::integral_constant<int, V>{});
  } else if constexpr (sizeof...(Rest) > 0) {
    dispatch_at_least<Rest...>(value, name, std::forward<Body>(body));
  } else {
    STD_TORCH_CHECK(false, name, " is ", value, ", above the largest supported value ", V);
  }
}

template <typename Body>
inline void dispatch_bool(bool value, Body&& body) {
  if (value) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

// -------------------------------------------------------------------------------------------------- device conversions

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return v;
  }
}

}  // namespace moe_layer
