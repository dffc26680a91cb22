// Argument blocks of the router's kernels, how they are launched, and the sizes they serve.
#pragma once

#include "router_common.cuh"

namespace moe_layer::router {

// The finished losses of a batch and the sums they are made of; formulas: moe_layer/ops/batch_losses.py.
struct Losses {
  const int32_t *counts, *aux_counts;  // [E]; aux_counts and a sum are null without the loss
  const float *score_sum, *z_sum;
  int experts, top_k;
  float aux_coeff, z_coeff;
  float *summary, *scaled;  // [5]; one entry a loss. Null: nobody asked
};

struct Forward {
  FloatArray logits;
  bool vector;  // 16-byte loads are possible
  int64_t tokens;
  int experts, top_k, sequences;
  int score, weight_rule;
  bool key_is_logit;  // softmax "post" (or plain): the key is the logit (+ bias)
  bool exact_keys;    // bf16/fp16 logits as keys: the packed key loses nothing
  bool need_scores;   // scores over all E are used
  float scale;
  double scale_wide;
  FloatArray bias;
  int groups, group_topk, group_count, group_size;
  bool group_chunked;  // groups are runs of 1, 2, 4.. whole chunks, summed in registers
  int group_shift;     // log2(group_size) then
  IntArray replay;
  FloatArray recorded;  // null: live weights everywhere
  const bool* valid;
  IntArray cu_seqlens;
  int aux;
  bool live_apart;  // the ids that the aux loss counts are not the ids returned
  bool want_z;
  int map_format;
  void* weights;  // fp32, or fp64 for fp64 logits; likewise scores, score_sum, z_sum
  int32_t* ids;
  void* id_buffer;  // null, or the caller's copy of the ids
  int id_buffer_kind;
  int32_t* counts;
  int32_t* aux_counts;
  int32_t* events;
  void* probs;
  void* scores;
  uint8_t* map;
  void* score_sum;
  void* z_sum;
  Losses losses;
  unsigned long long* sums;  // [S, E] fixed point
  double* z_parts;           // [blocks]
  unsigned* ticket;
  double sum_scale, sum_unscale;
  uint32_t* part;               // [blocks, part_words]: what the lean kernel's blocks counted and summed, see PartRow
  int warp_words, block_words;  // shared memory of one warp, and of all warps of a block, in 4-byte words
  int64_t tiles_each, tiles_rest;  // tiles of a block; blocks below tiles_rest take one more
};

struct Backward {
  FloatArray logits, d_weights, d_score_sum, d_z, d_probs, d_scores;
  bool vector;
  const int32_t* ids;
  IntArray replay;  // null: every slot has a gradient
  IntArray cu_seqlens;
  int64_t tokens;
  int experts, top_k, sequences;
  int score, weight_rule;
  bool dense;  // something other than the K weights sends a gradient
  float scale;
  double scale_wide;
  void* d_logits;
};

// The block's tiles [begin, end): a contiguous run. The host divides, a 64-bit division on the device takes a microsecond.
struct Tiles {
  int64_t begin, end;
};

__device__ __forceinline__ Tiles tiles_of_block(const Forward& p) {
  const int64_t b = blockIdx.x, begin = b * p.tiles_each + (b < p.tiles_rest ? b : p.tiles_rest);
  return {begin, begin + p.tiles_each + (b < p.tiles_rest ? 1 : 0)};
}

inline void cut_tiles(Forward& p, int64_t tiles, int blocks) {
  p.tiles_each = tiles / blocks, p.tiles_rest = tiles % blocks;
}

// A row of Forward::part: what one block of the lean kernel adds to the call's counts and sums (router_finish.cu).
struct PartRow {
  int32_t *counts, *aux_counts;  // [E]; aux_counts only if they are not the counts
  float* score_sum;              // [E]
  int32_t* events;               // [6]
  double* z;
};

__host__ __device__ inline int part_words(const Forward& p) { return p.experts * (p.live_apart ? 3 : 2) + 10; }

__device__ __forceinline__ PartRow part_row(const Forward& p, int block) {
  int32_t* counts = reinterpret_cast<int32_t*>(p.part) + static_cast<int64_t>(block) * part_words(p);
  int32_t* aux_counts = counts + (p.live_apart ? p.experts : 0);
  float* score_sum = reinterpret_cast<float*>(aux_counts + p.experts);
  int32_t* events = reinterpret_cast<int32_t*>(score_sum + p.experts);
  return {counts, aux_counts, score_sum, events, reinterpret_cast<double*>(events + 8)};
}

// What the lean kernel serves: a training step's outputs, live or replayed.
inline bool lean_fits(const Forward& p, bool keyed) {
  const bool score = p.score == kSigmoid || (p.score == kSoftmax && !keyed);
  return p.vector && p.experts <= 512 && p.top_k <= 16 && score && p.cu_seqlens.data == nullptr && p.probs == nullptr &&
         p.scores == nullptr && p.map_format == kNoMap &&
         (p.groups == 0 || (p.group_chunked && p.group_size <= (p.experts <= 256 ? 64 : 128)));
}

inline int int_kind(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Byte: return kU8;
    case ScalarType::Char: return kI8;
    case ScalarType::Short: return kI16;
    case ScalarType::Int: return kI32;
    case ScalarType::Long: return kI64;
    default:
      STD_TORCH_CHECK(false, name, " must be an integer tensor, got ", torch::headeronly::toString(t.scalar_type()));
  }
  return kI32;
}

