// The way home: what the sending and the receiving half share. See ep_reduce_push.cu and ep_home.cu.
#pragma once

#include "ep.cuh"
#include "tree.cuh"

namespace moe_layer {

enum WireDtype : int32_t { kWireFloat = 0, kWireBfloat16 = 1, kWireHalf = 2 };

__host__ __device__ constexpr int64_t wire_bytes(int32_t dtype) { return dtype == kWireFloat ? 4 : 2; }

// V elements from or to memory of a dtype known at run time; the branch is the same in the whole grid.
template <int V>
__device__ __forceinline__ void load_wire(const void* at, int32_t dtype, int64_t element, float (&value)[V]) {
  auto read = [&](auto zero) {
    using T = decltype(zero);
    const auto pack = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(at) + element);
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = to_float(pack.v[i]);
  };
  if (dtype == kWireFloat) {
    read(float{});
  } else if (dtype == kWireBfloat16) {
    read(__nv_bfloat16{});
  } else {
    read(__half{});
  }
}

template <int V>
__device__ __forceinline__ void store_wire(void* at, int32_t dtype, int64_t element, const float (&value)[V]) {
  auto write = [&](auto zero) {
    using T = decltype(zero);
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.v[i] = from_float<T>(value[i]);
    *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(at) + element) = pack;
  };
  if (dtype == kWireFloat) {
    write(float{});
  } else if (dtype == kWireBfloat16) {
    write(__nv_bfloat16{});
  } else {
    write(__half{});
  }
}

// V elements of a two-byte wire dtype as they lie there, and their values.
template <int V>
__device__ __forceinline__ Pack<uint16_t, V> wire_pack(const void* row, int element) {
  return *reinterpret_cast<const Pack<uint16_t, V>*>(static_cast<const uint16_t*>(row) + element);
}

template <int V>
__device__ __forceinline__ void widen(const Pack<uint16_t, V>& raw, int32_t dtype, float (&value)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    value[i] = dtype == kWireBfloat16 ? __uint_as_float(static_cast<uint32_t>(raw.v[i]) << 16)
                                      : __half2float(__ushort_as_half(raw.v[i]));
  }
}

template <int V>
__device__ __forceinline__ void round_to_wire(int32_t dtype, float (&value)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (dtype == kWireBfloat16) value[i] = to_float(from_float<__nv_bfloat16>(value[i]));
    if (dtype == kWireHalf) value[i] = to_float(from_float<__half>(value[i]));
  }
}

struct PartialArgs {
  const void* rows;  // [N, D], or [C, D] when compact
  const int32_t* row_CK;
  const int32_t* ids_CK;
  const int32_t* base_R1;
  const float* probs_N;
  int64_t num_rows;
  int32_t num_compact, slots, hidden, num_experts, tree_blocks, wire;
  int32_t first_block, own_blocks;  // of the tree: this rank's subtree, or the whole tree where ranks do not divide it
  bool compact;
};

// The slots of one compact row in tree order: lane i holds the i-th slot's row and block.
struct SlotList {
  int row = 0, block = 0, count = 0;
};

// The whole warp calls it.
__device__ __forceinline__ SlotList list_slots(const PartialArgs& args, int64_t c) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % kWarp;
  if (args.compact) return {static_cast<int>(c), 0, 1};
  int row = -1, id = 0;
  if (lane < args.slots && c < args.num_compact) {
    row = args.row_CK[c * args.slots + lane];
    id = args.ids_CK[c * args.slots + lane];
    if (row >= args.num_rows) row = -1;
  }
  const SlotOrder order = order_slots(row >= 0, id, args.slots, args.tree_blocks, args.num_experts);
  int from = 0;
  for (int i = 0; i < order.count; ++i) {
    const int slot = __ffs(__ballot_sync(kAll, order.rank == i)) - 1;
    if (lane == i) from = slot;
  }
  return {__shfl_sync(kAll, row, from), __shfl_sync(kAll, order.block, from) - args.first_block, order.count};
}

