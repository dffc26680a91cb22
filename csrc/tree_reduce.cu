// Sum of a token's expert rows in the fixed tree of moe_layer/ops/tree_reduce.py, whose twin this is.
//
// One group of threads per token, 16 bytes of the hidden dimension per thread. The group first sorts the token's slots by
// (expert, slot) in shared memory, then every thread walks them with a register stack: a slot of the block on top is
// added to it; a slot of a new block first joins the finished subtrees. All threads of a group take the same branches.
// Products and sums use the _rn intrinsics: an FMA would round once where the CPU reference rounds twice.

#include "common.cuh"

namespace moe_layer {
namespace {

constexpr int kGroupThreads = 256;  // threads of a block; wide rows take more
constexpr int kAhead = 8;           // rows in flight per thread before the first addition

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

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// kDepth: most unfinished subtrees at once, 1 + log2(blocks).
template <int V, int kDepth>
struct Stack {
  float a[kDepth][V];
  int block[kDepth];
  int depth = 0;

  // Only constant indices, so that the stack stays in registers; [0] is the top.
  __device__ __forceinline__ void push(const float (&value)[V], int b) {
#pragma unroll
    for (int level = kDepth - 1; level > 0; --level) {
      if (depth >= level) {
        block[level] = block[level - 1];
#pragma unroll
        for (int i = 0; i < V; ++i) a[level][i] = a[level - 1][i];
      }
    }
    block[0] = b;
#pragma unroll
    for (int i = 0; i < V; ++i) a[0][i] = __fadd_rn(0.0f, value[i]);  // 0 + x turns -0 into +0, as the reference does
    ++depth;
  }

  __device__ __forceinline__ void merge_top() {
#pragma unroll
    for (int i = 0; i < V; ++i) a[0][i] = __fadd_rn(a[1][i], a[0][i]);
#pragma unroll
    for (int level = 1; level < kDepth - 1; ++level) {
      if (depth > level + 1) {
        block[level] = block[level + 1];
#pragma unroll
        for (int i = 0; i < V; ++i) a[level][i] = a[level + 1][i];
      }
    }
    --depth;
  }

  __device__ __forceinline__ void add(const float (&value)[V], int b) {
    if (depth > 0 && b == block[0]) {
#pragma unroll
      for (int i = 0; i < V; ++i) a[0][i] = __fadd_rn(a[0][i], value[i]);
      return;
    }
    if (depth > 0) {
      // b meets the top's subtree at this height; everything below it on the top's side is complete.
      const int height = 31 - __clz(b ^ block[0]);
      while (depth > 1 && (block[1] >> height) == (block[0] >> height)) merge_top();
    }
    push(value, b);
  }
};

template <typename T, typename TOut, int V, int kDepth>
__global__ void tree_reduce_kernel(TreeArgs args) {
  extern __shared__ int32_t shared[];
  const int groups = blockDim.y, group = threadIdx.y, K = args.slots;
  int32_t* id_K = shared + group * 4 * K;
  int32_t* row_K = id_K + K;
  int32_t* block_K = row_K + K;
  float* weight_K = reinterpret_cast<float*>(block_K + K);
  __shared__ int count_G[32];

  const int64_t m = static_cast<int64_t>(blockIdx.x) * groups + group;
  const bool active = m < args.tokens;
  if (threadIdx.x == 0) count_G[group] = 0;
  __syncthreads();
  if (active) {
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
      const int32_t row = args.row_MK[m * K + k];
      // An index outside the rows would be an illegal read; it counts as absent.
      const bool present = row >= 0 && row < args.num_rows;
      id_K[k] = present ? args.ids_MK[m * K + k] : -1;
    }
  }
  __syncthreads();
  if (active) {
    int mine = 0;
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
      const int32_t id = id_K[k];
      if (id < 0) continue;
      ++mine;
      int rank = 0;
      for (int j = 0; j < K; ++j) rank += (id_K[j] >= 0) & ((id_K[j] < id) | ((id_K[j] == id) & (j < k)));
      row_K[rank] = args.row_MK[m * K + k];
      block_K[rank] = static_cast<int32_t>(static_cast<int64_t>(id) * args.blocks / args.num_experts);
      if (args.weights_MK != nullptr) weight_K[rank] = args.weights_MK[m * K + k];
    }
    if (mine != 0) atomicAdd(&count_G[group], mine);
  }
  __syncthreads();
  if (!active) return;

  const int count = count_G[group];
  const T* rows = static_cast<const T*>(args.rows);
  for (int d = threadIdx.x * V; d < args.hidden; d += blockDim.x * V) {
    Stack<V, kDepth> stack;
    for (int first = 0; first < count; first += kAhead) {
      Pack<T, V> ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i < count) {
          ahead[i] =
              *reinterpret_cast<const Pack<T, V>*>(rows + static_cast<int64_t>(row_K[first + i]) * args.hidden + d);
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i < count) {
          float value[V];
#pragma unroll
          for (int j = 0; j < V; ++j) {
            value[j] = to_float(ahead[i].v[j]);
            if (args.weights_MK != nullptr) value[j] = __fmul_rn(value[j], weight_K[first + i]);
          }
          stack.add(value, block_K[first + i]);
        }
      }
    }
    float sum[V];
    while (stack.depth > 1) stack.merge_top();
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sum[j] = stack.depth > 0 ? stack.a[0][j] : 0.0f;
      if (args.round_to_rows) sum[j] = to_float(from_float<T>(sum[j]));
    }
    if (args.add_MD != nullptr) {
      const auto add =
          *reinterpret_cast<const Pack<TOut, V>*>(static_cast<const TOut*>(args.add_MD) + m * args.hidden + d);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] = __fadd_rn(sum[j], to_float(add.v[j]));
    }
    Pack<TOut, V> out;
#pragma unroll
    for (int j = 0; j < V; ++j) out.v[j] = from_float<TOut>(sum[j]);
    *reinterpret_cast<Pack<TOut, V>*>(static_cast<TOut*>(args.out_MD) + m * args.hidden + d) = out;
  }
}

template <typename T, typename TOut, int V, int kDepth>
void launch_shape(const TreeArgs& args, cudaStream_t stream) {
  const int needed = round_up(ceil_div(args.hidden, V), kWarp);
  const int tx = needed < 512 ? needed : 512;
  const int ty = tx < kGroupThreads ? kGroupThreads / tx : 1;
  const int64_t grid = ceil_div<int64_t>(args.tokens, ty);
  STD_TORCH_CHECK(grid <= INT32_MAX, "tree_reduce: ", args.tokens, " tokens need more than 2^31 blocks");
  const int64_t shared = static_cast<int64_t>(ty) * args.slots * 4 * sizeof(int32_t);
  allow_shared_memory(tree_reduce_kernel<T, TOut, V, kDepth>, shared);
  tree_reduce_kernel<T, TOut, V, kDepth><<<static_cast<int>(grid), dim3(tx, ty), shared, stream>>>(args);
  MOE_LAUNCH_CHECK();
}

// Two shapes a dtype: 16-byte accesses with the 8 blocks of a layer, and a slow one for everything else.
template <typename T, typename TOut>
void launch(const TreeArgs& args, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (args.hidden % kVector == 0 && args.blocks <= 8) {
    launch_shape<T, TOut, kVector, 4>(args, stream);
  } else {
    launch_shape<T, TOut, 1, 9>(args, stream);
  }
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
  STD_TORCH_CHECK(blocks >= 1 && blocks <= 256, "blocks must lie in [1, 256], got ", blocks);
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
