// Sum of a token's expert rows in the fixed tree of moe_layer/ops/tree_reduce.py, whose twin this is (tree.cuh).
//
// The fast kernel gives each warp one token and 32 x 16 bytes of the hidden dimension and needs no barrier, so many tokens'
// copies are in flight at once. Sums are short and regular on purpose: a walk with a stack of partial sums in registers
// was bound by its instructions (256 us for 16384 tokens of 8 x 2048 on an H200, where the copy takes 143).

#include "tree.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 128;

struct TreeArgs {
  const void* rows;
  const int32_t* row_MK;
  const int32_t* ids_MK;
  const float* weights_MK;
  const void* add_MD;
  void* out_MD;
  int64_t tokens;
  int64_t num_rows;
  int32_t slots;
  int32_t hidden;
  int32_t num_experts;
  int32_t blocks;
  bool round_to_rows;
};

template <typename T, typename TOut, int V>
__device__ __forceinline__ void store(const TreeArgs& args, float (&sum)[V], int64_t offset) {
  if (args.round_to_rows) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = to_float(from_float<T>(sum[i]));
  }
  if (args.add_MD != nullptr) {
    const auto add = *reinterpret_cast<const Pack<TOut, V>*>(static_cast<const TOut*>(args.add_MD) + offset);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = __fadd_rn(sum[i], to_float(add.v[i]));
  }
  Pack<TOut, V> out;
#pragma unroll
  for (int i = 0; i < V; ++i) out.v[i] = from_float<TOut>(sum[i]);
  *reinterpret_cast<Pack<TOut, V>*>(static_cast<TOut*>(args.out_MD) + offset) = out;
}

template <typename T, typename TOut, int V>
__global__ void __launch_bounds__(kThreads) tree_reduce_warp_kernel(TreeArgs args, int pieces) {
  extern __shared__ __align__(16) unsigned char stages[];
  const int lane = threadIdx.x % kWarp, K = args.slots;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t m = item / pieces;
  if (m >= args.tokens) return;  // the whole warp
  const int d = (static_cast<int>(item - m * pieces) * kWarp + lane) * V;

  int row = -1, id = 0;
  float weight = 1.0f;
  if (lane < K) {
    row = args.row_MK[m * K + lane];
    id = args.ids_MK[m * K + lane];
    if (args.weights_MK != nullptr) weight = args.weights_MK[m * K + lane];
  }
  // An index outside the rows would be an illegal read; it counts as absent.
  const bool present = row >= 0 && row < args.num_rows;
  const T* rows = static_cast<const T*>(args.rows) + d;
  const bool inside = d < args.hidden;
  auto row_of = [&](int slot) {
    return rows + static_cast<int64_t>(__shfl_sync(0xffffffffu, row, slot)) * args.hidden;
  };
  float sum[V];
  staged_tree_sum<T, V>(
      stages + threadIdx.x / kWarp * staged_tree_bytes(K), present, id, weight, args.weights_MK != nullptr, K,
      args.blocks, args.num_experts, inside, row_of, sum);
  if (inside) store<T, TOut, V>(args, sum, m * args.hidden + d);
}

// Any K, any hidden size, up to 128 blocks: one block of threads a token, its slots sorted in shared memory.
template <typename T, typename TOut>
__global__ void __launch_bounds__(kThreads) tree_reduce_general_kernel(TreeArgs args) {
  extern __shared__ int32_t shared[];
  const int K = args.slots;
  int32_t* id_K = shared;
  int32_t* row_K = id_K + K;
  int32_t* block_K = row_K + K;
  float* weight_K = reinterpret_cast<float*>(block_K + K);
  __shared__ int count;
  const int64_t m = blockIdx.x;
  if (threadIdx.x == 0) count = 0;
  for (int k = threadIdx.x; k < K; k += kThreads) {
    const int32_t row = args.row_MK[m * K + k];
    id_K[k] = row >= 0 && row < args.num_rows ? args.ids_MK[m * K + k] : -1;
  }
  __syncthreads();
  for (int k = threadIdx.x; k < K; k += kThreads) {
    const int32_t id = id_K[k];
    if (id < 0) continue;
    int rank = 0;
    for (int j = 0; j < K; ++j) rank += (id_K[j] >= 0) & ((id_K[j] < id) | ((id_K[j] == id) & (j < k)));
    row_K[rank] = args.row_MK[m * K + k];
    block_K[rank] = tree_block(id, args.blocks, args.num_experts);
    weight_K[rank] = args.weights_MK != nullptr ? args.weights_MK[m * K + k] : 1.0f;
    atomicAdd(&count, 1);
  }
  __syncthreads();
  const T* rows = static_cast<const T*>(args.rows);
  for (int d = threadIdx.x; d < args.hidden; d += kThreads) {
    TreeStack<1, 8> stack;
    for (int i = 0; i < count; ++i) {
      float value[1] = {to_float(rows[static_cast<int64_t>(row_K[i]) * args.hidden + d])};
      if (args.weights_MK != nullptr) value[0] = __fmul_rn(value[0], weight_K[i]);
      stack.add(value, block_K[i]);
    }
    float sum[1];
    stack.finish(sum);
    store<T, TOut, 1>(args, sum, m * args.hidden + d);
  }
}

