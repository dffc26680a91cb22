// Counters of one backward pass, in one launch. Twin of moe_layer/ops/count_pass.py.

#include "common.cuh"

namespace moe_layer {
namespace {

constexpr int kThreads = 256;

struct CountArgs {
  int64_t* tokens_per_expert;
  const int32_t* counts;
  int64_t* aux_history;
  const int32_t* aux_counts;
  float* log_sums;
  const float* log_values;
  const int32_t* log_events;
  int32_t experts, histories, sums, values;
};

__global__ void __launch_bounds__(kThreads) count_pass_kernel(CountArgs args) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < args.experts) args.tokens_per_expert[i] += args.counts[i];
  if (i < args.histories) args.aux_history[i] += args.aux_counts[i];
  if (i < args.values) {
    args.log_sums[i] += args.log_values[i];
  } else if (i < args.sums) {
    args.log_sums[i] += static_cast<float>(args.log_events[i - args.values]);
  }
}

// Entries of an integer counter and its addend; 0 when one of them is absent.
int32_t pair_size(const std::optional<Tensor>& counter, const std::optional<Tensor>& addend, const char* name) {
  if (!counter.has_value() || !addend.has_value()) return 0;
  check_tensor(*counter, name, ScalarType::Long, counter->dim());
  check_tensor(*addend, "what is added to a counter", ScalarType::Int, addend->dim());
  STD_TORCH_CHECK(
      counter->numel() == addend->numel(), name, " has ", counter->numel(), " entries and what is added to it ",
      addend->numel());
  return to_int32(counter->numel(), name);
}

void count_pass(
    std::optional<Tensor> tokens_per_expert, const std::optional<Tensor>& counts, std::optional<Tensor> log_sums,
    const std::optional<Tensor>& log_values, const std::optional<Tensor>& log_events, std::optional<Tensor> aux_history,
    const std::optional<Tensor>& aux_counts) {
  CountArgs args{};
  args.experts = pair_size(tokens_per_expert, counts, "tokens_per_expert");
  args.histories = pair_size(aux_history, aux_counts, "aux_history");
  if (log_sums.has_value() && log_values.has_value()) {
    check_tensor(*log_sums, "log_sums", ScalarType::Float, 1);
    check_tensor(*log_values, "log_values", ScalarType::Float, 1);
    args.values = to_int32(log_values->numel(), "log_values");
    args.sums = args.values;
    if (log_events.has_value()) {
      check_tensor(*log_events, "log_events", ScalarType::Int, 1);
      args.sums = to_int32(log_sums->numel(), "log_sums");
      STD_TORCH_CHECK(
          args.sums - args.values <= log_events->numel(), "log_events has ", log_events->numel(), " entries, ",
          args.sums - args.values, " are wanted");
      args.log_events = in_ptr<int32_t>(*log_events);
    }
    STD_TORCH_CHECK(args.values <= log_sums->numel(), "log_sums is shorter than log_values");
    args.log_sums = out_ptr<float>(*log_sums);
    args.log_values = in_ptr<float>(*log_values);
  }
  if (args.experts > 0) {
    args.tokens_per_expert = out_ptr<int64_t>(*tokens_per_expert);
    args.counts = in_ptr<int32_t>(*counts);
  }
  if (args.histories > 0) {
    args.aux_history = out_ptr<int64_t>(*aux_history);
    args.aux_counts = in_ptr<int32_t>(*aux_counts);
  }
  int32_t most = args.experts > args.histories ? args.experts : args.histories;
  most = most > args.sums ? most : args.sums;
  if (most == 0) return;
  const Tensor& any = args.experts > 0 ? *tokens_per_expert : (args.histories > 0 ? *aux_history : *log_sums);
  const DeviceGuard guard(any.get_device_index());
  count_pass_kernel<<<ceil_div(most, kThreads), kThreads, 0, current_stream(any)>>>(args);
  MOE_LAUNCH_CHECK();
}

}  // namespace
}  // namespace moe_layer

STABLE_TORCH_LIBRARY_IMPL(moe_layer, CUDA, m) { m.impl("count_pass_", TORCH_BOX(&moe_layer::count_pass)); }