// Sums over the rows of one compact row, piece after piece of 32 * V columns; the next piece's loads are in flight while
// this one's rows are added. A result of the tree is never -0, so an absent block may be added as +0: kBlocks running
// sums, one a block of the tree, joined pairwise by straight-line code. (TreeStack skips them instead, by branches, which
// these kernels have too few warps to hide.)
template <typename T, int V, int kBlocks>
struct PartialRow {
  static constexpr int kAhead = 6;
  const SlotList list;
  const int hidden;
  unsigned codes = 0;  // the blocks of the first rows, four bits each
  const T* from[kAhead];
  const T* rows;
  Pack<T, V> ahead[kAhead];

  __device__ __forceinline__ PartialRow(const PartialArgs& args, const SlotList& list, int piece)
      : list(list), hidden(args.hidden), rows(static_cast<const T*>(args.rows)) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      codes |= static_cast<unsigned>(__shfl_sync(0xffffffffu, list.block, i)) << (4 * i);
      from[i] = rows + static_cast<int64_t>(__shfl_sync(0xffffffffu, list.row, i)) * hidden + lane * V;
      if (i < list.count) load(ahead[i], from[i], piece);
    }
  }

  __device__ __forceinline__ void load(Pack<T, V>& into, const T* row, int piece) {
    if ((piece * kWarp + static_cast<int>(threadIdx.x) % kWarp) * V < hidden) {
      into = *reinterpret_cast<const Pack<T, V>*>(row + piece * (kWarp * V));
    }
  }

  __device__ __forceinline__ static void add(float (&sums)[kBlocks][V], const Pack<T, V>& row, unsigned block) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (block == b) {
#pragma unroll
        for (int j = 0; j < V; ++j) sums[b][j] = __fadd_rn(sums[b][j], to_float(row.v[j]));
      }
    }
  }

  // The unrounded sum of this lane's elements of `piece`; `more`: the next piece follows.
  __device__ __forceinline__ void sum(int piece, bool more, float (&total)[V]) {
    float sums[kBlocks][V] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < list.count) {
        const Pack<T, V> row = ahead[i];
        if (more) load(ahead[i], from[i], piece + 1);
        add(sums, row, codes >> (4 * i) & 15);
      }
    }
    for (int i = kAhead; i < list.count; ++i) {
      const unsigned block = __shfl_sync(0xffffffffu, list.block, i);
      const int64_t row = __shfl_sync(0xffffffffu, list.row, i);
      Pack<T, V> late{};
      load(late, rows + row * hidden + static_cast<int>(threadIdx.x) % kWarp * V, piece);
      add(sums, late, block);
    }
#pragma unroll
    for (int step = 1; step < kBlocks; step *= 2) {
#pragma unroll
      for (int b = 0; b + step < kBlocks; b += 2 * step) {
#pragma unroll
        for (int j = 0; j < V; ++j) sums[b][j] = __fadd_rn(sums[b][j], sums[b + step][j]);
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) total[j] = sums[0][j];
  }
};

// Calls body(T{}, blocks) with the rows' type and 4 running sums where this rank's part of the tree has no more, else 8.
template <typename Body>
inline void dispatch_partial(ScalarType dtype, const PartialArgs& args, Body&& body) {
  dispatch_float(dtype, "rows", [&](auto zero) {
    if (args.own_blocks <= 4) {
      body(zero, std::integral_constant<int, 4>{});
    } else {
      body(zero, std::integral_constant<int, 8>{});
    }
  });
}

PartialArgs read_partial(
    const EpTrip& trip, const Tensor& rows, const Tensor& row_index, const Tensor& ids, const Tensor& base,
    const std::optional<Tensor>& probs, int64_t wire, int64_t num_experts, int64_t tree_blocks, bool compact);

}  // namespace moe_layer
