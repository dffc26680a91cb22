// The gate GEMM and the router's forward in one kernel (Hopper): logits leave the block only if somebody wants them.
//
// A block computes the logits of TOKENS rows and all experts, transposed, as weight @ x^T: experts are the 64-row side of wgmma, one
// warpgroup each, and the number of tokens is free. One warp feeds a ring of shared-memory stages by TMA. The accumulators go to
// shared memory over the ring, row by row, and all 16 warps route from there with the code of the lean router. Of few tokens, SLICES
// blocks of a cluster sum a part of the columns each, add up through distributed shared memory, and route a part of the rows each.
#pragma once

#include "router_fwd_lean.cuh"

#include <cuda.h>

namespace moe_layer::router {

struct Gate {
  FloatArray bias;  // of the gate, [E]; null: none
  float* logits;    // [T, E], or null: nobody wants them
  int steps;        // of 64 columns, of all slices together
};

constexpr int kGateThreads = 512, kGateWarps = kGateThreads / kWarp;
constexpr int kGateColumns = 64;  // of a stage: 128 bytes, the width of the swizzle

// EXPERTS is E rounded up: 64 or 128.
template <int EXPERTS, int TOKENS>
struct GateTile {
  static constexpr int kMultipliers = EXPERTS / 64 * 4;  // warps
  static constexpr int kWeightBytes = EXPERTS * kGateColumns * 2;
  static constexpr int kStageBytes = kWeightBytes + TOKENS * kGateColumns * 2;
  // Beside the ring stand the router's buffers, with everything asked for 35 KiB at 64 experts (8 rows a warp), 23 at 128.
  static constexpr int kFit = (EXPERTS == 64 ? 176 : 192) * 1024 / kStageBytes, kStages = kFit < 8 ? kFit : 8;
  static_assert(kMultipliers < kGateWarps, "the last warp feeds the ring");
};

// Rows in shared memory, the first of them token `first`.
struct TileRows {
  static constexpr bool kWide = true, kGlobal = false;
  const float* tile;
  int64_t first;
  int stride, experts;

  struct Near {
    const float* data;
    int stride, experts;

    __device__ __forceinline__ float at(int row, int expert) const { return data[row * stride + expert]; }

    template <int L, int C>
    __device__ __forceinline__ void load(int row, bool live, int gl, float (&x)[C * 8]) const {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int e = Layout<L, C>::first(c, gl);
        const float4* from = reinterpret_cast<const float4*>(data + row * stride + e);
        float4 low = make_float4(kPad, kPad, kPad, kPad), high = low;
        if (live && e < experts) low = from[0], high = from[1];
        x[8 * c] = low.x, x[8 * c + 1] = low.y, x[8 * c + 2] = low.z, x[8 * c + 3] = low.w;
        x[8 * c + 4] = high.x, x[8 * c + 5] = high.y, x[8 * c + 6] = high.z, x[8 * c + 7] = high.w;
      }
    }
  };

  __device__ __forceinline__ Near from(int64_t row) const {
    return {tile + static_cast<int>(row - first) * stride, stride, experts};
  }

  __device__ __forceinline__ float at(int64_t row, int expert) const { return from(row).at(0, expert); }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  }
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// A box of 64 columns and as many rows as the map says, from column and row, to shared memory.
__device__ __forceinline__ void fetch_box(const CUtensorMap* map, uint32_t to, uint32_t barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// Four floats at the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ float4 load_from_block(const float* at, int rank) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(at)), "r"(rank)
      : "memory");
  return v;
}

// Starts a copy from shared to global memory, in units of 16 bytes; `wait_for_copies` before the shared memory is given back.
__device__ __forceinline__ void copy_out(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// wgmma's description of a tile in shared memory: rows of 128 bytes, 8 of them swizzled together (1024 bytes apart).
__device__ __forceinline__ uint64_t describe_tile(uint32_t address) {
  return static_cast<uint64_t>(address >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

#define MOE_REGISTERS_32                                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define MOE_REGISTERS_64                                                                                       \
  MOE_REGISTERS_32                                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52," \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MOE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOE_D16(i) MOE_D4(i), MOE_D4(i + 4), MOE_D4(i + 8), MOE_D4(i + 12)

// d[64, N] += a[64, 16] @ b[N, 16]^T by a warpgroup.
template <int N>
__device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b) {
  if constexpr (N == 64) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MOE_REGISTERS_32 "}, %32, %33, 1, 1, 1, 0, 0;"
                 : MOE_D16(0), MOE_D16(16)
                 : "l"(a), "l"(b));
  } else {
    static_assert(N == 128, "tokens of a block");
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MOE_REGISTERS_64
                 "}, %64, %65, 1, 1, 1, 0, 0;"
                 : MOE_D16(0), MOE_D16(16), MOE_D16(32), MOE_D16(48)
                 : "l"(a), "l"(b));
  }
}

#endif

