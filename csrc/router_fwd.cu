// moe_layer::route_topk on CUDA: checks, outputs, workspace, and the choice between the fast and the general kernel.
//
// A call is two launches. Of a training step: the lean router and router_finish.cu, which adds up what its blocks counted. With
// sequences, dense outputs or uncommon sizes: a tiny kernel that zeroes the counters, and the router that adds to them. One more
// finishes the losses if somebody asked for them (router_losses.cu). On sm_90 and later a kernel is launched beside the one in front
// of it (programmatic dependent launch) and waits for it on the device. Losses finished in the second launch were slower (H200): its
// blocks would have to wait for each other, by a cluster, a ticket or words in memory, 0.6 to 0.9 us more than a launch of their own.

#include "router_entry.cuh"

namespace moe_layer::router {
namespace {

constexpr int kZeroThreads = 256;

struct ZeroRegions {  // in 4-byte words
  uint32_t* data[4];
  int64_t words[4];
};

__global__ void __launch_bounds__(kZeroThreads) zero_kernel(const __grid_constant__ ZeroRegions regions) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kZeroThreads;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kZeroThreads + threadIdx.x; i < regions.words[r]; i += stride) {
      regions.data[r][i] = 0;
    }
  }
}

// ----------------------------------------------------------------------------------------------------- arguments from torch

int float_kind(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kF32;
    case ScalarType::BFloat16: return kBF16;
    case ScalarType::Half: return kF16;
    case ScalarType::Double: return kF64;
    default:
      STD_TORCH_CHECK(false, name, " must be a floating tensor, got ", torch::headeronly::toString(t.scalar_type()));
  }
  return kF32;
}

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  if (!t.has_value() || t->is_contiguous()) return t;
  return torch::stable::contiguous(*t);
}

void check_shape(const Tensor& t, const char* name, const Tensor& logits, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.is_cuda(), name, " must be a CUDA tensor; move it with .cuda()");
  check_same_device(t, name, logits);
  STD_TORCH_CHECK(
      t.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(), " dimensions, got ", t.dim());
  int64_t axis = 0;
  for (const int64_t size : sizes) check_size(t, name, axis++, size);
}

FloatArray float_array(const std::optional<Tensor>& t, const char* name) {
  if (!t.has_value()) return {nullptr, kF32};
  return {t->const_data_ptr(), float_kind(*t, name)};
}

IntArray int_array(const std::optional<Tensor>& t, const char* name) {
  if (!t.has_value()) return {nullptr, kI32};
  return {t->const_data_ptr(), int_kind(*t, name)};
}

int choice(const std::string& value, const char* name, std::initializer_list<const char*> names) {
  int index = 0;
  for (const char* candidate : names) {
    if (value == candidate) return index;
    ++index;
  }
  STD_TORCH_CHECK(false, name, " has no value ", value);
  return 0;
}

int weight_rule(int score, bool pre, bool renormalize, int64_t top_k) {
  if (score == kSoftmax) return pre && !renormalize ? kPreSoftmax : kOverChosen;
  return renormalize && top_k > 1 ? kScoreNormalised : kScore;
}

