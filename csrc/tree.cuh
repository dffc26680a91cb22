// The sum of one token's rows in the fixed tree of docs/design.md section 3, as device functions. Used by tree_reduce.cu
// and by the expert-parallel kernels; the readable twin is moe_layer/ops/tree_reduce.py.
//
// The tree: experts are cut into `blocks` equal blocks (1, 2, 4 or 8 on the fast path; at most 128). Rows of one block are
// added in the order (expert, slot), the first one to +0; blocks are then joined pairwise, ((0+1)+(2+3))+((4+5)+(6+7)),
// where an absent slot, block or subtree is skipped and not added as zero. All of it in fp32 with the _rn intrinsics: an
// FMA would round once where the CPU reference rounds twice. A weight multiplies its row (rounded) before the addition.
//
// Pieces (tree_reduce.cu has a faster way for rows in memory of one GPU, ep_combine.cuh one for rows that arrive):
//   TreeStack        any number of blocks: add(value, block) in ascending (block, expert, slot) order, then finish(sum).
//   order_slots      a warp ranks the K <= 32 slots of its token by (expert, slot); lane k holds slot k.
//   carry            up to 8 blocks, of which absent ones are added as +0: a sum is never -0, so that skipping them gives
//                    the same bits.
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

// Joins the sum of leaf `b` of a tree of 2^kLevels leaves with the left subtrees that wait for it, as a binary counter
// carries; leaves come in ascending order, and after the last one `sum` is the total. `b` must be known when compiled.
template <int V, int kLevels>
__device__ __forceinline__ void carry(float (&pending)[kLevels][V], int b, float (&sum)[V]) {
#pragma unroll
  for (int level = 0; level < kLevels; ++level) {
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

// Starts a copy of 16 bytes, global to shared memory, past L1: every row is read once.
__device__ __forceinline__ void copy_16_async(void* shared, const void* global) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(target), "l"(global) : "memory");
}

}  // namespace moe_layer
