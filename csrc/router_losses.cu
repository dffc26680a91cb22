// moe_layer::batch_losses and its backward on CUDA: one small launch each. Formulas: moe_layer/ops/batch_losses.py.

#include "router_losses.cuh"

#include <tuple>

namespace moe_layer::router {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

struct LossGradients {
  const float *d_summary, *d_scaled, *summary;
  const int32_t* aux_counts;
  int experts, top_k;
  bool has_z;
  float aux_coeff, z_coeff;
  float *d_score_sum, *d_z;
};

// One block. Sums run in fp64 in a fixed order.
__global__ void __launch_bounds__(kThreads) losses_kernel(const __grid_constant__ Losses p) {
  __shared__ double parts[3][kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  start_next_kernel();
  rehearse([&](bool real) {
    double slots = 0.0, aux_slots = 0.0, product = 0.0;
#pragma unroll 1
    for (int e = threadIdx.x; e < p.experts || e == static_cast<int>(threadIdx.x); e += kThreads) {
      const bool here = real && e < p.experts, aux = here && p.aux_counts != nullptr;
      slots += here ? __ldcg(p.counts + e) : 0;
      const double count = aux ? __ldcg(p.aux_counts + e) : 0;
      aux_slots += count;
      product += count * static_cast<double>(aux ? __ldcg(p.score_sum + e) : 0.0f);
    }
    const double z_sum = real && p.z_sum != nullptr ? __ldcg(p.z_sum) : 0.0f;
    slots = warp_sum(slots), aux_slots = warp_sum(aux_slots), product = warp_sum(product);
    if (lane == 0) parts[0][warp] = slots, parts[1][warp] = aux_slots, parts[2][warp] = product;
    __syncthreads();
    if (warp == 0) {
      slots = warp_sum(lane < kWarps ? parts[0][lane] : 0.0);
      aux_slots = warp_sum(lane < kWarps ? parts[1][lane] : 0.0);
      product = warp_sum(lane < kWarps ? parts[2][lane] : 0.0);
      write_losses(p, slots, aux_slots, product, z_sum, real);
    }
    __syncthreads();
  });
}

__global__ void __launch_bounds__(kThreads) losses_backward_kernel(const __grid_constant__ LossGradients p) {
  start_next_kernel();  // the router's backward may get ready
  await_previous_kernel();
  const int e = blockIdx.x * kThreads + threadIdx.x;
  const double tokens = p.summary[3] > 1.0f ? p.summary[3] : 1.0;
  auto gradient = [&](int index, int position, float coeff) -> double {
    return (p.d_scaled != nullptr ? static_cast<double>(p.d_scaled[position]) * coeff : 0.0) +
           (p.d_summary != nullptr ? p.d_summary[index] : 0.0f);
  };
  if (p.aux_counts != nullptr && e < p.experts) {
    const double per_slot = gradient(0, 0, p.aux_coeff) * p.experts / (p.top_k * tokens * tokens);
    p.d_score_sum[e] = static_cast<float>(per_slot * p.aux_counts[e]);
  }
  if (p.has_z && e == 0) {
    p.d_z[0] = static_cast<float>(gradient(1, p.aux_counts != nullptr ? 1 : 0, p.z_coeff) / tokens);
  }
}

}  // namespace

void launch_losses(const Losses& args, cudaStream_t stream) {
  launch_beside(losses_kernel, 1, kThreads, 0, stream, args);
}

namespace {

const float* floats(const std::optional<Tensor>& t, const char* name, int64_t size) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(
      t->is_cuda() && t->scalar_type() == ScalarType::Float && t->numel() == size, name,
      " must be a CUDA fp32 tensor of ", size, " entries");
  return static_cast<const float*>(t->const_data_ptr());
}

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t && !t->is_contiguous() ? std::optional<Tensor>(torch::stable::contiguous(*t)) : t;
}

const int32_t* integers(const std::optional<Tensor>& t, const char* name, int64_t size) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(
      t->is_cuda() && t->scalar_type() == ScalarType::Int && t->numel() == size && t->is_contiguous(), name,
      " must be a contiguous CUDA int32 tensor of ", size, " entries");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

std::tuple<Tensor, Tensor> batch_losses(
    const Tensor& counts, std::optional<Tensor> aux_counts, std::optional<Tensor> score_sum,
    std::optional<Tensor> z_sum, int64_t top_k, double aux_coeff, double z_coeff) {
  STD_TORCH_CHECK(aux_counts.has_value() == score_sum.has_value(), "aux_counts and score_sum must be given together");
  STD_TORCH_CHECK(counts.is_cuda() && counts.numel() > 0, "counts must be a CUDA tensor [E]");
  const DeviceGuard guard(counts.get_device_index());
  score_sum = dense(score_sum);
  Losses p = {};
  p.experts = to_int32(counts.numel(), "experts"), p.top_k = to_int32(top_k, "top_k");
  p.counts = integers(counts, "counts", p.experts), p.aux_counts = integers(aux_counts, "aux_counts", p.experts);
  p.score_sum = floats(score_sum, "score_sum", p.experts), p.z_sum = floats(z_sum, "z_sum", 1);
  p.aux_coeff = static_cast<float>(aux_coeff), p.z_coeff = static_cast<float>(z_coeff);
  Tensor summary = new_empty(counts, {5}, ScalarType::Float);
  Tensor scaled = new_empty(counts, {(aux_counts ? 1 : 0) + (z_sum ? 1 : 0)}, ScalarType::Float);
  p.summary = out_ptr<float>(summary), p.scaled = out_ptr<float>(scaled);
  launch_losses(p, current_stream(counts));
  return {summary, scaled};
}

std::tuple<Tensor, Tensor> batch_losses_bwd(
    std::optional<Tensor> d_summary, std::optional<Tensor> d_scaled, const Tensor& summary,
    std::optional<Tensor> aux_counts, bool has_z, int64_t top_k, double aux_coeff, double z_coeff) {
  const DeviceGuard guard(summary.get_device_index());
  d_summary = dense(d_summary), d_scaled = dense(d_scaled);
  LossGradients p = {};
  p.d_summary = floats(d_summary, "d_summary", 5), p.summary = floats(summary, "summary", 5);
  p.d_scaled = floats(d_scaled, "d_scaled", (aux_counts ? 1 : 0) + (has_z ? 1 : 0));
  p.experts = aux_counts ? to_int32(aux_counts->numel(), "experts") : 0, p.top_k = to_int32(top_k, "top_k");
  p.aux_counts = integers(aux_counts, "aux_counts", p.experts), p.has_z = has_z;
  p.aux_coeff = static_cast<float>(aux_coeff), p.z_coeff = static_cast<float>(z_coeff);
  Tensor d_score_sum =
      aux_counts ? new_empty(summary, {1, p.experts}, ScalarType::Float) : new_empty(summary, {0}, ScalarType::Float);
  Tensor d_z = new_empty(summary, {has_z ? 1 : 0}, ScalarType::Float);
  p.d_score_sum = out_ptr<float>(d_score_sum), p.d_z = out_ptr<float>(d_z);
  const int blocks = p.experts > kThreads ? ceil_div(p.experts, kThreads) : 1;
  launch_beside(losses_backward_kernel, blocks, kThreads, 0, current_stream(summary), p);
  return {d_score_sum, d_z};
}

}  // namespace
}  // namespace moe_layer::router

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) {
  m.impl("batch_losses", TORCH_BOX(&moe_layer::router::batch_losses));
  m.impl("batch_losses_bwd", TORCH_BOX(&moe_layer::router::batch_losses_bwd));
}