bool rows_aligned(const void* data, int64_t experts) {
  return experts % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

int log2_exact(int value) {  // -1 if it is no power of two
  int shift = 0;
  while ((1 << shift) < value) ++shift;
  return (1 << shift) == value ? shift : -1;
}

void set_groups(Forward& p, int64_t num_groups, int64_t group_topk, const std::string& rule) {
  p.groups = static_cast<int>(num_groups);
  p.group_topk = static_cast<int>(group_topk);
  p.group_count = 1, p.group_size = p.experts, p.group_shift = 0, p.group_chunked = false;
  if (num_groups == 0) return;
  STD_TORCH_CHECK(p.experts % num_groups == 0, "num_groups ", num_groups, " must divide the ", p.experts, " experts");
  p.group_size = p.experts / p.groups;
  p.group_count = choice(rule, "group_rule", {"sum_top2", "sum_topk_per_group"}) == 0 ? 2 : p.top_k / p.group_topk;
  STD_TORCH_CHECK(
      p.group_count <= p.group_size, "a group of ", p.group_size, " experts has no ", p.group_count, " best ones");
  STD_TORCH_CHECK(p.top_k <= p.group_topk * p.group_size, "top_k exceeds the experts of group_topk groups");
  p.group_shift = log2_exact(p.group_size);
  p.group_chunked = p.group_shift >= 3 && p.group_size / 8 <= lanes_for(p.experts) && p.group_count <= 2;
}

void set_losses(Forward& p, double aux_coeff, double z_coeff, Tensor& summary, Tensor& scaled) {
  STD_TORCH_CHECK(
      p.logits.kind != kF64,
      "finished losses are fp32 on CUDA and the logits are fp64; leave loss_coeffs out and use "
      "moe_layer.losses on the sums");
  STD_TORCH_CHECK(
      p.cu_seqlens.data == nullptr, "finished losses are of one batch; leave loss_coeffs or cu_seqlens out");
  p.losses = {
      p.counts,
      p.aux == kNoAux ? nullptr : p.aux_counts,
      p.aux == kNoAux ? nullptr : static_cast<const float*>(p.score_sum),
      p.want_z ? static_cast<const float*>(p.z_sum) : nullptr,
      p.experts,
      p.top_k,
      static_cast<float>(aux_coeff),
      static_cast<float>(z_coeff),
      out_ptr<float>(summary),
      out_ptr<float>(scaled)};
}

// Largest fixed-point shift with which T scores of at most 1 stay below 2^62, so that bit 63 is free for NaN.
int sum_shift(int64_t tokens) {
  int bits = 1;
  while ((int64_t{1} << bits) <= tokens) ++bits;
  return 62 - bits < 52 ? 62 - bits : 52;
}

int64_t words(const Tensor& t, int64_t bytes_per_element) { return t.numel() * bytes_per_element / 4; }

}  // namespace

