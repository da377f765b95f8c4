// dispatch.cu -- the C interface: plans, workspace, choice of the element type, the last sum.
#include "launch.h"
#include "row_math.cuh"

namespace wce_cuda {

wce_cuda_status launched(const char *kernel) {
  const cudaError_t error = cudaGetLastError();
  return {static_cast<int32_t>(error), kernel, error ? cudaGetErrorString(error) : ""};
}

// ---- the kernels that belong to no element type -------------------------------------------------

template <class A>
__global__ void __launch_bounds__(256)
finish_sums(wce_cuda_total total, const sums *partials, int64_t n) {
  WCE_SHARED(shared);
  sums mine;
  mine.clear();
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) mine.add(partials[k]);
  const sums all = sum_block(mine, reinterpret_cast<sums *>(shared));
  if (threadIdx.x == 0) finish_total<A>(total, all);
}

template <class A>
__global__ void __launch_bounds__(256)
sum_weights(const A *weight, int64_t classes, A *result) {
  WCE_SHARED(shared);
  sums mine;
  mine.clear();
  for (int64_t c = threadIdx.x; c < classes; c += blockDim.x)
    mine.weight += static_cast<double>(weight[c]);
  const sums all = sum_block(mine, reinterpret_cast<sums *>(shared));
  if (threadIdx.x == 0) *result = static_cast<A>(all.weight);
}

// ---- plans --------------------------------------------------------------------------------------
// Constants are the same for every card: the order of sums must not depend on it.

constexpr int64_t most_partials = 8192;      // blocks that leave a partial sum
constexpr int64_t most_blocks = 1 << 20;     // of a launch without sums
constexpr int64_t one_block_bytes = 65536;   // below, one block does everything in one launch
constexpr int64_t narrow_classes = 32;       // rows this short: a thread per row
constexpr int64_t narrow_bytes = 12288;      // of a tile; a block has two
constexpr int64_t chunk_columns = 2048;      // least of a chunk
constexpr int64_t busy_items = 1024;         // as many chunks keep a large card busy
constexpr int64_t most_columns = 1 << 30;    // columns of a chunk are counted in 32 bits

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t rows_of(const wce_problem &p) { return p.outer * p.inner; }

static int64_t power_of_two(int64_t at_least, int64_t low, int64_t high) {
  int64_t n = low;
  while (n < at_least && n < high) n *= 2;
  return n;
}

// Rows lie one after the other, without gaps.
static bool is_packed(const wce_problem &p, const wce_view &v) {
  return v.stride_class == 1 && (p.inner == 1 || v.stride_inner == p.classes) &&
         (p.outer == 1 || v.stride_outer == p.inner * p.classes);
}

// Few rows: a tile per block. Many: several, so that the next one comes in meanwhile.
static int64_t narrow_blocks(int64_t tiles) {
  const int64_t blocks = ceil_div(tiles, 4);
  return blocks < 2048 ? 2048 : blocks < most_partials ? blocks : most_partials;
}

static wce_cuda_plan narrow_plan(const wce_problem &p) {
  const int element_bytes = bytes_of(p.dtype) + (p.prob.data ? bytes_of(p.prob_dtype) : 0);
  const int64_t row_bytes = p.classes * element_bytes;
  int threads = 128;
  while (threads > 32 && row_bytes * threads > narrow_bytes) threads /= 2;
  int64_t turns = narrow_bytes / (row_bytes * threads);
  if (turns < 1) turns = 1;
  if (turns > 8) turns = 8;
  wce_cuda_plan plan = {WCE_CUDA_NARROW, threads, 1, threads * turns, p.classes, 1, 0};
  if (rows_of(p) < plan.tile) plan.tile = rows_of(p);
  plan.blocks = narrow_blocks(plan.tile > 0 ? ceil_div(rows_of(p), plan.tile) : 0);
  return plan;
}

static wce_cuda_plan rows_plan(const wce_problem &p) {
  const int64_t vector = 16 / bytes_of(p.dtype), rows = rows_of(p);
  int64_t chunks = ceil_div(p.classes, most_columns);
  if (chunks < 1) chunks = 1;
  if (rows < busy_items / 2) {
    const int64_t wanted = ceil_div(busy_items, rows > 0 ? rows : 1);
    const int64_t possible = p.classes / chunk_columns;
    const int64_t cut = wanted < possible ? wanted : possible;
    if (cut > chunks) chunks = cut;
  }
  int64_t columns = ceil_div(p.classes, chunks);
  if (chunks > 1) columns = ceil_div(columns, 64) * 64;
  if (columns > 0) chunks = ceil_div(p.classes, columns);
  if (chunks < 1) chunks = 1;
  const int64_t vectors = ceil_div(columns, vector);
  wce_cuda_plan plan = {WCE_CUDA_ROWS, 256, 0, 0, columns, chunks, 0};
  if (vectors <= 32 * 8) {
    plan.lanes = static_cast<int32_t>(power_of_two(ceil_div(vectors, 4), 4, 32));
  } else {
    plan.threads = vectors <= 1024 ? 128 : 256;
    plan.lanes = plan.threads;
  }
  return plan;
}

