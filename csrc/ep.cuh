// Trips of rows between windows, as device functions: the twin of `_Trip` in moe_layer/ops/ep.py, which describes the
// protocol. Unless it says otherwise a function is for whole blocks: all threads call, and all get the same answer.
//
// Memory order. The warps of a chunk write its rows, then count themselves in shared memory; the last one publishes by a
// release store of the flag, which is cumulative over what the count and its fences ordered before it. One thread
// of the readers (a warp or a block) polls with acquire loads; they meet and read with plain loads or asynchronous
// copies. Where several blocks contribute, `last_block` elects the one that saw all the others' fences.
//
// A kernel that waits must leave room for the kernels it waits for, which run on the same multiprocessors of the peers
// and on their own stream here. Per multiprocessor, the kernels of one direction share the registers: ep_push 1/4 and
// ep_take 3/4 (with fp8 1/2 and 1/2), ep_reduce_push 1/2 and ep_home 1/2, which share its shared memory too. A kernel
// that waits also asks for a multiprocessor set to as much shared memory as it can have (prefer_shared_memory), whether
// it needs some or not: how much is set when the multiprocessor is idle, and the sender, which may come later, needs it.
#pragma once

#include "common.cuh"

namespace moe_layer {

constexpr int kTripWords = 20, kCompared = 6, kStateHead = 8, kSlotWords = 8, kHeaderBytes = 64, kMostRanks = 32;
enum EpError : int32_t { kTimeout = 1, kMismatch = 2, kBadCount = 3, kOverflow = 4, kPeerOverflow = 5, kGaveUp = 6 };
enum EpCounter : int32_t { kSent = 0, kReceived = 1, kSendTicket = 2, kMetaTicket = 3, kReceiveTicket = 4 };

struct EpTrip {
  const int64_t* peers;
  int32_t* state;
  int32_t ranks, me;
  int64_t flags, credit, header, meta, data, meta_block, data_block, fault, deadline_ns, width;
  int32_t max_rows, chunk_rows, max_chunks, counters;
  int32_t compared[kCompared];  // width, layer, phase, step, config, magic