Outputs forward(const GateInput* gate, const Tensor& logits_any, Call call) {
  STD_TORCH_CHECK(logits_any.is_cuda() && logits_any.dim() == 2, "logits must be a CUDA tensor [T, E]");
  const DeviceGuard guard(logits_any.get_device_index());
  const Tensor logits = logits_any.is_contiguous() ? logits_any : torch::stable::contiguous(logits_any);
  const int64_t T = gate != nullptr ? gate_tokens(*gate) : logits.size(0), E = logits.size(1);
  STD_TORCH_CHECK(
      E >= 1 && E <= kMaxExperts, "the CUDA router takes 1 to ", kMaxExperts, " experts, got ", E,
      "; set MOE_LAYER_CUDA=0 to use the PyTorch reference");
  STD_TORCH_CHECK(call.top_k >= 1 && call.top_k <= E, "top_k must lie in 1..", E, ", got ", call.top_k);
  call.expert_bias = dense(call.expert_bias), call.replay_ids = dense(call.replay_ids),
  call.replay_weights = dense(call.replay_weights);
  call.valid = dense(call.valid), call.cu_seqlens = dense(call.cu_seqlens);
  if (call.expert_bias) check_shape(*call.expert_bias, "expert_bias", logits, {E});
  if (call.replay_ids) check_shape(*call.replay_ids, "replay_ids", logits, {T, call.top_k});
  if (call.replay_weights) check_shape(*call.replay_weights, "replay_weights", logits, {T, call.top_k});
  if (call.valid) {
    check_shape(*call.valid, "valid", logits, {T});
    STD_TORCH_CHECK(call.valid->scalar_type() == ScalarType::Bool, "valid must be bool");
  }
  if (call.cu_seqlens) check_shape(*call.cu_seqlens, "cu_seqlens", logits, {call.cu_seqlens->size(0)});
  const int64_t S = call.cu_seqlens ? call.cu_seqlens->size(0) - 1 : 1;

  Forward p = {};
  p.logits = {logits.const_data_ptr(), float_kind(logits, "logits")};
  p.tokens = T, p.experts = static_cast<int>(E), p.top_k = static_cast<int>(call.top_k),
  p.sequences = to_int32(S, "sequences");
  p.score = choice(call.score_function, "score_function", {"softmax", "sigmoid", "sqrtsoftplus"});
  const bool pre = choice(call.softmax_order, "softmax_order", {"pre", "post"}) == 0;
  p.weight_rule = weight_rule(p.score, pre, call.renormalize, call.top_k);
  p.scale = static_cast<float>(call.scaling_factor), p.scale_wide = call.scaling_factor;
  p.bias = float_array(call.expert_bias, "expert_bias");
  set_groups(p, call.num_groups, call.group_topk, call.group_rule);
  const bool keyed = p.bias.data != nullptr || p.groups > 0;
  p.key_is_logit = !keyed || (p.score == kSoftmax && !pre);
  p.exact_keys = !keyed && (p.logits.kind == kBF16 || p.logits.kind == kF16);
  p.replay = int_array(call.replay_ids, "replay_ids");
  const int mode = choice(call.weights_mode, "weights_mode", {"live", "recorded", "straight_through"});
  const bool recorded = mode != 0 && call.replay_ids && call.replay_weights;
  p.recorded = recorded ? float_array(call.replay_weights, "replay_weights") : FloatArray{nullptr, kF32};
  p.valid = call.valid ? static_cast<const bool*>(call.valid->const_data_ptr()) : nullptr;
  p.cu_seqlens = int_array(call.cu_seqlens, "cu_seqlens");
  p.aux = choice(call.aux_counts, "aux_counts", {"none", "live", "effective"});
  p.live_apart = p.aux == kLive && (keyed || call.replay_ids);
  p.want_z = call.want_z;
  p.map_format = choice(call.map_format, "map_format", {"none", "bytemap", "bitmap"});
  const bool pre_key = keyed && !p.key_is_logit;
  p.need_scores = p.aux != kNoAux || call.want_scores || pre_key || p.weight_rule == kPreSoftmax;
  p.vector = p.logits.kind != kF64 && rows_aligned(p.logits.data, E);

  const ScalarType wide = p.logits.kind == kF64 ? ScalarType::Double : ScalarType::Float;
  const int64_t wide_bytes = p.logits.kind == kF64 ? 8 : 4;
  const int64_t aux_rows = p.aux == kNoAux ? 0 : S;
  Tensor weights = new_empty(logits, {T, call.top_k}, wide);
  Tensor ids = new_empty(logits, {T, call.top_k}, ScalarType::Int);
  Tensor counts = new_empty(logits, {E}, ScalarType::Int);
  Tensor aux = p.aux == kNoAux ? new_empty(logits, {0}, ScalarType::Int) : new_empty(logits, {S, E}, ScalarType::Int);
  Tensor score_sum = p.aux == kNoAux ? new_empty(logits, {0}, wide) : new_empty(logits, {S, E}, wide);
  Tensor z_sum = new_empty(logits, {call.want_z ? 1 : 0}, wide);
  Tensor events = new_empty(logits, {8}, ScalarType::Int);
  Tensor probs =
      call.want_probs ? new_empty(logits, {T, E}, logits.scalar_type()) : new_empty(logits, {0}, logits.scalar_type());
  Tensor scores = call.want_scores ? new_empty(logits, {T, E}, wide) : new_empty(logits, {0}, wide);
  const ScalarType map_type = p.map_format == kBitmap ? ScalarType::Byte : ScalarType::Bool;
  Tensor map = p.map_format == kNoMap    ? new_empty(logits, {0}, map_type)
               : p.map_format == kBitmap ? new_empty(logits, {T, (E + 7) / 8}, map_type)
                                         : new_empty(logits, {T, E}, map_type);
  Tensor summary = new_empty(logits, {call.want_losses ? 5 : 0}, wide);
  Tensor scaled = new_empty(logits, {call.want_losses ? (p.aux != kNoAux) + call.want_z : 0}, wide);

  // Workspace: of the lean kernel a row for every block; else ticket (16 bytes) and fixed-point sums, both zeroed, then one double
  // a block, always written before it is read.
  const int device = logits.get_device_index();
  const int sms = sm_count(device);
  const bool lean = T > 0 && lean_fits(p, keyed);
  const int64_t sum_bytes = 16 + aux_rows * E * 8;
  const int parts = gate != nullptr ? gate_blocks(*gate) : lean_blocks(p, sms);
  const int64_t part_bytes = 4ll * part_words(p) * parts;
  Tensor workspace = scratch_bytes(logits, lean ? part_bytes : sum_bytes + 8ll * sms * 2);
  char* base = static_cast<char*>(workspace.mutable_data_ptr());
  p.part = reinterpret_cast<uint32_t*>(base);
  p.ticket = reinterpret_cast<unsigned*>(base);
  p.sums = reinterpret_cast<unsigned long long*>(base + 16);
  p.z_parts = reinterpret_cast<double*>(base + sum_bytes);
  const int shift = sum_shift(T);
  p.sum_scale = std::ldexp(1.0, shift), p.sum_unscale = std::ldexp(1.0, -shift);

  p.weights = weights.mutable_data_ptr(), p.ids = out_ptr<int32_t>(ids), p.counts = out_ptr<int32_t>(counts);
  p.aux_counts = out_ptr<int32_t>(aux), p.events = out_ptr<int32_t>(events);
  p.probs = call.want_probs ? probs.mutable_data_ptr() : nullptr;
  p.scores = call.want_scores ? scores.mutable_data_ptr() : nullptr;
  p.map = p.map_format == kNoMap ? nullptr : static_cast<uint8_t*>(map.mutable_data_ptr());
  p.score_sum = score_sum.mutable_data_ptr(), p.z_sum = z_sum.mutable_data_ptr();
  if (call.want_losses) set_losses(p, call.aux_coeff, call.z_coeff, summary, scaled);
  if (call.id_buffer) {
    check_shape(*call.id_buffer, "id_buffer", logits, {T, call.top_k});
    STD_TORCH_CHECK(call.id_buffer->is_contiguous(), "id_buffer must be contiguous; pass a contiguous tensor");
    p.id_buffer = call.id_buffer->mutable_data_ptr(), p.id_buffer_kind = int_kind(*call.id_buffer, "id_buffer");
    STD_TORCH_CHECK(p.id_buffer_kind >= kI16, "id_buffer must be int16, int32 or int64");
  }

  const cudaStream_t stream = current_stream(logits);
  STD_TORCH_CHECK(
      gate == nullptr || lean || T == 0,
      "the gate's kernel does not serve these options; multiply apart and use route_topk");
  if (lean) {
    if (gate != nullptr) {
      launch_gate(p, *gate, keyed, stream);
    } else if (p.logits.kind == kF32) {
      (keyed ? launch_lean_keyed<true> : launch_lean_plain<true>)(p, sms, stream);
    } else {
      (keyed ? launch_lean_keyed<false> : launch_lean_plain<false>)(p, sms, stream);
    }
    launch_finish(p, parts, stream);
    if (call.want_losses) launch_losses(p.losses, stream);
    return {weights, ids, counts, aux, score_sum, z_sum, events, probs, scores, map, summary, scaled};
  }
  ZeroRegions zero = {
      {reinterpret_cast<uint32_t*>(p.counts), reinterpret_cast<uint32_t*>(p.aux_counts),
       reinterpret_cast<uint32_t*>(p.events), reinterpret_cast<uint32_t*>(base)},
      {words(counts, 4), words(aux, 4), 8, sum_bytes / 4}};
  if (T == 0) {  // no router launch: its outputs are these zeros
    zero.data[3] = static_cast<uint32_t*>(p.score_sum), zero.words[3] = words(score_sum, wide_bytes);
    zero_kernel<<<16, kZeroThreads, 0, stream>>>(zero);
    MOE_LAUNCH_CHECK();
    if (call.want_z) STD_CUDA_CHECK(cudaMemsetAsync(p.z_sum, 0, wide_bytes, stream));
  } else {
    const int64_t zero_words = words(counts, 4) + words(aux, 4) + sum_bytes / 4;
    const int64_t zero_blocks = ceil_div<int64_t>(zero_words, kZeroThreads * 2);
    zero_kernel<<<static_cast<int>(zero_blocks < sms ? zero_blocks : sms), kZeroThreads, 0, stream>>>(zero);
    MOE_LAUNCH_CHECK();
    if (p.logits.kind == kF64 || E > kMaxFastExperts || call.top_k > kMaxFastK) {
      launch_forward_generic(p, static_cast<int>(T < 2 * sms ? T : 2 * sms), stream);
    } else {
      const int64_t tiles = ceil_div<int64_t>(T, kWarp / lanes_for(p.experts));
      const int blocks = static_cast<int>(tiles < sms ? tiles : sms);
      (keyed ? launch_forward_keyed : launch_forward_plain)(p, blocks, stream);
    }
    if (call.id_buffer) launch_copy_ids({p.ids, kI32}, T * call.top_k, p.id_buffer, p.id_buffer_kind, sms, stream);
  }
  if (call.want_losses) launch_losses(p.losses, stream);
  return {weights, ids, counts, aux, score_sum, z_sum, events, probs, scores, map, summary, scaled};
}

