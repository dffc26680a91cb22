// What the router's forward and backward kernels share: the argument block, loads of any dtype, scores, reductions.
//
// Letters: T tokens, E experts, K top-k, G groups, S sequences. Arithmetic is fp32 whatever the logits' dtype.
// A row of logits is owned by L lanes of a warp (32/L rows a warp). Lane `gl` of the row holds chunks of 8 experts,
// chunk c = experts [8*(c*L + gl), +8), so that 16-byte loads of neighbouring lanes touch neighbouring addresses.
#pragma once

#include "common.cuh"

#include <cmath>

namespace moe_layer::router {

enum Score : int { kSoftmax, kSigmoid, kSqrtSoftplus };
enum WeightRule : int { kOverChosen, kPreSoftmax, kScore, kScoreNormalised };
enum Aux : int { kNoAux, kLive, kEffective };
enum MapFormat : int { kNoMap, kBytemap, kBitmap };
enum Float : int { kF32, kBF16, kF16, kF64 };
enum Int : int { kU8, kI8, kI16, kI32, kI64 };

constexpr unsigned kFull = 0xffffffffu;
constexpr float kEps = 1e-20f;
constexpr float kBrokenKey = -1e30f;  // what a group's sum counts for a key that is not finite (route_topk_ref.py)
constexpr float kPad = -2.0e38f;      // an expert that does not exist: finite, also times log2(e); exp and score 0
constexpr float kLog2e = 1.4426950408889634f;
constexpr unsigned long long kPoison = 1ull
                                       << 63;  // a NaN among the addends of a fixed-point sum; sums stay below 2^62

struct FloatArray {
  const void* data;
  int kind;
};

struct IntArray {
  const void* data;
  int kind;
};

__device__ __forceinline__ float load_float(const FloatArray& a, int64_t i) {
  switch (a.kind) {
    case kF32: return __ldg(static_cast<const float*>(a.data) + i);
    case kBF16: return __bfloat162float(static_cast<const __nv_bfloat16*>(a.data)[i]);
    case kF16: return __half2float(static_cast<const __half*>(a.data)[i]);
    default: return static_cast<float>(static_cast<const double*>(a.data)[i]);
  }
}

template <typename A>
__device__ __forceinline__ A load_as(const FloatArray& a, int64_t i) {
  if constexpr (std::is_same_v<A, double>) {
    if (a.kind == kF64) return static_cast<const double*>(a.data)[i];
  }
  return static_cast<A>(load_float(a, i));
}

__device__ __forceinline__ int64_t load_int(const IntArray& a, int64_t i) {
  switch (a.kind) {
    case kU8: return static_cast<const uint8_t*>(a.data)[i];
    case kI8: return static_cast<const int8_t*>(a.data)[i];
    case kI16: return static_cast<const int16_t*>(a.data)[i];
    case kI32: return static_cast<const int32_t*>(a.data)[i];
    default: return static_cast<const int64_t*>(a.data)[i];
  }
}

// -1 missing, [0, E) an expert, E out of range: a 64-bit id never reaches an index unclamped.
__device__ __forceinline__ int load_id(const IntArray& a, int64_t i, int num_experts) {
  const int64_t id = load_int(a, i);
  return id < 0 ? -1 : id >= num_experts ? num_experts : static_cast<int>(id);
}

// Sequence of a token: the last boundary at or before it; -1 outside the boundaries.
__device__ __forceinline__ int sequence_of(const IntArray& cu_seqlens, int sequences, int64_t token) {
  if (cu_seqlens.data == nullptr) return 0;
  int low = 0, high = sequences + 1;  // first boundary greater than token lies in [low, high]
  while (low < high) {
    const int mid = (low + high) / 2;
    if (load_int(cu_seqlens, mid) <= token) {
      low = mid + 1;
    } else {
      high = mid;
    }
  }
  return low - 1 < sequences ? low - 1 : -1;
}

__device__ __forceinline__ void store_float(void* data, int kind, int64_t i, float v) {
  switch (kind) {
    case kF32: static_cast<float*>(data)[i] = v; return;
    case kBF16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(v); return;
    default: static_cast<__half*>(data)[i] = __float2half_rn(v); return;
  }
}

__device__ __forceinline__ void store_int(void* data, int kind, int64_t i, int v) {
  switch (kind) {
    case kI16: static_cast<int16_t*>(data)[i] = static_cast<int16_t>(v); return;
    case kI32: static_cast<int32_t*>(data)[i] = v; return;
    default: static_cast<int64_t*>(data)[i] = v; return;
  }
}

__device__ __forceinline__ uint32_t narrow_pair(int kind, float a, float b) {
  if (kind == kBF16) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&two);
  }
  const __half2 two = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&two);
}

