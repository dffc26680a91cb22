// The sum of one token's rows in the fixed tree of docs/design.md section 3, as device functions. Used by tree_reduce.cu
// and by the expert-parallel kernels; the readable twin is moe_layer/ops/tree_reduce.py.
//
// The tree: experts are cut into `blocks` equal blocks (1, 2, 4 or 8 on the fast path; at most 128). Rows of one block are
// added in the order (expert, slot), the first one to +0; blocks are then joined pairwise, ((0+1)+(2+3))+((4+5)+(6+7)),
// where an absent slot, block or subtree is skipped and not added as zero. All of it in fp32 with the _rn intrinsics: an
// FMA would round once where the CPU reference rounds twice. A weight multiplies its row (rounded) before the addition.
//
// Three pieces, from the bottom (tree_reduce.cu has a faster way for rows in memory of one GPU):
//   TreeStack        the running sum: add(value, block) in ascending (block, expert, slot) order, then finish(sum).
//                    Blocks need not be single blocks of the tree: a *partial* sum over blocks [b, b + n), n a power of
//                    two dividing b, is added with any one label inside, usually b. So the home rank adds one partial
//                    of each rank with label rank * (blocks / ranks), ascending, and gets the bits of one rank.
//   order_slots      a warp ranks the K <= 32 slots of its token by (expert, slot); lane k holds slot k.
//   warp_tree_sum    both, over rows in memory: each lane sums V consecutive elements; the caller says where a slot's
//                    row lies (any address a lane can read: local, peer, shared).
#pragma once

#include "common.cuh"

namespace moe_layer {

// V elements that are loaded and stored at once; the address must be aligned to sizeof(T) * V.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};

// The block of an expert; `id` in [0, num_experts). In 32 bits: at most 128 blocks leave room for 2^25 experts, and a 64-bit
// division costs a warp as much as the addition of three rows.
__device__ __forceinline__ int tree_block(int id, int blocks, int num_experts) {
  return static_cast<int>(
      static_cast<unsigned>(id) * static_cast<unsigned>(blocks) / static_cast<unsigned>(num_experts));
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

}  // namespace moe_layer