template <typename T, typename TOut>
void launch(const TreeArgs& args, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (args.hidden % kVector == 0 && args.blocks <= 8 && args.slots <= kWarp) {
    const int pieces = ceil_div(args.hidden, kVector * kWarp);
    const int64_t grid = ceil_div<int64_t>(args.tokens * pieces, kThreads / kWarp);
    STD_TORCH_CHECK(grid <= INT32_MAX, "tree_reduce: ", args.tokens, " tokens need more than 2^31 blocks");
    const int64_t shared = staged_tree_bytes(args.slots) * (kThreads / kWarp);
    const auto kernel = tree_reduce_warp_kernel<T, TOut, kVector>;
    allow_shared_memory(kernel, shared);
    // Rows pass L1 by: all of it may be shared memory, which decides how many blocks fit.
    STD_CUDA_CHECK(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
        cudaSharedmemCarveoutMaxShared));
    kernel<<<static_cast<int>(grid), kThreads, shared, stream>>>(args, pieces);
  } else {
    const int64_t shared = static_cast<int64_t>(args.slots) * 4 * sizeof(int32_t);
    STD_TORCH_CHECK(args.tokens <= INT32_MAX, "tree_reduce: ", args.tokens, " tokens need more than 2^31 blocks");
    allow_shared_memory(tree_reduce_general_kernel<T, TOut>, shared);
    tree_reduce_general_kernel<T, TOut><<<static_cast<int>(args.tokens), kThreads, shared, stream>>>(args);
  }
  MOE_LAUNCH_CHECK();
}

Tensor tree_reduce(
    const Tensor& rows_in, const Tensor& row_in, const Tensor& ids_in, const std::optional<Tensor>& weights_in,
    const std::optional<Tensor>& src, int64_t num_experts, int64_t blocks, const std::optional<Tensor>& add_in,
    bool round_to_rows, bool like_rows) {
  const Tensor rows = torch::stable::contiguous(rows_in);
  const Tensor row_MK = torch::stable::contiguous(row_in);
  const Tensor ids_MK = torch::stable::contiguous(ids_in);
  const ScalarType dtype = rows.scalar_type();
  check_tensor(rows, "rows", dtype, 2);
  check_tensor(row_MK, "row_MK", ScalarType::Int, 2);
  check_tensor(ids_MK, "ids_MK", ScalarType::Int, 2);
  const int64_t M = row_MK.size(0), K = row_MK.size(1), D = rows.size(1);
  check_size(ids_MK, "ids_MK", 0, M);
  check_size(ids_MK, "ids_MK", 1, K);
  STD_TORCH_CHECK(blocks >= 1 && blocks <= 128, "blocks must lie in [1, 128], got ", blocks);
  const DeviceGuard guard(rows.get_device_index());
  const ScalarType out_dtype = like_rows ? dtype : ScalarType::Float;
  Tensor out = new_empty(rows, {M, D}, out_dtype);
  if (M == 0 || D == 0) return out;

  std::optional<Tensor> weights, add;
  if (weights_in.has_value()) {
    weights = torch::stable::contiguous(*weights_in);
    check_tensor(*weights, "weights_MK", ScalarType::Float, 2);
  }
  if (add_in.has_value()) {
    add = torch::stable::contiguous(*add_in);
    check_tensor(*add, "add", out_dtype, 2);
    check_size(*add, "add", 0, M);
  }
  const TreeArgs args{
      rows.const_data_ptr(),
      in_ptr<int32_t>(row_MK),
      in_ptr<int32_t>(ids_MK),
      in_ptr<float>(weights),
      add.has_value() ? add->const_data_ptr() : nullptr,
      out.mutable_data_ptr(),
      M,
      rows.size(0),
      to_int32(K, "K"),
      to_int32(D, "D"),
      to_int32(num_experts, "num_experts"),
      to_int32(blocks, "blocks"),
      round_to_rows};
  const cudaStream_t stream = current_stream(rows);
  dispatch_float(dtype, "rows", [&](auto zero) {
    using T = decltype(zero);
    if (like_rows) {
      launch<T, T>(args, stream);
    } else {
      launch<T, float>(args, stream);
    }
  });
  return out;
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("tree_reduce", TORCH_BOX(&moe_layer::tree_reduce)); }