Outputs route_topk(
    const Tensor& logits, std::optional<Tensor> expert_bias, std::optional<Tensor> replay_ids,
    std::optional<Tensor> replay_weights, std::optional<Tensor> valid, std::optional<Tensor> cu_seqlens, int64_t top_k,
    std::string score_function, std::string softmax_order, bool renormalize, double scaling_factor, int64_t num_groups,
    int64_t group_topk, std::string group_rule, std::string weights_mode, std::string aux_counts, bool want_z,
    bool want_probs, bool want_scores, std::string map_format, bool want_losses, double aux_coeff, double z_coeff) {
  return forward(
      nullptr, logits, {std::nullopt, expert_bias,    replay_ids,    replay_weights, valid,          cu_seqlens,
                        top_k,        score_function, softmax_order, renormalize,    scaling_factor, num_groups,
                        group_topk,   group_rule,     weights_mode,  aux_counts,     want_z,         want_probs,
                        want_scores,  map_format,     want_losses,   aux_coeff,      z_coeff});
}

// The same, and the ids into the caller's buffer.
Outputs route_topk_into(
    const Tensor& logits, std::optional<Tensor> expert_bias, std::optional<Tensor> replay_ids,
    std::optional<Tensor> replay_weights, std::optional<Tensor> valid, std::optional<Tensor> cu_seqlens,
    Tensor id_buffer, int64_t top_k, std::string score_function, std::string softmax_order, bool renormalize,
    double scaling_factor, int64_t num_groups, int64_t group_topk, std::string group_rule, std::string weights_mode,
    std::string aux_counts, bool want_z, bool want_probs, bool want_scores, std::string map_format, bool want_losses,
    double aux_coeff, double z_coeff) {
  return forward(
      nullptr, logits, {id_buffer,   expert_bias,    replay_ids,    replay_weights, valid,          cu_seqlens,
                        top_k,       score_function, softmax_order, renormalize,    scaling_factor, num_groups,
                        group_topk,  group_rule,     weights_mode,  aux_counts,     want_z,         want_probs,
                        want_scores, map_format,     want_losses,   aux_coeff,      z_coeff});
}