template <int L, int C, int MODE, int EXPERTS, int TOKENS, int SLICES, int TASK>
__global__ void __launch_bounds__(kGateThreads, 1) gate_kernel(
    const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
    const __grid_constant__ Forward p, const __grid_constant__ Gate g, const LeanShape shape) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Tile = GateTile<EXPERTS, TOKENS>;
  extern __shared__ uint8_t raw[];
  __shared__ typename LeanMemory<kGateThreads>::Scratch scratch;
  __shared__ __align__(8) uint64_t barriers[2 * Tile::kStages];
  uint8_t* aligned = raw + (1024 - shared_address(raw) % 1024) % 1024;
  const uint32_t ring = shared_address(aligned), full = shared_address(barriers), empty = full + 8 * Tile::kStages;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // Over the ring: [TOKENS, stride], a stride with which a warp's stores meet no bank twice.
  float* tile = reinterpret_cast<float*>(aligned);
  const int stride = p.experts + 4, slice = blockIdx.x % SLICES;
  const LeanMemory<kGateThreads> memory(
      p, reinterpret_cast<int32_t*>(aligned + Tile::kStages * Tile::kStageBytes), scratch);

  cudaTriggerProgrammaticLaunchCompletion();  // router_finish.cu may get ready
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, Tile::kMultipliers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  memory.clear(p);
  __syncthreads();
  cudaGridDependencySynchronize();  // this kernel was launched beside the one before it in the stream
  if (MODE == kSigmoidKeyed) memory.load_bias(p, Layout<L, C>::kBucket);

  const int first_step = slice * g.steps / SLICES, steps = (slice + 1) * g.steps / SLICES - first_step;
  const int first_token = blockIdx.x / SLICES * TOKENS;
  float acc[TOKENS / 2] = {};
  if (warp < Tile::kMultipliers) {
    int stage = 0, before = 0, parity = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      barrier_wait(full + 8 * stage, parity);
      const uint32_t at = ring + stage * Tile::kStageBytes;
      const uint64_t a = describe_tile(at + warp / 4 * 64 * kGateColumns * 2),
                     b = describe_tile(at + Tile::kWeightBytes);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < kGateColumns / 16; ++k) {  // 16 columns are 32 bytes on, in units of 16
        multiply<TOKENS>(acc, a + 2 * k, b + 2 * k);
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // the step before has been read
      if (step > 0 && lane == 0) barrier_arrive(empty + 8 * before);
      before = stage;
      if (++stage == Tile::kStages) stage = 0, parity ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  } else if (warp == kGateWarps - 1) {
    int stage = 0, parity = 1;
    for (int step = 0; step < steps && lane == 0; ++step) {
      const uint32_t to = ring + stage * Tile::kStageBytes, barrier = full + 8 * stage;
      const int column = (first_step + step) * kGateColumns;
      barrier_wait(empty + 8 * stage, parity);
      barrier_expect(barrier, Tile::kStageBytes);
      fetch_box(&x_map, to + Tile::kWeightBytes, barrier, column, first_token);
      fetch_box(&weight_map, to, barrier, column, 0);
      if (++stage == Tile::kStages) stage = 0, parity ^= 1;
    }
    __syncwarp();
  }
  __syncthreads();  // the ring has been read

  if (warp < Tile::kMultipliers) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = warp * 16 + half * 8 + lane / 4;
      if (e >= p.experts) continue;
      const float bias = g.bias.data != nullptr && slice == 0 ? load_float(g.bias, e) : 0.0f;
      float* to = tile + lane % 4 * 2 * stride + e;
#pragma unroll
      for (int j = 0; j < TOKENS / 8; ++j) {
        to[8 * j * stride] = acc[4 * j + 2 * half] + bias;
        to[(8 * j + 1) * stride] = acc[4 * j + 2 * half + 1] + bias;
      }
    }
  }
  constexpr int kRows = TOKENS / SLICES;  // that this block routes
  const int64_t first_row = first_token + slice * kRows;
  float* rows = tile + slice * kRows * stride;
  if (SLICES > 1) {
    cluster_arrive();
    cluster_wait();
    for (int row = warp; row < kRows; row += kGateWarps) {
      for (int e = 4 * lane; e < p.experts; e += 4 * kWarp) {
        float4* here = reinterpret_cast<float4*>(rows + row * stride + e);
        float4 sum = *here;
#pragma unroll
        for (int other = 1; other < SLICES; ++other) {
          const float4 more = load_from_block(rows + row * stride + e, slice ^ other);
          sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        *here = sum;
      }
    }
    cluster_arrive();  // the other blocks' tiles have been read
  }
  if (g.logits != nullptr) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const int row_of_lane = warp * (kRows / kGateWarps) + lane;
  const bool copies = g.logits != nullptr && lane < kRows / kGateWarps && first_row + row_of_lane < p.tokens;
  if (copies) {
    copy_out(g.logits + (first_row + row_of_lane) * p.experts, rows + row_of_lane * stride, p.experts * 4);
  }

  const int64_t all = (p.tokens + shape.rows - 1) / shape.rows, begin = first_row / shape.rows;
  const int64_t end = begin + kRows / shape.rows;
  lean_block<L, C, MODE, TileRows, kGateThreads, TASK>(
      p, shape, {rows, first_row, stride, p.experts}, memory, {begin, end < all ? end : all});
  if (copies) wait_for_copies();
  if (SLICES > 1) cluster_wait();
#endif
}

}  // namespace moe_layer::router
