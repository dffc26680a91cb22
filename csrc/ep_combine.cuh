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
  int32_t parts;                    // of a row: what a warp takes at a time
  int32_t first_block, own_blocks;  // of the tree: this rank's subtree, or the whole tree where ranks do not divide it
  bool compact;
};

// The slots of one compact row in tree order: lane i holds the i-th slot's row and block.
struct SlotList {
  int row = 0, block = 0, count = 0;

  __device__ __forceinline__ const unsigned char* address(const PartialArgs& args, int64_t row_bytes) const {
    return static_cast<const unsigned char*>(args.rows) + row * row_bytes;
  }
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

// Threads of these kernels. 64 registers a thread, so that a block of each half of the way home fits on a multiprocessor.
constexpr int kMostWarps = 16;

// What a warp reads of several rows, in flight through shared memory. A *unit* is 32 x 16 bytes of a row; units come
// piece after piece, the rows of a piece in the order of the lanes that hold their addresses. A warp has a ring of kRing
// units, all but one on their way at any time: 16 warps with 11 units are 80 KiB a multiprocessor, where 2 us of latency
// under load at 3 TB/s over 132 multiprocessors need 46. A lane reads only what it copied itself.
constexpr int kUnit = kWarp * 16;

// Shared memory of a warp: the ring of the sending half; at home a ring, and room for the sums of the own rows.
constexpr int kPushRing = 11, kHomeRing = 9, kHeldBytes = 7 * kUnit;
constexpr int kPushBytes = kPushRing * kUnit, kHomeBytes = kHomeRing * kUnit + kHeldBytes;

template <int kRing>
class RowStream {
  static constexpr int kRingBytes = kRing * kUnit;

 public:
  // The whole warp calls it. Lane i < count passes the start of row i; every row has `bytes` bytes, whole units of 16.
  // The pieces [begin, end) will be read, each of its `count` rows by one `next`.
  __device__ __forceinline__
  RowStream(unsigned char* ring, const unsigned char* row, int count, int bytes, int begin, int end)
      : lane_(ring + threadIdx.x % kWarp * 16),
        row_(reinterpret_cast<uint64_t>(row)),
        count_(count),
        at_(begin * kUnit + static_cast<int>(threadIdx.x) % kWarp * 16),
        bytes_(bytes),
        left_(count * (end - begin)) {
#pragma unroll 1
    for (int i = 0; i < kRing - 1; ++i) copy();
  }

  // This lane's 16 bytes of the next unit; past the row's end they are anything.
  template <typename Unit>
  __device__ __forceinline__ Unit next() {
    static_assert(sizeof(Unit) == 16);
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kRing - 2) : "memory");
    const Unit unit = *reinterpret_cast<const Unit*>(lane_ + out_);
    out_ = out_ + kUnit == kRingBytes ? 0 : out_ + kUnit;
    copy();
    return unit;
  }

 private:
  __device__ __forceinline__ void copy() {
    if (left_ > 0) {
      const uint64_t row = __shfl_sync(0xffffffffu, row_, row_index_);
      if (at_ < bytes_) copy_16_async(lane_ + in_, reinterpret_cast<const unsigned char*>(row) + at_);
      in_ = in_ + kUnit == kRingBytes ? 0 : in_ + kUnit;
      if (++row_index_ == count_) row_index_ = 0, at_ += kUnit;
      --left_;
    }
    asm volatile("cp.async.commit_group;\n" ::: "memory");  // an empty one keeps the count
  }

  unsigned char* const lane_;
  const uint64_t row_;
  const int count_;
  int at_;  // byte of the row that this lane copies next
  const int bytes_;
  int left_, row_index_ = 0, in_ = 0, out_ = 0;
};

// Where the blocks of a list end: its first end[b] rows belong to blocks 0 ... b.
template <int kBlocks>
struct BlockEnds {
  int end[kBlocks];

  __device__ __forceinline__ explicit BlockEnds(const SlotList& list) {
    const bool mine = static_cast<int>(threadIdx.x) % kWarp < list.count;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) end[b] = __popc(__ballot_sync(0xffffffffu, mine && list.block <= b));
  }
};

// The unrounded sum, in the order of the tree, of the next units of the stream: one of each row of the list. A result of
// the tree is never -0, so that an absent block may be added as +0.
template <typename T, int V, int kRing, int kBlocks>
__device__ __forceinline__ void sum_rows(RowStream<kRing>& stream, const BlockEnds<kBlocks>& blocks, float (&sum)[V]) {
  constexpr int kLevels = kBlocks == 8 ? 3 : 2;
  static_assert(kBlocks == 1 << kLevels && sizeof(Pack<T, V>) == 16);
  float pending[kLevels][V];
  int i = 0;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = 0.0f;
    for (; i < blocks.end[b]; ++i) {
      const auto row = stream.template next<Pack<T, V>>();
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] = __fadd_rn(sum[j], to_float(row.v[j]));
    }
    carry<V, kLevels>(pending, b, sum);
  }
}

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

// Warps of a block: both halves of the way home, which run side by side and wait for each other's peers, must fit on a
// multiprocessor (of which each block reserves 1 KiB).
inline int choose_warps(int device) {
  int bytes = 0, warps = kMostWarps;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  while (warps > 1 && bytes < warps * (kPushBytes + kHomeBytes) + 4096) warps /= 2;
  return warps;
}

template <typename Kernel>
inline void allow_rings(Kernel kernel, int bytes) {
  allow_shared_memory(kernel, bytes);
  prefer_shared_memory(kernel);
}

PartialArgs read_partial(
    const EpTrip& trip, const Tensor& rows, const Tensor& row_index, const Tensor& ids, const Tensor& base,
    const std::optional<Tensor>& probs, int64_t wire, int64_t num_experts, int64_t tree_blocks, bool compact);

}  // namespace moe_layer