// ------------------------------------------------------------------------------------------------------------ backward

Tensor route_topk_bwd(
    std::optional<Tensor> d_weights, std::optional<Tensor> d_score_sum, std::optional<Tensor> d_z,
    std::optional<Tensor> d_probs, std::optional<Tensor> d_scores, const Tensor& logits_any, const Tensor& ids_any,
    std::optional<Tensor> replay_ids, std::optional<Tensor> cu_seqlens, std::string score_function,
    std::string softmax_order, bool renormalize, double scaling_factor, std::string weights_mode) {
  STD_TORCH_CHECK(logits_any.is_cuda() && logits_any.dim() == 2, "logits must be a CUDA tensor [T, E]");
  const DeviceGuard guard(logits_any.get_device_index());
  const Tensor logits = logits_any.is_contiguous() ? logits_any : torch::stable::contiguous(logits_any);
  const Tensor ids = ids_any.is_contiguous() ? ids_any : torch::stable::contiguous(ids_any);
  const int64_t T = logits.size(0), E = logits.size(1), K = ids.size(1);
  STD_TORCH_CHECK(E >= 1 && E <= kMaxExperts, "the CUDA router takes 1 to ", kMaxExperts, " experts, got ", E);
  check_tensor(ids, "ids", ScalarType::Int, 2);
  check_size(ids, "ids", 0, T);
  d_weights = dense(d_weights), d_score_sum = dense(d_score_sum), d_z = dense(d_z), d_probs = dense(d_probs);
  d_scores = dense(d_scores), replay_ids = dense(replay_ids), cu_seqlens = dense(cu_seqlens);
  const int64_t S = cu_seqlens ? cu_seqlens->size(0) - 1 : 1;
  if (d_weights) check_shape(*d_weights, "d_weights", logits, {T, K});
  if (d_score_sum) check_shape(*d_score_sum, "d_score_sum", logits, {S, E});
  if (d_z) check_shape(*d_z, "d_z", logits, {1});
  if (d_probs) check_shape(*d_probs, "d_probs", logits, {T, E});
  if (d_scores) check_shape(*d_scores, "d_scores", logits, {T, E});
  if (replay_ids) check_shape(*replay_ids, "replay_ids", logits, {T, K});

  Tensor d_logits = new_empty(logits, {T, E}, logits.scalar_type());
  if (T == 0) return d_logits;
  Backward p = {};
  p.logits = {logits.const_data_ptr(), float_kind(logits, "logits")};
  p.d_weights = float_array(d_weights, "d_weights"), p.d_score_sum = float_array(d_score_sum, "d_score_sum");
  p.d_z = float_array(d_z, "d_z"), p.d_probs = float_array(d_probs, "d_probs"),
  p.d_scores = float_array(d_scores, "d_scores");
  p.ids = static_cast<const int32_t*>(ids.const_data_ptr());
  const bool recorded = choice(weights_mode, "weights_mode", {"live", "recorded", "straight_through"}) == 1;
  p.replay = recorded ? int_array(replay_ids, "replay_ids") : IntArray{nullptr, kI32};
  p.cu_seqlens = int_array(cu_seqlens, "cu_seqlens");
  p.tokens = T, p.experts = static_cast<int>(E), p.top_k = to_int32(K, "top_k"), p.sequences = to_int32(S, "sequences");
  p.score = choice(score_function, "score_function", {"softmax", "sigmoid", "sqrtsoftplus"});
  const bool pre = choice(softmax_order, "softmax_order", {"pre", "post"}) == 0;
  p.weight_rule = weight_rule(p.score, pre, renormalize, K);
  p.scale = static_cast<float>(scaling_factor), p.scale_wide = scaling_factor;
  const bool through_weights = d_weights || d_probs;
  p.dense = d_score_sum || d_z || d_scores || (through_weights && p.weight_rule == kPreSoftmax);
  p.d_logits = d_logits.mutable_data_ptr();
  p.vector = p.logits.kind != kF64 && rows_aligned(p.logits.data, E) && rows_aligned(p.d_logits, E) &&
             (p.d_scores.data == nullptr || rows_aligned(p.d_scores.data, E)) &&
             (p.d_score_sum.data == nullptr || rows_aligned(p.d_score_sum.data, E));
  STD_TORCH_CHECK(
      p.logits.kind == kF64 || (p.d_score_sum.kind == kF32 && p.d_scores.kind == kF32),
      "d_score_sum and d_scores must be float32, the dtype of what they are gradients of");
  const cudaStream_t stream = current_stream(logits);
  const int sms = sm_count(logits.get_device_index());
  if (p.logits.kind == kF64 || E > kMaxFastExperts || K > kMaxFastK) {
    launch_backward_generic(p, static_cast<int>(T < 8 * sms ? T : 8 * sms), stream);
  } else {
    launch_backward_rows(p, sms, stream);
  }
  return d_logits;
}

}  // namespace moe_layer::router

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) {
  m.impl("route_topk", TORCH_BOX(&moe_layer::router::route_topk));
  m.impl("route_topk_into", TORCH_BOX(&moe_layer::router::route_topk_into));
  m.impl("route_topk_bwd", TORCH_BOX(&moe_layer::router::route_topk_bwd));
}
