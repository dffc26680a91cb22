// The sum of one token's rows in the fixed tree of docs/design.md section 3, as device functions. Used by tree_reduce.cu
// and by the expert-parallel kernels; the readable twin is moe_layer/ops/tree_reduce.py.
//
// The tree: experts are cut into `blocks` equal blocks (1, 2, 4 or 8 on the fast path; at most 128). Rows of one block are
// added in the order (expert, slot), the first one to +0; blocks are then joined pairwise, ((0+1)+(2+3))+((4+5)+(6+7)),
// where an absent slot, block or subtree is skipped and not added as zero. All of it in fp32 with the _rn intrinsics: an
// FMA would round once where the CPU reference rounds twice. A weight multiplies its row (rounded) before the addition.
//
// Three pieces, from the bottom:
//   TreeStack        the running sum: add(value, block) in ascending (block, expert, slot) order, then finish(sum).
//                    Blocks need not be single blocks of the tree: a *partial* sum over blocks [b, b + n), n a power of
//                    two dividing b, is added with any one label inside, usually b. So the home rank adds one partial
//                    of each rank with label rank * (blocks / ranks), ascending, and gets the bits of one rank.
//   order_slots      a warp ranks the K <= 32 slots of its token by (expert, slot); lane k holds slot k.
//   warp_tree_sum    both, over rows in memory: each lane sums V consecutive elements; the caller says where a slot's
//                    row lies (any address a lane can read: local, peer, shared).
//   staged_tree_sum  the same sum, faster: all rows of the token are copied to shared memory at once (cp.async) while the
//                    warp ranks them, and the tree is walked with no data-dependent register index. A sum is never -0,
//                    so that an absent block may be added as +0: skipping it gives the same bits.
#pragma once

#include "common.cuh"

namespace moe_layer {

// V elements that are loaded and stored at once; the address must be aligned to sizeof(T) * V.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// The block of an expert; `id` in [0, num_experts).
__device__ __forceinline__ int tree_block(int id, int blocks, int num_experts) {
  return static_cast<int>(static_cast<int64_t>(id) * blocks / num_experts);
}

// Partial sums of unfinished subtrees, the deepest last. kDepth: 1 + log2(blocks), at most 8.
// All threads that share a branch must add the same blocks in the same order, or the branches diverge (still correct).
template <int V, int kDepth>
struct TreeStack {
  float a[kDepth][V];
  uint64_t labels = 0;  // 7 bits a level, the top in the lowest: a block of each subtree
  int depth = 0;

  __device__ __forceinline__ int label(int below) const { return static_cast<int>(labels >> (7 * below)) & 127; }

  // Loops over constant levels keep the array in registers; the branch is uniform, so one level's work is done.
  __device__ __forceinline__ void merge_top() {
#pragma unroll
    for (int level = 1; level < kDepth; ++level) {
      if (depth == level + 1) {
#pragma unroll
        for (int i = 0; i < V; ++i) a[level - 1][i] = __fadd_rn(a[level - 1][i], a[level][i]);
      }
    }
    labels >>= 7;
    --depth;
  }

  // `block` is not below the last one.
  __device__ __forceinline__ void add(const float (&value)[V], int block) {
    if (depth > 0 && block == label(0)) {
#pragma unroll
      for (int level = 0; level < kDepth; ++level) {
        if (depth == level + 1) {
#pragma unroll
          for (int i = 0; i < V; ++i) a[level][i] = __fadd_rn(a[level][i], value[i]);
        }
      }
      return;
    }
    if (depth > 0) {
      // The new block meets the top's subtree at this height; what lies below it on the top's side is complete.
      const int height = 31 - __clz(block ^ label(0));
      while (depth > 1 && (label(1) >> height) == (label(0) >> height)) merge_top();
    }
#pragma unroll
    for (int level = 0; level < kDepth; ++level) {
      if (depth == level) {
#pragma unroll
        for (int i = 0; i < V; ++i)
          a[level][i] = __fadd_rn(0.0f, value[i]);  // 0 + x turns -0 into +0, as the reference
      }
    }
    labels = labels << 7 | static_cast<uint64_t>(block);
    ++depth;
  }

  // The whole sum; 0 when nothing was added.
  __device__ __forceinline__ void finish(float (&sum)[V]) {
    while (depth > 1) merge_top();
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = depth > 0 ? a[0][i] : 0.0f;
  }
};

// One lane's slot among its token's slots.
struct SlotOrder {
  int rank;   // place of this lane's slot by (expert, slot); -1: absent
  int count;  // present slots of the token, the same in all lanes
  int block;  // tree block of the slot's expert
};

// The whole warp calls it. Lane k < slots holds slot k: `present` and its expert `id` (global index); slots <= 32.
__device__ __forceinline__ SlotOrder order_slots(bool present, int id, int slots, int blocks, int num_experts) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % kWarp;
  present = present && lane < slots;
  const int key = present ? id : INT32_MAX;
  int rank = 0;
  for (int j = 0; j < slots; ++j) {
    const int other = __shfl_sync(kAll, key, j);
    rank += (other < key) | ((other == key) & (j < lane));
  }
  return {present ? rank : -1, __popc(__ballot_sync(kAll, present)), present ? tree_block(id, blocks, num_experts) : 0};
}

