// Sum of a token's expert rows in the fixed tree of moe_layer/ops/tree_reduce.py, whose twin this is (tree.cuh).
//
// The fast kernel gives each warp one token and one or two pieces of 32 x 16 bytes of its rows, and needs no barrier. All
// rows are copied to shared memory at once (cp.async) while the warp ranks its token's slots, and the tree is walked with no
// data-dependent register index: a sum is never -0, so that an absent block may be added as +0, which gives the same bits.
//
// Instructions bind it as soon as there are too many of them (16384 tokens of 8 x 2048 on an H200, where the copy takes
// 143 us): 256 us with a stack of partial sums in registers, 170 with one piece a warp and 64-bit divisions.

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

// Bytes of shared memory of one warp; a multiple of 16.
constexpr int64_t stage_bytes(int64_t slots, int pieces) {
  return slots * pieces * kWarp * 16 + round_up<int64_t>(slots, 16);
}

// sums[p][i] = the tree over the token's rows of element i of the V consecutive ones of this lane in piece p. For at most 8
// blocks and 32 slots. The whole warp calls it.
//   stage      stage_bytes(slots, P) bytes of shared memory of this warp, aligned to 16.
//   present    lane k < slots: whether slot k has a row; `id` is its expert, `weight` its factor (used where `weighted`).
//   row_of(k)  const T*: this lane's first element in slot k's row, in piece 0; pieces lie kWarp * V elements apart. Called
//              only for present slots, by all lanes together.
//   inside     how many pieces of this lane lie in the row; the sums of others are unspecified.
template <typename T, int V, int P, typename RowOf>
__device__ __forceinline__ void staged_tree_sums(
    unsigned char* stage, bool present, int id, float weight, bool weighted, int slots, int blocks, int num_experts,
    int inside, RowOf row_of, float (&sums)[P][V]) {
  static_assert(sizeof(Pack<T, V>) == 16);
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kBlocks = 8;
  constexpr int kSlot = P * kWarp * 16;
  const int lane = threadIdx.x % kWarp;
  unsigned char* mine = stage + lane * 16;  // of slot 0, piece 0
  for (unsigned left = __ballot_sync(kAll, present && lane < slots); left != 0; left &= left - 1) {
    const int k = __ffs(left) - 1;
    const T* row = row_of(k);
#pragma unroll
    for (int p = 0; p < P; ++p)
      if (p < inside) copy_16_async(mine + k * kSlot + p * kWarp * 16, row + p * kWarp * V);
  }
  asm volatile("cp.async.commit_group;\n" ::: "memory");

  const SlotOrder order = order_slots(present, id, slots, blocks, num_experts);
  unsigned char* slot_at = stage + slots * kSlot;  // slot of each rank
  if (order.rank >= 0) slot_at[order.rank] = static_cast<unsigned char>(lane);
  int end[kBlocks];  // ranks below end[b] belong to blocks 0 ... b
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) end[b] = __popc(__ballot_sync(kAll, order.rank >= 0 && order.block <= b));
  __syncwarp();
  asm volatile("cp.async.wait_group 0;\n" ::: "memory");  // a lane reads only what it copied itself

  float pending[3][P][V];  // left subtrees of 1, 2 and 4 blocks that wait for their right sibling
  int rank = 0;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
      for (int i = 0; i < V; ++i) sums[p][i] = 0.0f;
    for (; rank < end[b]; ++rank) {
      const int k = slot_at[rank];
      const float factor = weighted ? __shfl_sync(kAll, weight, k) : 1.0f;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const auto row = *reinterpret_cast<const Pack<T, V>*>(mine + k * kSlot + p * kWarp * 16);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float value = to_float(row.v[i]);
          sums[p][i] = __fadd_rn(sums[p][i], weighted ? __fmul_rn(value, factor) : value);
        }
      }
    }
#pragma unroll
    for (int level = 0; level < 3; ++level) {  // as a binary counter carries
      const bool right = (b >> level & 1) != 0;
      const bool complete = (b & ((1 << level) - 1)) == (1 << level) - 1;
      if (!complete) continue;
#pragma unroll
      for (int p = 0; p < P; ++p)
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (right) {
            sums[p][i] = __fadd_rn(pending[level][p][i], sums[p][i]);
          } else {
            pending[level][p][i] = sums[p][i];
          }
        }
      if (!right) break;
    }
  }
}

template <typename T, typename TOut, int V, int P>
__global__ void __launch_bounds__(kThreads) tree_reduce_warp_kernel(TreeArgs args, unsigned groups) {
  extern __shared__ __align__(16) unsigned char stages[];
  const int lane = threadIdx.x % kWarp, K = args.slots;
  const unsigned item = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;  // < 2^31, checked by launch()
  const unsigned token = item / groups;
  if (token >= args.tokens) return;  // the whole warp
  const int64_t m = token;
  const int d = (static_cast<int>(item - token * groups) * P * kWarp + lane) * V;

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
  const int inside = d >= args.hidden ? 0 : min(P, ceil_div(args.hidden - d, kWarp * V));
  auto row_of = [&](int slot) {
    return rows + static_cast<int64_t>(__shfl_sync(0xffffffffu, row, slot)) * args.hidden;
  };
  float sums[P][V];
  staged_tree_sums<T, V, P>(
      stages + threadIdx.x / kWarp * stage_bytes(K, P), present, id, weight, args.weights_MK != nullptr, K, args.blocks,
      args.num_experts, inside, row_of, sums);
#pragma unroll
  for (int p = 0; p < P; ++p)
    if (p < inside) store<T, TOut, V>(args, sums[p], m * args.hidden + d + p * kWarp * V);
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

template <typename T, typename TOut, int P>
void launch_warps(const TreeArgs& args, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const int groups = ceil_div(args.hidden, P * kVector * kWarp);
  const int64_t grid = ceil_div<int64_t>(args.tokens * groups, kThreads / kWarp);
  STD_TORCH_CHECK(
      grid <= INT32_MAX / (kThreads / kWarp), "tree_reduce: ", args.tokens, " tokens of ", args.hidden,
      " elements need more than 2^31 warps; reduce fewer tokens at a time");
  const int64_t shared = stage_bytes(args.slots, P) * (kThreads / kWarp);
  const auto kernel = tree_reduce_warp_kernel<T, TOut, kVector, P>;
  allow_shared_memory(kernel, shared);
  // Rows pass L1 by: all of it may be shared memory, which decides how many blocks fit.
  STD_CUDA_CHECK(cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
      cudaSharedmemCarveoutMaxShared));
  kernel<<<static_cast<int>(grid), kThreads, shared, stream>>>(args, static_cast<unsigned>(groups));
}

template <typename T, typename TOut>
void launch(const TreeArgs& args, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (args.hidden % kVector == 0 && args.blocks <= 8 && args.slots <= kWarp) {
    if (args.hidden > kVector * kWarp && args.slots <= kWarp / 2) {
      launch_warps<T, TOut, 2>(args, stream);
    } else {
      launch_warps<T, TOut, 1>(args, stream);
    }
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
  const Tensor rows = dense(rows_in);
  const Tensor row_MK = dense(row_in);
  const Tensor ids_MK = dense(ids_in);
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
    weights = dense(*weights_in);
    check_tensor(*weights, "weights_MK", ScalarType::Float, 2);
  }
  if (add_in.has_value()) {
    add = dense(*add_in);
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