static wce_cuda_plan planes_plan(const wce_problem &p) {
  const int64_t vector = 16 / bytes_of(p.dtype);
  const int64_t units = p.outer * ceil_div(p.inner, vector);
  int64_t slices = 1;
  while (slices < 16 && units * slices < 65536 && p.classes >= slices * 32) slices *= 2;
  return {WCE_CUDA_PLANES, 128, static_cast<int32_t>(128 / slices), 0, p.classes, 1, 0};
}

static int64_t turns_of(const wce_cuda_plan &plan, const wce_problem &p) {
  if (plan.regime == WCE_CUDA_NARROW) return ceil_div(rows_of(p), plan.tile > 0 ? plan.tile : 1);
  if (plan.regime == WCE_CUDA_ROWS)
    return ceil_div(rows_of(p) * plan.chunks, plan.threads / plan.lanes);
  const int64_t vector = 16 / bytes_of(p.dtype);
  return ceil_div(p.outer * ceil_div(p.inner, vector), plan.lanes);
}

static int64_t at_most(int64_t n, int64_t most) { return n < 1 ? 1 : n < most ? n : most; }

static bool is_narrow(const wce_problem &p) {
  return p.classes > 0 && p.classes <= narrow_classes && is_packed(p, p.logits) &&
         (!p.prob.data || is_packed(p, p.prob));
}

// Positions side by side, and more than one of them or a class dimension that is not contiguous.
static bool is_planes(const wce_problem &p) {
  return p.logits.stride_class != 1 && p.classes > 1;
}

static int64_t logit_bytes(const wce_problem &p) {
  return rows_of(p) * p.classes * bytes_of(p.dtype);
}

// Blocks that leave a partial sum in forward.
static int64_t sum_blocks(const wce_cuda_plan &plan, const wce_problem &p) {
  if (plan.chunks > 1) return at_most(ceil_div(rows_of(p), combine_threads / 32), most_partials);
  return at_most(turns_of(plan, p), plan.blocks);
}

static size_t round16(size_t bytes) { return (bytes + 15) & ~size_t(15); }

static size_t piece_bytes(const wce_cuda_plan &plan, const wce_problem &p) {
  if (plan.chunks == 1) return 0;
  const size_t one = p.dtype == WCE_F64 ? sizeof(stats<double, ENTROPY>)
                                        : sizeof(stats<float, ENTROPY>);
  return round16(static_cast<size_t>(rows_of(p) * plan.chunks) * one);
}

static bool needs_weight_sum(const wce_problem &p) {
  return p.floor != 0 && p.weight && !p.prob.data;
}
static bool needs_pieces(const wce_cuda_plan &plan, const wce_problem &p, const wce_row_grads &g) {
  return plan.chunks > 1 && (!g.max || needs_coefficients(p, g));
}

static wce_cuda_status too_large(const char *kernel) {
  return {static_cast<int32_t>(cudaErrorInvalidValue), kernel, "too many classes for this layout"};
}

static bool fits(const wce_cuda_plan &plan, const wce_problem &p) {
  return plan.regime == WCE_CUDA_ROWS || p.classes < most_columns;
}

}  // namespace wce_cuda

using namespace wce_cuda;

extern "C" wce_cuda_plan wce_cuda_forward_plan(const wce_problem *problem) {
  const wce_problem &p = *problem;
  wce_cuda_plan plan = is_narrow(p)   ? narrow_plan(p)
                       : is_planes(p) ? planes_plan(p)
                                      : rows_plan(p);
  if (plan.regime != WCE_CUDA_NARROW) plan.blocks = most_partials;
  if (logit_bytes(p) <= one_block_bytes && plan.chunks == 1) {
    plan.blocks = 1;
    if (plan.regime == WCE_CUDA_NARROW) plan.threads = 256;
  }
  return plan;
}

extern "C" wce_cuda_plan wce_cuda_backward_plan(const wce_problem *problem,
                                                const wce_row_grads *grads) {
  const wce_problem &p = *problem;
  wce_cuda_plan plan = is_narrow(p) && is_packed(p, grads->dx) ? narrow_plan(p)
                       : is_planes(p)                          ? planes_plan(p)
                                                               : rows_plan(p);
  if (plan.regime != WCE_CUDA_NARROW) plan.blocks = most_blocks;
  return plan;
}