  __device__ uint8_t* window(int peer) const { return reinterpret_cast<uint8_t*>(peers[peer]); }
  __device__ uint32_t* word(int peer, int64_t offset, int64_t index) const {
    return reinterpret_cast<uint32_t*>(window(peer) + offset) + index;
  }
  __device__ uint32_t* flag(int peer, int source, int64_t chunk) const {
    return word(peer, flags, static_cast<int64_t>(source) * max_chunks + chunk);
  }
  __device__ uint8_t* rows(int peer, int source) const { return window(peer) + data + source * data_block; }
  __device__ int32_t* words(int peer, int source) const {
    return reinterpret_cast<int32_t*>(window(peer) + meta + source * meta_block);
  }
  // How many slots of each of the peer's experts the source sends: the last pairs of its block.
  __device__ uint64_t* expert_counts(int peer, int source, int num_local) const {
    return reinterpret_cast<uint64_t*>(words(peer, source) + meta_block / 4) - num_local;
  }
  __device__ uint64_t* head(int peer, int source) const {
    return reinterpret_cast<uint64_t*>(window(peer) + header + source * kHeaderBytes);
  }
  // Of a dense push: the source's words are there. The last word of its header.
  __device__ uint32_t* words_ready(int peer, int source) const {
    return reinterpret_cast<uint32_t*>(head(peer, source)) + kHeaderBytes / 4 - 1;
  }
  __device__ uint32_t epoch(EpCounter which) const { return static_cast<volatile int32_t*>(state)[counters + which]; }
  __device__ bool failed() const { return static_cast<volatile int32_t*>(state)[0] != 0; }
  // `field`: which of the compared words.
  __device__ void report(int32_t code, int peer, int32_t wanted, int32_t seen, int32_t field = 0) const {
    if (atomicCAS(state, 0, code) != 0) return;  // the first report stays
    const int32_t text[7] = {peer, wanted, seen, compared[2], compared[1], compared[3], field};
    for (int i = 0; i < 7; ++i) state[1 + i] = text[i];
  }
};

__device__ __forceinline__ uint32_t load_acquire_sys(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ void store_release_sys(uint32_t* at, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ __forceinline__ uint64_t now_ns() {
  uint64_t value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
  return value;
}

// What this rank found concerns all: peers that wait for it need not wait for their deadline.
__device__ inline void report_overflow(const EpTrip& trip, int32_t wanted, int32_t rows) {
  trip.report(kOverflow, trip.me, wanted, rows);
  for (int peer = 0; peer < trip.ranks; ++peer) store_release_sys(trip.word(peer, trip.fault, trip.me), kOverflow);
}

// One thread waits until what it loads has reached the epoch (epochs wrap); false after the deadline or anybody's failure.
template <typename Load>
__device__ __forceinline__ bool spin_until(const EpTrip& trip, uint32_t epoch, uint64_t until, int peer, Load&& load) {
  for (int turn = 1;; ++turn) {
    const uint32_t seen = load();
    if (static_cast<int32_t>(seen - epoch) >= 0) return true;
    if (turn % 64 == 0) {
      if (trip.failed()) return false;
      if (load_acquire_sys(trip.word(trip.me, trip.fault, peer)) != 0) {
        trip.report(kPeerOverflow, peer, static_cast<int32_t>(epoch), static_cast<int32_t>(seen));
        return false;
      }
      if (now_ns() > until) {
        trip.report(kTimeout, peer, static_cast<int32_t>(epoch), static_cast<int32_t>(seen));
        return false;
      }
    }
    __nanosleep(32);
  }
}

__device__ inline bool spin(const EpTrip& trip, const uint32_t* at, uint32_t epoch, uint64_t until, int peer) {
  return spin_until(trip, epoch, until, peer, [&] { return load_acquire_sys(at); });
}

// Headers and counts are pairs of a value and its epoch, 8 bytes that are written and read as one. So they need no fence,
// which would wait for all the rows that leave at the same time: 20 us behind a full link, on an H200.
__device__ __forceinline__ void store_pair(uint64_t* at, uint32_t epoch, int32_t value) {
  const uint64_t pair = static_cast<uint64_t>(epoch) << 32 | static_cast<uint32_t>(value);
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(pair) : "memory");
}

__device__ inline bool spin_pair(
    const EpTrip& trip, const uint64_t* at, uint32_t epoch, uint64_t until, int peer, int32_t& value) {
  uint64_t pair;
  const bool ok = spin_until(trip, epoch, until, peer, [&] {
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(pair) : "l"(at) : "memory");
    return static_cast<uint32_t>(pair >> 32);
  });
  value = static_cast<int32_t>(pair);
  return ok;
}

// Every peer has read what was sent through the slot before.
__device__ inline bool wait_credits(const EpTrip& trip, uint64_t until) {
  bool ok = !trip.failed();
  const int peer = threadIdx.x;
  if (ok && peer < trip.ranks) {
    ok = spin(trip, trip.word(trip.me, trip.credit, peer), trip.epoch(kSent), until, peer);
  }
  return __syncthreads_and(ok);
}

// All headers are there and agree with this rank's; counts[ranks] (shared memory) are the rows that each peer sends.
__device__ inline bool wait_headers(const EpTrip& trip, uint64_t until, int32_t* counts) {
  constexpr int kFields = kCompared + 1;
  const uint32_t epoch = trip.epoch(kReceived) + 1;
  bool ok = !trip.failed();
  for (int i = threadIdx.x; ok && i < trip.ranks * kFields; i += blockDim.x) {
    const int peer = i / kFields, field = i % kFields;
    int32_t seen;
    ok = spin_pair(trip, trip.head(trip.me, peer) + field, epoch, until, peer, seen);
    if (!ok) break;
    if (field < kCompared) {
      if (seen != trip.compared[field]) {
        trip.report(kMismatch, peer, trip.compared[field], seen, field);
        ok = false;
      }
    } else {
      counts[peer] = seen;
      if (seen < 0 || seen > trip.max_rows) {
        trip.report(kBadCount, peer, trip.max_rows, seen);
        ok = false;
      }
    }
  }
  return __syncthreads_and(ok);
}

// This rank's header, by one thread of each peer.
__device__ inline void write_header(const EpTrip& trip, uint32_t epoch, int peer, int32_t count) {
  uint64_t* head = trip.head(peer, trip.me);
  for (int i = 0; i < kCompared; ++i) store_pair(head + i, epoch, trip.compared[i]);
  store_pair(head + kCompared, epoch, count);
}

// One thread, after all that wrote the chunk's rows: publishes them.
__device__ inline void publish(const EpTrip& trip, int peer, int64_t chunk, uint32_t epoch) {
  store_release_sys(trip.flag(peer, trip.me, chunk), epoch);
}

// Warps that write chunks together. They do not meet: behind a full link a system fence takes 20 us, on an H200, and only
// the warp that came last waits for it. `counts` (kArrivals words of shared memory, zeros) serve chunks n in turn.
constexpr int kArrivals = 8;

// One of the `parts` parts of the block's n-th chunk is written. The whole warp calls it; who comes last publishes.
__device__ inline void finish_part(
    const EpTrip& trip, int32_t* counts, int n, int parts, int peer, int64_t chunk, uint32_t epoch) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) {
    __threadfence_block();
    const int before = n / kArrivals * parts;
    int32_t* count = counts + n % kArrivals;
    while (*static_cast<volatile int32_t*>(count) < before) __nanosleep(32);  // a warp is kArrivals chunks behind
    if (atomicAdd(count, 1) == before + parts - 1) {
      __threadfence_block();
      publish(trip, peer, chunk, epoch);
    }
  }
  __syncwarp();
}

