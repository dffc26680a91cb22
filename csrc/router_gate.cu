// moe_layer::gate_topk on CUDA: checks, TMA maps, and the choice of tile; see router_gate.cuh for the kernel.
#include "router_gate.cuh"

#include "router_entry.cuh"

namespace moe_layer::router {

struct GateInput {
  Tensor x, weight;  // bf16, contiguous
  Gate args;
  int tokens, slices;  // of a tile; blocks that share a tile
};

int64_t gate_tokens(const GateInput& gate) { return gate.x.size(0); }

int gate_blocks(const GateInput& gate) {
  return static_cast<int>(gate.slices * ceil_div<int64_t>(gate.x.size(0), gate.tokens));
}

namespace {

// Columns of 64, `rows` rows a box, of a contiguous bf16 matrix; what lies outside is read as 0.
CUtensorMap tile_map(const Tensor& matrix, int rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
    STD_TORCH_CHECK(status == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled; update it");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.size(1)), static_cast<cuuint64_t>(matrix.size(0))};
  const cuuint64_t stride[1] = {sizes[0] * 2};
  const cuuint32_t box[2] = {kGateColumns, static_cast<cuuint32_t>(rows)}, one[2] = {1, 1};
  const CUresult result = encode(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix.const_data_ptr()), sizes, stride, box, one,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(
      result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refuses a matrix [", sizes[1], ", ", sizes[0], "], error ",
      static_cast<int>(result));
  return map;
}

// As TMA reads it: dense, from an address that is a multiple of 16.
Tensor ready(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

template <int L, int C, int MODE, int EXPERTS, int TOKENS, int SLICES>
void launch(Forward args, const GateInput& gate, cudaStream_t stream) {
  using Tile = GateTile<EXPERTS, TOKENS>;
  LeanShape shape = {Layout<L, C>::kRows, 1, 0};
  while (shape.slot_lanes < args.top_k) shape.slot_lanes *= 2, ++shape.slot_shift;
  const int64_t bytes = 1024 + Tile::kStages * Tile::kStageBytes + lean_bytes<L, C, MODE, kGateThreads>(args, shape);
  static_assert(Tile::kStages * Tile::kStageBytes >= TOKENS * (EXPERTS + 4) * 4, "the tile stands over the ring");
  const bool live = args.valid == nullptr && args.replay.data == nullptr;
  auto kernel = live ? gate_kernel<L, C, MODE, EXPERTS, TOKENS, SLICES, kLiveTask>
                     : gate_kernel<L, C, MODE, EXPERTS, TOKENS, SLICES, kAnyTask>;
  allow_shared_memory(kernel, bytes);
  const CUtensorMap x_map = tile_map(gate.x, TOKENS), weight_map = tile_map(gate.weight, EXPERTS);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {SLICES, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(gate_blocks(gate));
  config.blockDim = dim3(kGateThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, x_map, weight_map, args, gate.args, shape));
}

// Lanes of a row such that a block's rows are spread over all its warps: 8 rows a warp, of few tokens 2.
template <int MODE>
void launch_mode(const Forward& args, const GateInput& gate, cudaStream_t stream) {
  const bool few = gate.slices == 2;
  if (args.experts <= 64) {
    return (few ? launch<16, 1, MODE, 64, 64, 2> : launch<4, 2, MODE, 64, 128, 1>)(args, gate, stream);
  }
  return (few ? launch<16, 1, MODE, 128, 64, 2> : launch<8, 2, MODE, 128, 128, 1>)(args, gate, stream);
}

using GateOutputs = decltype(std::tuple_cat(std::tuple<Tensor>(), Outputs()));

GateOutputs gate_topk(
    const Tensor& x_any, const Tensor& weight_any, std::optional<Tensor> gate_bias, std::optional<Tensor> expert_bias,
    std::optional<Tensor> replay_ids, std::optional<Tensor> replay_weights, std::optional<Tensor> valid,
    bool want_logits, int64_t top_k, std::string score_function, std::string softmax_order, bool renormalize,
    double scaling_factor, int64_t num_groups, int64_t group_topk, std::string group_rule, std::string weights_mode,
    std::string aux_counts, bool want_z, bool want_losses, double aux_coeff, double z_coeff) {
  STD_TORCH_CHECK(x_any.is_cuda() && x_any.dim() == 2, "x must be a CUDA tensor [T, D]");
  const DeviceGuard guard(x_any.get_device_index());
  const Tensor x = ready(x_any), weight = ready(weight_any);
  check_tensor(x, "x", ScalarType::BFloat16, 2);
  check_tensor(weight, "weight", ScalarType::BFloat16, 2);
  check_same_device(weight, "weight", x);
  const int64_t T = x.size(0), D = x.size(1), E = weight.size(0);
  check_size(weight, "weight", 1, D);
  STD_TORCH_CHECK(
      E % 8 == 0 && E >= 16 && E <= 128 && D % 8 == 0 && D > 0,
      "the gate's kernel takes 16 to 128 experts, and experts and columns in multiples of 8; got weight [", E, ", ", D,
      "]; multiply apart and use route_topk");
  to_int32(T + 128, "tokens"), to_int32(D + kGateColumns, "columns");  // coordinates of TMA
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index()));
  STD_TORCH_CHECK(major == 9, "the gate's kernel needs compute capability 9, got ", major, "; use route_topk");
  Tensor logits = new_empty(x, {want_logits ? T : 0, E}, ScalarType::Float);
  Gate args = {{nullptr, kF32}, want_logits ? out_ptr<float>(logits) : nullptr, 0};
  if (gate_bias) {
    check_same_device(*gate_bias, "gate_bias", x);
    check_size(*gate_bias, "gate_bias", 0, E);
    const ScalarType type = gate_bias->scalar_type();
    STD_TORCH_CHECK(
        gate_bias->is_contiguous() && (type == ScalarType::Float || type == ScalarType::BFloat16),
        "gate_bias must be contiguous, float32 or bfloat16");
    args.bias = {gate_bias->const_data_ptr(), type == ScalarType::Float ? kF32 : kBF16};
  }
  args.steps = static_cast<int>(ceil_div<int64_t>(D, kGateColumns));
  // About as many blocks as multiprocessors for 4096 tokens as for 16384. Two slices of 128 tokens for the sizes between were no faster
  // than two launches (H200).
  const bool few = T <= 32ll * sm_count(x.get_device_index());
  const GateInput gate = {x, weight, args, few ? 64 : 128, few ? 2 : 1};
  auto out =
      forward(&gate, logits, {std::nullopt, expert_bias,    replay_ids,    replay_weights, valid,          std::nullopt,
                              top_k,        score_function, softmax_order, renormalize,    scaling_factor, num_groups,
                              group_topk,   group_rule,     weights_mode,  aux_counts,     want_z,         false,
                              false,        "none",         want_losses,   aux_coeff,      z_coeff});
  return std::tuple_cat(std::make_tuple(logits), out);
}

}  // namespace

void launch_gate(const Forward& args, const GateInput& gate, bool keyed, cudaStream_t stream) {
  STD_TORCH_CHECK(keyed || args.score == kSoftmax, "the gate's kernel takes a sigmoid only with expert_bias or groups");
  (keyed ? launch_mode<kSigmoidKeyed> : launch_mode<kSoftmaxPlain>)(args, gate, stream);
}

}  // namespace moe_layer::router

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("gate_topk", TORCH_BOX(&moe_layer::router::gate_topk)); }