// Host launchers, one file each so that they compile in parallel. `blocks` is the size of the grid.
void launch_forward_plain(const Forward& args, int blocks, cudaStream_t stream);
void launch_forward_keyed(const Forward& args, int blocks, cudaStream_t stream);
template <bool WIDE>
void launch_lean_plain(const Forward& args, int sms, cudaStream_t stream);
template <bool WIDE>
void launch_lean_keyed(const Forward& args, int sms, cudaStream_t stream);
void launch_finish(const Forward& args, int parts, cudaStream_t stream);
void launch_losses(const Losses& args, cudaStream_t stream);
void launch_copy_ids(const IntArray& ids, int64_t numel, void* out, int out_kind, int sms, cudaStream_t stream);
void launch_forward_generic(const Forward& args, int blocks, cudaStream_t stream);
void launch_backward_rows(const Backward& args, int sms, cudaStream_t stream);
void launch_backward_generic(const Backward& args, int blocks, cudaStream_t stream);

#ifndef MOE_ROUTER_THREADS
#define MOE_ROUTER_THREADS 512
#endif
constexpr int kForwardThreads = MOE_ROUTER_THREADS;  // one block an SM
constexpr int kMaxFastExperts = 1024;
constexpr int kMaxFastK = 32;
constexpr int kMaxExperts = 8192;

// Lanes of a row: 16 experts a lane, 32 above 512 experts.
inline int lanes_for(int experts) { return experts <= 64 ? 4 : experts <= 128 ? 8 : experts <= 256 ? 16 : 32; }
inline int bucket_for(int experts) { return experts > 512 ? 1024 : lanes_for(experts) * 16; }

constexpr int kLeanThreads =
    512;                      // 16 warps: 24 or 32 took as much time at 128 experts and up to 40% more elsewhere (H200)
constexpr int kSpareSms = 4;  // what the lean kernel leaves to router_finish.cu

// Lanes of a row in the lean kernel: the fewer share it, the fewer steps a selection takes, and more than 32 values a lane do not fit the
// registers. With fewer than 64 rows an SM, 4 rows of up to 256 experts a warp would leave warps idle.
inline int lean_lanes(const Forward& p, int sms) {
  if (p.experts == 8) return 1;
  if (p.experts <= 64) return 4;
  if (p.experts <= 128) return 8;
  return p.experts <= 256 && p.tokens >= 64ll * sms ? 8 : 16;
}

struct LeanShape {
  int rows;        // rows of a tile
  int slot_lanes;  // W, the power of two that holds K: lanes of a row when a lane owns a slot
  int slot_shift;  // log2(W): a division takes twenty instructions
};

inline LeanShape lean_shape(const Forward& p, int sms) {
  LeanShape shape = {kWarp / lean_lanes(p, sms), 1, 0};
  while (shape.slot_lanes < p.top_k) shape.slot_lanes *= 2, ++shape.slot_shift;
  // Rows enough to keep the lanes of the weights busy, unless warps would stay without rows.
  const int together = kWarp / shape.slot_lanes < 8 ? kWarp / shape.slot_lanes : 8;
  const int64_t enough = static_cast<int64_t>(together) * (kLeanThreads / kWarp) * sms / 2;
  if (together > shape.rows && p.tokens >= enough) shape.rows = together;
  return shape;
}

// Blocks of the lean kernel, and rows of Forward::part: no block without a row that its lanes can share, and a few SMs less than there
// are, if no warp gets more tiles for it. On those the next kernel gets ready: 1.2 us at 128 experts (H200).
inline int lean_blocks(const Forward& p, int sms) {
  const int64_t needed = ceil_div<int64_t>(p.tokens, 8), tiles = ceil_div<int64_t>(p.tokens, lean_shape(p, sms).rows);
  const auto rounds = [&](int blocks) {
    return ceil_div<int64_t>(ceil_div<int64_t>(tiles, blocks), kLeanThreads / kWarp);
  };
  const int fewer = sms > 8 * kSpareSms ? sms - kSpareSms : sms, most = rounds(fewer) == rounds(sms) ? fewer : sms;
  return static_cast<int>(needed < most ? needed : most);
}

}  // namespace moe_layer::router