__device__ __forceinline__ void store8(void* data, int kind, int64_t i, const float (&v)[8]) {
  if (kind == kF32) {
    float4* target = reinterpret_cast<float4*>(static_cast<float*>(data) + i);
    target[0] = make_float4(v[0], v[1], v[2], v[3]);
    target[1] = make_float4(v[4], v[5], v[6], v[7]);
    return;
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(data) + i) = make_uint4(
      narrow_pair(kind, v[0], v[1]), narrow_pair(kind, v[2], v[3]), narrow_pair(kind, v[4], v[5]),
      narrow_pair(kind, v[6], v[7]));
}

// Eight neighbouring values as they lie in memory, and widened. Loading and widening are apart because a widened value is waited
// for: all loads of a row must be on their way before the first one is used. Words are named, not indexed through a pointer,
// which would put them in local memory.
template <int Kind>
struct Eight {
  uint4 low, high;

  __device__ __forceinline__ void load(const void* data, int64_t i, bool here, float pad) {
    const uint32_t bits = __float_as_uint(pad);
    const uint32_t word = Kind == kF32 ? bits : Kind == kBF16 ? (bits & 0xffff0000u) | (bits >> 16) : 0u;
    low = make_uint4(word, word, word, word);
    if constexpr (Kind == kF32) high = low;
    const uint4* source = reinterpret_cast<const uint4*>(static_cast<const char*>(data) + i * (Kind == kF32 ? 4 : 2));
    if (here) {
      low = __ldg(source);
      if constexpr (Kind == kF32) high = __ldg(source + 1);
    }
  }

  __device__ static __forceinline__ void pair(uint32_t word, float& a, float& b) {
    if constexpr (Kind == kBF16) {
      a = __uint_as_float(word << 16), b = __uint_as_float(word & 0xffff0000u);
    } else {
      const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&word));
      a = two.x, b = two.y;
    }
  }

  __device__ __forceinline__ void widen(float* out) const {
    if constexpr (Kind == kF32) {
      out[0] = __uint_as_float(low.x), out[1] = __uint_as_float(low.y), out[2] = __uint_as_float(low.z);
      out[3] = __uint_as_float(low.w), out[4] = __uint_as_float(high.x), out[5] = __uint_as_float(high.y);
      out[6] = __uint_as_float(high.z), out[7] = __uint_as_float(high.w);
    } else {
      pair(low.x, out[0], out[1]), pair(low.y, out[2], out[3]), pair(low.z, out[4], out[5]),
          pair(low.w, out[6], out[7]);
    }
  }
};

template <int Kind, int L, int C>
__device__ __forceinline__ void load_vectors(
    const void* data, int64_t row, bool live, int num_experts, int gl, float pad, float (&x)[C * 8]) {
  Eight<Kind> raw[C];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int first = 8 * (c * L + gl);
    raw[c].load(data, row * num_experts + first, live && first < num_experts, pad);
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    raw[c].widen(&x[8 * c]);
    if constexpr (Kind == kF16) {  // fp16 cannot hold the pad
      const bool here = live && 8 * (c * L + gl) < num_experts;
#pragma unroll
      for (int j = 0; j < 8; ++j) x[8 * c + j] = here ? x[8 * c + j] : pad;
    }
  }
}

