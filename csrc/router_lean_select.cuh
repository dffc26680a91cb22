// Selection in the lean forward kernel: the K smallest packed keys of a row, shared by L lanes.
#pragma once

#include "router_select.cuh"

namespace moe_layer::router {

template <int L>
__device__ __forceinline__ uint32_t row_min(uint32_t v) {
  if constexpr (L == 32) {
    return __reduce_min_sync(kFull, v);
  } else {
#pragma unroll
    for (int o = L / 2; o > 0; o >>= 1) v = min(v, __shfl_xor_sync(kFull, v, o));
    return v;
  }
}

// Smallest v that is at least `from`, all bits if there is none: v - from wraps above every v that is. The last test is left out
// where a lane has more values than the 16 that can be taken from it.
template <int N>
__device__ __forceinline__ uint32_t min_from(const uint32_t (&v)[N], uint32_t from) {
  uint32_t best[4] = {~0u, ~0u, ~0u, ~0u};  // four chains: one of N dependent steps would be latency bound
#pragma unroll
  for (int i = 0; i < N; ++i) best[i % 4] = __viaddmin_u32(v[i], 0u - from, best[i % 4]);
  const uint32_t found = __vimin3_u32(best[0], best[1], min(best[2], best[3])) + from;
  if constexpr (N < 16) return found < from ? ~0u : found;
  return found;
}

template <int N>
__device__ __forceinline__ uint32_t min_of(const uint32_t* v) {
  if constexpr (N == 8) {
    return __vimin3_u32(__vimin3_u32(v[0], v[1], v[2]), __vimin3_u32(v[3], v[4], v[5]), min(v[6], v[7]));
  } else {
    return min(min_of<8>(v), min_of<N - 8>(v + 8));
  }
}

// Of keys that differ, the two in order.
__device__ __forceinline__ void put_in_order(uint32_t& low, uint32_t& high) {
  const uint32_t other = max(low, high);
  low = min(low, high), high = other;
}

// Batcher's odd-even merge sort, smallest first: 5 exchanges for 4 values, 19 for 8.
template <int N>
__device__ __forceinline__ void sort_few(uint32_t (&v)[N]) {
#pragma unroll
  for (int run = 1; run < N; run *= 2) {
#pragma unroll
    for (int step = run; step >= 1; step /= 2) {
#pragma unroll
      for (int i = 0; i + step < N; ++i) {
        const bool starts = i >= step % run && (i - step % run) % (2 * step) < step;
        if (starts && i / (2 * run) == (i + step) / (2 * run)) put_in_order(v[i], v[i + step]);
      }
    }
  }
}

// The N smallest of two sorted lists, sorted, to `list`.
template <int N>
__device__ __forceinline__ void merge_best(uint32_t (&list)[N], const uint32_t (&other)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) list[i] = min(list[i], other[N - 1 - i]);  // the smallest N, rising and then falling
#pragma unroll
  for (int step = N / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if ((i & step) == 0) put_in_order(list[i], list[i + step]);
    }
  }
}

// The N smallest of a lane's values, sorted.
template <int N, int VALUES>
__device__ __forceinline__ void list_best(const uint32_t (&v)[VALUES], uint32_t (&list)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) list[i] = v[i];
  sort_few(list);
#pragma unroll
  for (int first = N; first < VALUES; first += N) {
    uint32_t more[N];
#pragma unroll
    for (int i = 0; i < N; ++i) more[i] = v[first + i];
    sort_few(more);
    merge_best(list, more);
  }
}

// A lane's best values, best first, and all bits after them: four in registers, or eight, of which all but two stand in shared memory.
struct ShortList {
  uint32_t list[4];

  template <int VALUES>
  __device__ __forceinline__ ShortList(const uint32_t (&v)[VALUES], uint32_t*) {
    list_best(v, list);
  }

  __device__ __forceinline__ uint32_t first() const { return list[0]; }

  __device__ __forceinline__ void drop_first_if(bool drops) {  // by selections, not by copies of the list
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      asm("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p mov.u32 %0, %1;\n}"
          : "+r"(list[i])
          : "r"(list[i + 1]), "r"(static_cast<int>(drops)));
    }
    list[3] = drops ? ~0u : list[3];
  }
};

