// The way home: what the sending and the receiving half share. See ep_reduce_push.cu and ep_home.cu.
#pragma once

#include "ep.cuh"
#include "tree.cuh"

namespace moe_layer {

enum WireDtype : int32_t { kWireFloat = 0, kWireBfloat16 = 1, kWireHalf = 2 };

inline int64_t wire_bytes(int32_t dtype) { return dtype == kWireFloat ? 4 : 2; }

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
  bool compact;
};

// The sum of compact row c's rows over V elements from `d`, unrounded. The whole warp calls it.
template <typename T, int V>
__device__ __forceinline__ void partial_sum(const PartialArgs& args, int64_t c, int d, float (&sum)[V]) {
  const int lane = threadIdx.x % kWarp;
  const bool inside = d < args.hidden;
  const T* rows = static_cast<const T*>(args.rows) + d;
  if (args.compact) {
    if (inside)
      load_wire<V>(
          rows,
          sizeof(T) == 4              ? kWireFloat
          : std::is_same_v<T, __half> ? kWireHalf
                                      : kWireBfloat16,
          c * args.hidden, sum);
    return;
  }
  int row = -1, id = 0;
  if (lane < args.slots && c < args.num_compact) {
    row = args.row_CK[c * args.slots + lane];
    id = args.ids_CK[c * args.slots + lane];
    if (row >= args.num_rows) row = -1;
  }
  const SlotOrder order = order_slots(row >= 0, id, args.slots, args.tree_blocks, args.num_experts);
  const auto row_of = [&](int k) {
    return rows + static_cast<int64_t>(__shfl_sync(0xffffffffu, row, k)) * args.hidden;
  };
  warp_tree_sum<T, V, 4, 8>(order, false, 1.0f, inside, row_of, sum);
}

PartialArgs read_partial(
    const EpTrip& trip, const Tensor& rows, const Tensor& row_index, const Tensor& ids, const Tensor& base,
    const std::optional<Tensor>& probs, int64_t wire, int64_t num_experts, int64_t tree_blocks, bool compact);

}  // namespace moe_layer