extern "C" size_t wce_cuda_forward_workspace(const wce_cuda_plan *plan,
                                             const wce_problem *problem) {
  return round16(static_cast<size_t>(sum_blocks(*plan, *problem)) * sizeof(sums)) +
         piece_bytes(*plan, *problem);
}

extern "C" size_t wce_cuda_backward_workspace(const wce_cuda_plan *plan,
                                              const wce_problem *problem,
                                              const wce_row_grads *grads) {
  return 16 + (needs_pieces(*plan, *problem, *grads) ? piece_bytes(*plan, *problem) : 0);
}

static wce_cuda_status start_check(uint64_t *bad, void *stream) {
  if (!bad) return {};
  cudaMemsetAsync(bad, 0xff, sizeof *bad, static_cast<cudaStream_t>(stream));
  return launched("memset of the bad row");
}

extern "C" wce_cuda_status wce_cuda_forward(const wce_cuda_plan *plan, const wce_problem *problem,
                                            const wce_row_outputs *out, const wce_cuda_total *total,
                                            void *workspace, uint64_t *bad, void *stream) {
  if (!fits(*plan, *problem)) return too_large("forward");
  wce_cuda_status status = start_check(bad, stream);
  if (status.code) return status;
  const int64_t partials = sum_blocks(*plan, *problem);
  const int64_t most = plan->chunks > 1 ? most_blocks : plan->blocks;
  launch l = {};
  l.plan = plan;
  l.problem = problem;
  l.out = out;
  l.total = total;
  l.blocks = at_most(turns_of(*plan, *problem), most);
  l.sum_blocks = partials;
  l.workspace = workspace;
  l.pieces = static_cast<char *>(workspace) + round16(partials * sizeof(sums));
  l.bad = bad;
  l.stream = stream;
  switch (problem->dtype) {
    case WCE_F64: status = forward_f64(l); break;
    case WCE_BF16: status = forward_bf16(l); break;
    case WCE_F16: status = forward_f16(l); break;
    default: status = forward_f32(l); break;
  }
  if (status.code || partials == 1 || total->reduction == WCE_NONE) return status;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const sums *from = static_cast<const sums *>(workspace);
  if (problem->dtype == WCE_F64) {
    auto kernel = finish_sums<double>;
    WCE_LAUNCH(kernel, 1, 256, 8 * sizeof(sums), on, *total, from, partials);
  } else {
    auto kernel = finish_sums<float>;
    WCE_LAUNCH(kernel, 1, 256, 8 * sizeof(sums), on, *total, from, partials);
  }
  return launched("finish_sums");
}

static wce_cuda_status start_weight_sum(const wce_problem &p, void *result, void *stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (p.dtype == WCE_F64) {
    auto kernel = sum_weights<double>;
    WCE_LAUNCH(kernel, 1, 256, 8 * sizeof(sums), on, static_cast<const double *>(p.weight),
               p.classes, static_cast<double *>(result));
  } else {
    auto kernel = sum_weights<float>;
    WCE_LAUNCH(kernel, 1, 256, 8 * sizeof(sums), on, static_cast<const float *>(p.weight),
               p.classes, static_cast<float *>(result));
  }
  return launched("sum_weights");
}

extern "C" wce_cuda_status wce_cuda_backward(const wce_cuda_plan *plan, const wce_problem *problem,
                                             const wce_row_grads *grads, void *workspace,
                                             uint64_t *bad, void *stream) {
  if (!fits(*plan, *problem)) return too_large("backward");
  wce_cuda_status status = start_check(bad, stream);
  if (status.code || rows_of(*problem) == 0 || problem->classes == 0) return status;
  launch l = {};
  if (needs_weight_sum(*problem) && plan->regime != WCE_CUDA_NARROW) {
    status = start_weight_sum(*problem, workspace, stream);
    if (status.code) return status;
    l.weight_sum = workspace;
  }
  l.plan = plan;
  l.problem = problem;
  l.grads = grads;
  l.blocks = at_most(turns_of(*plan, *problem), plan->blocks);
  if (needs_pieces(*plan, *problem, *grads)) l.pieces = static_cast<char *>(workspace) + 16;
  l.bad = bad;
  l.stream = stream;
  switch (problem->dtype) {
    case WCE_F64: return backward_f64(l);
    case WCE_BF16: return backward_bf16(l);
    case WCE_F16: return backward_f16(l);
    default: return backward_f32(l);
  }
}

extern "C" wce_cuda_status wce_cuda_read(void *host, const void *device, size_t bytes,
                                         void *stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, on);
  cudaStreamSynchronize(on);
  return launched("copy to the host");
}

extern "C" int wce_cuda_is_capturing(void *stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return status != cudaStreamCaptureStatusNone;
}

extern "C" int wce_cuda_runtime_version(void) {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}
