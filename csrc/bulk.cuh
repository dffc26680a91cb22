// Copies of whole spans by the copy engine of a multiprocessor (Hopper and later), a warp at a time.
//
// What goes to a peer this way does not queue in the load and store units, whose loads otherwise wait behind stores that
// the full link holds up. Spans are multiples of 16 bytes at such addresses. One lane issues and waits: bulk groups
// belong to a thread.
#pragma once

#include "common.cuh"

namespace moe_layer {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void arrival_init(uint64_t* arrival) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrival)) : "memory");
}

// Starts a copy from global to shared memory; `arrival` completes when it is there.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes, uint64_t* arrival) {
  const unsigned at = shared_address(arrival);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(at)
               : "memory");
}

__device__ __forceinline__ void arrival_wait(uint64_t* arrival, unsigned parity) {
  const unsigned at = shared_address(arrival);
  int done = 0;
  while (done == 0) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.s32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(at), "r"(parity)
                 : "memory");
  }
}

// Starts a copy from shared to global memory, here or on a peer, as a group of its own.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// All but the last kPending stores have read their shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// All stores of this thread have been written; a fence and a flag may follow.
__device__ __forceinline__ void bulk_wait_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}

// Plain stores to shared memory before it, and a barrier after it: the copy engine sees them.
__device__ __forceinline__ void before_bulk_store() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif

// Whether the device has them, and multiprocessors with that much shared memory.
inline bool has_bulk_copies(int device, int64_t bytes) {
  int major = 0, shared = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  return major >= 9 && shared >= bytes;
}

}  // namespace moe_layer