// sum[i] = the tree over the token's rows of element i, of V consecutive elements of this lane. The whole warp calls it.
//   row_of(k)  const T*: this lane's first element in slot k's row (aligned as Pack<T, V>). Called by all lanes together
//              with the same k, so it may shuffle; for k of a present slot only the result is read, where `inside`.
//   weight     this lane's slot's factor, used where `weighted` (uniform).
//   inside     false: this lane has no elements (its sum is then unspecified).
// kDepth 4 serves up to 8 blocks. kAhead rows are in flight before the first addition.
template <typename T, int V, int kDepth, int kAhead, typename RowOf>
__device__ __forceinline__ void warp_tree_sum(
    const SlotOrder& order, bool weighted, float weight, bool inside, RowOf row_of, float (&sum)[V]) {
  constexpr unsigned kAll = 0xffffffffu;
  TreeStack<V, kDepth> stack;
  for (int first = 0; first < order.count; first += kAhead) {
    Pack<T, V> ahead[kAhead];
    int from[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      from[i] = __ffs(__ballot_sync(kAll, order.rank == first + i)) - 1;
      const T* row = row_of(from[i] & 31);
      if (first + i < order.count && inside) ahead[i] = *reinterpret_cast<const Pack<T, V>*>(row);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i < order.count) {
        const int into = __shfl_sync(kAll, order.block, from[i]);
        float value[V];
#pragma unroll
        for (int j = 0; j < V; ++j) value[j] = to_float(ahead[i].v[j]);
        if (weighted) {
          const float factor = __shfl_sync(kAll, weight, from[i]);
#pragma unroll
          for (int j = 0; j < V; ++j) value[j] = __fmul_rn(value[j], factor);
        }
        stack.add(value, into);
      }
    }
  }
  stack.finish(sum);
}

// Bytes of shared memory of one warp in staged_tree_sum; a multiple of 16.
__host__ __device__ constexpr int64_t staged_tree_bytes(int64_t slots) {
  return slots * kWarp * 16 + round_up<int64_t>(slots, 16);
}

// Starts a copy of 16 bytes, global to shared memory, past L1: every row is read once.
__device__ __forceinline__ void copy_16_async(void* shared, const void* global) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(target), "l"(global) : "memory");
}

// As warp_tree_sum, for at most 8 blocks and V * sizeof(T) == 16. The whole warp calls it.
//   stage      staged_tree_bytes(slots) bytes of shared memory of this warp, aligned to 16.
//   present    lane k < slots: whether slot k has a row; `id` is its expert, `weight` its factor (used where `weighted`).
//   row_of(k)  as in warp_tree_sum; called only for present slots k, by all lanes together.
template <typename T, int V, typename RowOf>
__device__ __forceinline__ void staged_tree_sum(
    unsigned char* stage, bool present, int id, float weight, bool weighted, int slots, int blocks, int num_experts,
    bool inside, RowOf row_of, float (&sum)[V]) {
  static_assert(sizeof(Pack<T, V>) == 16);
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kBlocks = 8;
  const int lane = threadIdx.x % kWarp;
  unsigned char* mine = stage + lane * 16;  // of slot 0; slot k lies kWarp * 16 bytes further on
  for (unsigned left = __ballot_sync(kAll, present && lane < slots); left != 0; left &= left - 1) {
    const int k = __ffs(left) - 1;
    const T* row = row_of(k);
    if (inside) copy_16_async(mine + k * kWarp * 16, row);
  }
  asm volatile("cp.async.commit_group;\n" ::: "memory");

  const SlotOrder order = order_slots(present, id, slots, blocks, num_experts);
  unsigned char* slot_at = stage + slots * kWarp * 16;  // slot of each rank
  if (order.rank >= 0) slot_at[order.rank] = static_cast<unsigned char>(lane);
  int end[kBlocks];  // ranks below end[b] belong to blocks 0 ... b
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) end[b] = __popc(__ballot_sync(kAll, order.rank >= 0 && order.block <= b));
  __syncwarp();
  asm volatile("cp.async.wait_group 0;\n" ::: "memory");  // a lane reads only what it copied itself

  float pending[3][V];  // left subtrees of 1, 2 and 4 blocks that wait for their right sibling
  int rank = 0;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = 0.0f;
    for (; rank < end[b]; ++rank) {
      const int k = slot_at[rank];
      const auto row = *reinterpret_cast<const Pack<T, V>*>(mine + k * kWarp * 16);
      const float factor = weighted ? __shfl_sync(kAll, weight, k) : 1.0f;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float value = to_float(row.v[i]);
        sum[i] = __fadd_rn(sum[i], weighted ? __fmul_rn(value, factor) : value);
      }
    }
#pragma unroll
    for (int level = 0; level < 3; ++level) {  // as a binary counter carries
      const bool right = (b >> level & 1) != 0;
      const bool complete = (b & ((1 << level) - 1)) == (1 << level) - 1;
      if (!complete) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (right) {
          sum[i] = __fadd_rn(pending[level][i], sum[i]);
        } else {
          pending[level][i] = sum[i];
        }
      }
      if (!right) break;
    }
  }
}

}  // namespace moe_layer