struct LongList {
  static constexpr int kLength = 8, kWords = kLength * kWarp;  // shared memory of a warp
  uint32_t head, next;
  const uint32_t* rest;

  template <int VALUES>
  __device__ __forceinline__ LongList(const uint32_t (&v)[VALUES], uint32_t* memory) {
    uint32_t list[kLength];
    list_best(v, list);
    head = list[0], next = list[1];
    uint32_t* mine = memory + threadIdx.x % kWarp;  // nobody else's: no barrier
#pragma unroll
    for (int i = 0; i < kLength; ++i) mine[kWarp * i] = i + 2 < kLength ? list[i + 2] : ~0u;
    rest = mine;
  }

  __device__ __forceinline__ uint32_t first() const { return head; }

  __device__ __forceinline__ void drop_first_if(bool drops) {
    if (drops) head = next, next = *rest, rest += kWarp;
  }
};

// The K best of this lane's row, best first, to chosen[0..K) in shared memory; `best` is the first of them. Every lane sorts its best ones,
// so that a round looks at one value a lane and not at all of them. Returns how many are sure: those up to the round in which a lane gave
// the last of its list, the least of the warp's rows; nearly always K.
template <class List, int L, int C>
__device__ __forceinline__ int select_listed(
    const uint32_t (&v)[C * 8], uint32_t best, int top_k, uint32_t* chosen, uint32_t* memory) {
  List list(v, memory);
  int given = 0;  // the round in which this lane gave its last one
  if (list.first() == best) *chosen = best;
  list.drop_first_if(list.first() == best);
#pragma unroll 2
  for (int round = 1; round < top_k; ++round) {
    best = row_min<L>(list.first());
    const bool gives = list.first() == best;
    if (gives) chosen[round] = best, given = round;
    list.drop_first_if(gives);
  }
  return static_cast<int>(__reduce_min_sync(kFull, list.first() == ~0u ? given + 1 : top_k));
}

// The same for places from `done` on, looking at all values in every round; `best` is the one before them.
template <int L, int C>
__device__ __forceinline__ void select_scanned(
    const uint32_t (&v)[C * 8], uint32_t best, int done, int top_k, int gl, uint32_t* chosen) {
#pragma unroll 2
  for (; done < top_k; ++done) {
    best = row_min<L>(min_from(v, best + 1u));
    if (gl == 0) chosen[done] = best;
  }
}

// The K best of this lane's row, best first, to chosen[0..K) in shared memory; `best` is the first of them. `memory`: LongList::kWords if
// LONG, which serves a K above 8. By lists where that is quicker (H200): not where a row's 8 lanes hold 16 or 32 values each and K is 8,
// for there a list of four is too short in 1 of 100 rows, and the slowest warp makes a block's time.
template <int L, int C, bool LONG>
__device__ __forceinline__ void select_rows(
    const uint32_t (&v)[C * 8], uint32_t best, int top_k, int gl, uint32_t* chosen, uint32_t* memory) {
  constexpr bool kShort = L == 16 && C >= 3;
  int done = 1;
  if (LONG && top_k > 8) {
    done = select_listed<LongList, L, C>(v, best, top_k, chosen, memory);
  } else if (kShort) {
    done = select_listed<ShortList, L, C>(v, best, top_k, chosen, memory);
  } else if (gl == 0) {
    *chosen = best;
  }
  if (kShort || LONG) {
    if (done >= top_k) return;
    __syncwarp();  // chosen[] has been written by other lanes
    best = chosen[done - 1];
    __syncwarp();
  }
  select_scanned<L, C>(v, best, done, top_k, gl, chosen);
}

// The same where a lane holds all experts of its row: each one's rank is the number of better ones. `x` are whole logits, so that no
// key is too far from the best one.
__device__ __forceinline__ void rank_rows(const float (&x)[8], uint32_t bad, int top_k, uint32_t* chosen) {
  uint32_t key[8];
  int rank[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    key[i] = (bad >> i) & 1u ? 0u : ordered(x[i]);
    rank[i] = 0;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int j = i + 1; j < 8; ++j) {
      const bool first = key[i] >= key[j];
      rank[i] += !first, rank[j] += first;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (rank[i] < top_k) chosen[rank[i]] = i;
  }
}

}  // namespace moe_layer::router