// The next number from a counter in shared memory, for the whole warp.
__device__ __forceinline__ int claim(int32_t* next) {
  int item = 0;
  if (threadIdx.x % kWarp == 0) item = atomicAdd(next, 1);
  return __shfl_sync(0xffffffffu, item, 0);
}

// True in the last of the `blocks` blocks that call it; what the others wrote before is then visible to its threads. The
// answer travels in the barrier: in a shared word racecheck saw the read before the write, with a barrier between them.
__device__ inline bool last_block(const EpTrip& trip, EpCounter ticket, int blocks) {
  bool last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    int32_t* at = trip.state + trip.counters + ticket;
    last = atomicAdd(at, 1) == blocks - 1;
    if (last) *at = 0;
    __threadfence();
  }
  return __syncthreads_or(last) != 0;
}

// The end of a receiving kernel: the slot may be overwritten.
__device__ inline void give_credits(const EpTrip& trip) {
  const uint32_t epoch = trip.epoch(kReceived) + 1;
  __syncthreads();
  if (threadIdx.x < trip.ranks) {
    store_release_sys(trip.word(threadIdx.x, trip.credit, trip.me), epoch);
  }
  if (threadIdx.x == 0) trip.state[trip.counters + kReceived] = static_cast<int32_t>(epoch);
}

// All bits set: a NaN in every floating dtype. The block that met the failure does it alone, for the whole output: the
// others may be elsewhere, and what they write is right.
__device__ inline void poison(void* out, int64_t bytes) {
  const uint4 bits = {~0u, ~0u, ~0u, ~0u};
  uint4* wide = static_cast<uint4*>(out);
  for (int64_t i = threadIdx.x; i < bytes / 16; i += blockDim.x) wide[i] = bits;
  for (int64_t i = bytes / 16 * 16 + threadIdx.x; i < bytes; i += blockDim.x) static_cast<uint8_t*>(out)[i] = 0xFF;
}

// The q-th (peer, chunk) of a rank that sends to all others in turn, nearest first, so that no link is hit by all.
__device__ __forceinline__ void nth_chunk(const EpTrip& trip, int64_t q, int& peer, int64_t& chunk) {
  const int others = trip.ranks - 1;
  chunk = q / others;
  peer = (trip.me + 1 + static_cast<int>(q - chunk * others)) % trip.ranks;
}

template <typename Kernel>
inline void prefer_shared_memory(Kernel kernel) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
      cudaSharedmemCarveoutMaxShared));
}

EpTrip read_trip(const Tensor& peers, Tensor& state, const Tensor& words);

// A row's words are its token, K experts, K places, K weights; behind those of all rows a count for each local expert.
inline void check_words_fit(const EpTrip& trip, int64_t slots, int64_t num_local) {
  STD_TORCH_CHECK(
      trip.max_rows * 4 * (1 + 3 * slots) + 8 * num_local <= trip.meta_block, "the window has no room for ",
      1 + 3 * slots, " words a row and ", num_local, " counts");
}

// Rows of this trip as they are outside of the window, or, with fp8, bf16 rows of which it carries the encoding.
inline void check_width(const EpTrip& trip, const Tensor& rows, const char* name, bool fp8) {
  const int64_t columns = rows.size(1), bytes = columns * static_cast<int64_t>(rows.element_size());
  if (!fp8) {
    STD_TORCH_CHECK(bytes == trip.width, name, " must be ", trip.width, " bytes wide, got ", bytes);
    return;
  }
  STD_TORCH_CHECK(
      rows.scalar_type() == ScalarType::BFloat16 && columns % 128 == 0, name,
      " must be bf16 in whole blocks of 128 columns, got ", columns, " columns");
  STD_TORCH_CHECK(
      round_up<int64_t>(columns + columns / 32, 16) == trip.width, name, " do not encode to ", trip.width, " bytes");
}

}  // namespace moe_layer