// Asks for the line to be brought to the L2 and waits for nothing.
__device__ __forceinline__ void prefetch_line(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Any E and any alignment: one element at a time.
template <typename T, int L, int C>
__device__ __forceinline__ void load_scalars(
    const void* data, int64_t row, bool live, int num_experts, int gl, float pad, float (&x)[C * 8]) {
  const T* source = static_cast<const T*>(data) + row * num_experts;
#pragma unroll
  for (int i = 0; i < C * 8; ++i) {
    const int e = 8 * ((i / 8) * L + gl) + i % 8;
    x[i] = live && e < num_experts ? to_float(source[e]) : pad;
  }
}

// The row's values of this lane, `pad` where there is no expert (or no row). `vector`: E is a multiple of 8, rows aligned.
template <int L, int C>
__device__ __forceinline__ void load_row(
    const FloatArray& a, bool vector, int64_t row, bool live, int num_experts, int gl, float pad, float (&x)[C * 8]) {
  if (vector) {
    switch (a.kind) {
      case kF32: return load_vectors<kF32, L, C>(a.data, row, live, num_experts, gl, pad, x);
      case kBF16: return load_vectors<kBF16, L, C>(a.data, row, live, num_experts, gl, pad, x);
      default: return load_vectors<kF16, L, C>(a.data, row, live, num_experts, gl, pad, x);
    }
  }
  switch (a.kind) {
    case kF32: return load_scalars<float, L, C>(a.data, row, live, num_experts, gl, pad, x);
    case kBF16: return load_scalars<__nv_bfloat16, L, C>(a.data, row, live, num_experts, gl, pad, x);
    default: return load_scalars<__half, L, C>(a.data, row, live, num_experts, gl, pad, x);
  }
}

// ----------------------------------------------------------------------------------------------------------- scores

__device__ __forceinline__ float exp2_fast(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

// exp(x - max) for x up to max. The difference is taken first: x * log2(e) - max * log2(e) would be off by 2^16 for logits of 1e12.
__device__ __forceinline__ float exp_above_fast(float x, float max) { return exp2_fast((x - max) * kLog2e); }

// exp(x) to a few ulp: the product with log2(e) is rounded, and what it loses is put back to first order.
__device__ __forceinline__ float exp_compensated(float x) {
  const float t = x * kLog2e, lost = fmaf(t, -0.6931471805599453f, x), e = exp2_fast(t);
  return fmaf(e, lost, e);
}

__device__ __forceinline__ float reciprocal(float v) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

// Position independent: within 4 ulp of 1 / (1 + exp(-x)) wherever the expert stands.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + expf(-x)); }

__device__ __forceinline__ float sqrt_softplus(float x) {
  return sqrtf(x > 20.0f ? x : log1pf(expf(fminf(x, 20.0f))));  // fminf turns NaN into 20: x is tested by the caller
}

__device__ __forceinline__ float score_of(float x, int score) {
  if (score == kSigmoid) return sigmoid(x);
  return x != x ? x : sqrt_softplus(x);
}

__device__ __forceinline__ double score_of(double x, int score) {
  if (score == kSigmoid) return 1.0 / (1.0 + exp(-x));
  return x != x ? x : sqrt(x > 20.0 ? x : log1p(exp(fmin(x, 20.0))));
}

// d score / d logit.
template <typename A>
__device__ __forceinline__ A score_slope(A x, A y, int score) {
  if (score == kSigmoid) return y * (A(1) - y);
  return score_of(x, static_cast<int>(kSigmoid)) / (A(2) * y + A(1e-20));
}

// fp32 -> uint32 with the same order; -0 equals 0.
__device__ __forceinline__ uint32_t ordered(float v) {
  const uint32_t bits = __float_as_uint(v + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ bool is_finite(float v) { return fabsf(v) < INFINITY; }

// ----------------------------------------------------------------------------- reductions over the L lanes of a row

template <int L>
__device__ __forceinline__ float row_max(float v) {
#pragma unroll
  for (int o = L / 2; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(kFull, v, o));
  return v;
}

template <int L>
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
  for (int o = L / 2; o > 0; o >>= 1) v += __shfl_xor_sync(kFull, v, o);
  return v;
}

template <int L>
__device__ __forceinline__ uint32_t row_max(uint32_t v) {
  if constexpr (L == 32) {
    return __reduce_max_sync(kFull, v);
  } else {
#pragma unroll
    for (int o = L / 2; o > 0; o >>= 1) v = max(v, __shfl_xor_sync(kFull, v, o));
    return v;
  }
}

template <int L>
__device__ __forceinline__ uint32_t row_or(uint32_t v) {
#pragma unroll
  for (int o = L / 2; o > 0; o >>= 1) v |= __shfl_xor_sync(kFull, v, o);
  return v;
}

// Pairwise, so that the sum of 16 numbers rounds 4 times, not 16.
template <int N>
__device__ __forceinline__ float tree_sum(const float* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    return tree_sum<N / 2>(v) + tree_sum<N / 2>(v + N / 2);
  }
}

}  // namespace moe_layer::router
