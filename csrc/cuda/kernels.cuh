// kernels.cuh -- launches the kernels of one element type: see kernels_<dtype>.cu.
#ifndef WCE_CUDA_KERNELS_CUH
#define WCE_CUDA_KERNELS_CUH

#include "launch.h"
#include "narrow.cuh"
#include "planes.cuh"
#include "rows.cuh"

namespace wce_cuda {

// Whether the body that knows nothing but a target will do.
static inline bool is_fast(const wce_problem &p) {
  return !p.prob.data && !p.prior && p.floor == 0 && !p.target2;
}

static inline size_t at_least(size_t bytes, size_t least) { return bytes < least ? least : bytes; }

static inline size_t narrow_shared(const wce_problem &p, const wce_cuda_plan &plan) {
  return at_least(2 * narrow_buffer_bytes(p, plan.tile), plan.threads / 32 * sizeof(sums));
}

template <class T, int BODY>
struct launcher {
  using A = acc<T>;
  using S = stats<A, BODY>;
  const launch &l;
  const wce_problem &p;
  const wce_cuda_plan &plan;
  sums *partials;
  unsigned long long *bad;
  cudaStream_t stream;

  explicit launcher(const launch &all)
      : l(all), p(*all.problem), plan(*all.plan),
        partials(reinterpret_cast<sums *>(all.workspace)),
        bad(reinterpret_cast<unsigned long long *>(all.bad)),
        stream(static_cast<cudaStream_t>(all.stream)) {}

  size_t rows_shared() const {
    return rows_reduce_bytes<S>(plan.threads);
  }
  size_t slices_shared() const {
    const size_t slices = plan.threads / plan.lanes;
    const size_t halves = slices > 1 ? slices / 2 : 0;
    return at_least(halves * plan.lanes * width<T> * sizeof(S), plan.threads / 32 * sizeof(sums));
  }
  S *pieces() const { return reinterpret_cast<S *>(l.pieces); }
  rows_shape shape() const { return {plan.lanes, plan.columns, plan.chunks}; }

  wce_cuda_status scan_chunks(const wce_row_outputs &out, const wce_cuda_total &total) {
    auto kernel = rows_forward<T, BODY>;
    WCE_LAUNCH(kernel, l.blocks, plan.threads, rows_shared(), stream, p, out, total, shape(),
               partials, pieces(), bad);
    return launched("rows_forward (chunks)");
  }

  wce_cuda_status forward() {
    const wce_row_outputs &out = *l.out;
    const wce_cuda_total &total = *l.total;
    if (plan.regime == WCE_CUDA_NARROW) {
      auto kernel = narrow_forward<T, BODY>;
      WCE_LAUNCH(kernel, l.blocks, plan.threads, narrow_shared(p, plan), stream, p, out, total,
                 plan.tile, partials, bad);
      return launched("narrow_forward");
    }
    if (plan.regime == WCE_CUDA_PLANES) {
      auto kernel = planes_forward<T, BODY>;
      WCE_LAUNCH(kernel, l.blocks, plan.threads, slices_shared(), stream, p, out, total,
                 plan.lanes, partials, bad);
      return launched("planes_forward");
    }
    if (plan.chunks == 1) {
      auto kernel = rows_forward<T, BODY>;
      WCE_LAUNCH(kernel, l.blocks, plan.threads, rows_shared(), stream, p, out, total, shape(),
                 partials, static_cast<S *>(nullptr), bad);
      return launched("rows_forward");
    }
    const wce_cuda_status status = scan_chunks(out, total);
    if (status.code) return status;
    auto kernel = rows_combine<T, BODY>;
    const int shared = rows_reduce_bytes<S>(combine_threads);
    WCE_LAUNCH(kernel, l.sum_blocks, combine_threads, shared, stream, p, out, total, plan.chunks,
               partials, static_cast<const S *>(pieces()), bad);
    return launched("rows_combine");
  }

  wce_cuda_status backward() {
    const wce_row_grads &g = *l.grads;
    const A *weight_sum = static_cast<const A *>(l.weight_sum);
    if (plan.regime == WCE_CUDA_NARROW) {
      auto kernel = narrow_backward<T, BODY>;
      WCE_LAUNCH(kernel, l.blocks, plan.threads, narrow_shared(p, plan), stream, p, g, plan.tile,
                 bad);
      return launched("narrow_backward");
    }
    if (plan.regime == WCE_CUDA_PLANES) {
      auto kernel = planes_backward<T, BODY>;
      WCE_LAUNCH(kernel, l.blocks, plan.threads, slices_shared(), stream, p, g, plan.lanes,
                 weight_sum, bad);
      return launched("planes_backward");
    }
    if (l.pieces) {
      const wce_cuda_status status = scan_chunks(wce_row_outputs{}, wce_cuda_total{});
      if (status.code) return status;
    }
    auto kernel = rows_backward<T, BODY>;
    WCE_LAUNCH(kernel, l.blocks, plan.threads, rows_shared(), stream, p, g, shape(), weight_sum,
               static_cast<const S *>(pieces()), bad);
    return launched("rows_backward");
  }
};

template <class T>
wce_cuda_status forward_of(const launch &l) {
  if (l.out->entropy) return launcher<T, ENTROPY>(l).forward();
  return is_fast(*l.problem) ? launcher<T, FAST>(l).forward() : launcher<T, GENERAL>(l).forward();
}

template <class T>
wce_cuda_status backward_of(const launch &l) {
  return is_fast(*l.problem) ? launcher<T, FAST>(l).backward() : launcher<T, GENERAL>(l).backward();
}

}  // namespace wce_cuda
#endif
