// out[n] = index[n] < 0 ? 0 : x[index[n]], for rows of any dtype. Twin of moe_layer/ops/gather_rows.py.

#include "common.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 256;

template <typename Vector, typename Index>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(
    const Vector* __restrict__ x, const Index* __restrict__ index_N, Vector* __restrict__ out, int64_t rows,
    int64_t source_rows, int64_t per_row) {
  const int64_t total = rows * per_row, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
    const int64_t n = i / per_row, column = i - n * per_row;
    const int64_t source = index_N[n];
    Vector value{};
    // Absent rows are zero; an index past the end is treated so too instead of reading foreign memory.
    if (source >= 0 && source < source_rows) value = x[source * per_row + column];
    out[i] = value;
  }
}

template <typename Vector>
void launch(const Tensor& x, const Tensor& index, Tensor& out, int64_t row_bytes, cudaStream_t stream) {
  const int64_t rows = index.size(0), per_row = row_bytes / static_cast<int64_t>(sizeof(Vector));
  const int64_t wanted = ceil_div<int64_t>(rows * per_row, kThreads), most = 32 * sm_count(x.get_device_index());
  const int grid = static_cast<int>(wanted < most ? wanted : most);
  const Vector* source = static_cast<const Vector*>(x.const_data_ptr());
  Vector* target = static_cast<Vector*>(out.mutable_data_ptr());
  if (index.scalar_type() == ScalarType::Long) {
    gather_rows_kernel<<<grid, kThreads, 0, stream>>>(source, in_ptr<int64_t>(index), target, rows, x.size(0), per_row);
  } else {
    gather_rows_kernel<<<grid, kThreads, 0, stream>>>(source, in_ptr<int32_t>(index), target, rows, x.size(0), per_row);
  }
  MOE_LAUNCH_CHECK();
}

Tensor gather_rows(const Tensor& x_in, const Tensor& index_in) {
  const Tensor x = dense(x_in), index = dense(index_in);
  check_tensor(x, "x", x.scalar_type(), 2);
  check_tensor(index, "index", index.scalar_type() == ScalarType::Long ? ScalarType::Long : ScalarType::Int, 1);
  check_same_device(index, "index", x);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = new_empty(x, {index.size(0), x.size(1)}, x.scalar_type());
  if (out.numel() == 0) return out;
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  const cudaStream_t stream = current_stream(x);
  if (row_bytes % 16 == 0) {
    launch<uint4>(x, index, out, row_bytes, stream);
  } else if (row_bytes % 4 == 0) {
    launch<uint32_t>(x, index, out, row_bytes, stream);
  } else {
    launch<uint8_t>(x, index, out, row_bytes, stream);
  }
  return out;
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("gather_rows", TORCH_BOX(&moe_layer::gather_rows)); }
