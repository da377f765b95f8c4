// narrow.cuh -- few classes, rows packed one after the other: a thread per row.
//
// A tile of rows comes in through shared memory with 16-byte loads, and the gradient leaves the
// same way, so global memory is read and written in full lines. Shared memory keeps the tile's
// offset within 16 bytes, so that both sides of the copy are aligned.
#ifndef WCE_CUDA_NARROW_CUH
#define WCE_CUDA_NARROW_CUH

#include "row_math.cuh"

namespace wce_cuda {

// Copies n elements into shared memory; returns where element 0 lies. Needs n*sizeof(T) + 16 bytes.
template <class T>
WCE_DEVICE T *stage_in(unsigned char *shared, const T *from, int n) {
  constexpr int V = width<T>;
  const frame f = frame_of(from, n);
  T *to = reinterpret_cast<T *>(shared) + (V - f.head) % V;
  if (f.head == n) to = reinterpret_cast<T *>(shared);  // no full vector: any place will do
  const int turn = blockDim.x;
  int v = threadIdx.x;
  for (; v + 3 * turn < f.vectors; v += 4 * turn) {  // four loads in flight
    uint4 raw[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) raw[u] = load16_once(from + f.head + (v + u * turn) * V);
#pragma unroll
    for (int u = 0; u < 4; ++u)
      *reinterpret_cast<uint4 *>(to + f.head + (v + u * turn) * V) = raw[u];
  }
  for (; v < f.vectors; v += turn)
    *reinterpret_cast<uint4 *>(to + f.head + v * V) = load16_once(from + f.head + v * V);
  for (int k = threadIdx.x; k < f.loose; k += turn) to[loose_at<T>(f, k)] = from[loose_at<T>(f, k)];
  return to;
}

// The way back. Where the offsets within 16 bytes differ, element by element.
template <class T>
WCE_DEVICE void stage_out(const T *from, T *to, int n) {
  constexpr int V = width<T>;
  const frame f = frame_of(to, n);
  const int turn = blockDim.x;
  if (aligned16(from + f.head)) {
    for (int v = threadIdx.x; v < f.vectors; v += turn)
      store16_once(to + f.head + v * V,
                   *reinterpret_cast<const uint4 *>(from + f.head + v * V));
    for (int k = threadIdx.x; k < f.loose; k += turn)
      to[loose_at<T>(f, k)] = from[loose_at<T>(f, k)];
  } else {
    for (int k = threadIdx.x; k < n; k += turn) to[k] = from[k];
  }
}

WCE_DEVICE const void *stage_prob(unsigned char *shared, const wce_problem &p, int64_t first,
                                  int n) {
  switch (p.prob_dtype) {
    case WCE_F64: return stage_in(shared, static_cast<const double *>(p.prob.data) + first, n);
    case WCE_BF16:
      return stage_in(shared, static_cast<const __nv_bfloat16 *>(p.prob.data) + first, n);
    case WCE_F16: return stage_in(shared, static_cast<const __half *>(p.prob.data) + first, n);
    default: return stage_in(shared, static_cast<const float *>(p.prob.data) + first, n);
  }
}

// The classes of one row, in shared memory. Walking them from a different class in each thread
// keeps the threads of a warp off each other's banks where C is even.
template <class T, int BODY>
struct narrow_row {
  using A = acc<T>;
  const wce_problem &p;
  T *x;
  const void *prob;
  int64_t at;  // of the row within prob
  int classes, start;

  __device__ __forceinline__ A logit(int c) const {
    return widen(x[c]) + (BODY != FAST && p.prior ? value_at<A>(p.prior, c) : A(0));
  }
  __device__ __forceinline__ A prob_at(int c) const {
    return load_as<A>(p.prob_dtype, prob, at + c);
  }
  __device__ __forceinline__ A coefficient(int c, A q) const {
    const A w = p.weight ? value_at<A>(p.weight, c) : A(1);
    return w * (static_cast<A>(p.floor) + static_cast<A>(p.soft) * q);
  }
  __device__ __forceinline__ int next(int c) const { return c + 1 == classes ? 0 : c + 1; }

  __device__ __forceinline__ stats<A, BODY> scan() const {
    stats<A, BODY> st;
    st.clear();
    int c = start;
    for (int k = 0; k < classes; ++k, c = next(c)) st.m = max_of(st.m, logit(c));
    const A base = base_of(st.m);
    for (int k = 0; k < classes; ++k, c = next(c)) {
      const A d = logit(c) - base, e = exp_of(d);
      st.s += e;
      if (BODY != FAST) {
        const A q = prob ? prob_at(c) : A(0), a = coefficient(c, q);
        st.any |= q != 0;
        st.a += a;
        if (a != 0) st.ax += a * d;
      }
      if (BODY == ENTROPY && e != 0) st.ex += e * d;
    }
    return st;
  }
};

template <class T, int BODY>
WCE_DEVICE narrow_row<T, BODY> narrow_row_at(const wce_problem &p, T *tile, const void *prob,
                                             int k) {
  const int classes = static_cast<int>(p.classes);
  const int start = classes % 2 == 0 ? static_cast<int>(threadIdx.x) % classes : 0;
  return {p, tile + k * classes, prob, static_cast<int64_t>(k) * classes, classes, start};
}

// Shared memory of a tile: logits, then target probabilities.
WCE_DEVICE unsigned char *prob_tile(unsigned char *shared, int64_t tile, int64_t row_bytes) {
  return shared + ((tile * row_bytes + 16 + 15) & ~int64_t(15));
}

template <class T, int BODY>
__global__ void __launch_bounds__(256, 2)
narrow_forward(wce_problem p, wce_row_outputs out, wce_cuda_total total, int64_t tile,
               sums *partials, unsigned long long *bad) {
  WCE_SHARED(shared);
  const int64_t rows = p.outer * p.inner;
  sums mine;
  mine.clear();
  for (int64_t first = blockIdx.x * tile; first < rows; first += gridDim.x * tile) {
    const int here = static_cast<int>(rows - first < tile ? rows - first : tile);
    const int n = here * static_cast<int>(p.classes);
    T *x = stage_in(shared, static_cast<const T *>(p.logits.data) + first * p.classes, n);
    const void *prob = nullptr;
    if (BODY != FAST && p.prob.data)
      prob = stage_prob(prob_tile(shared, tile, p.classes * sizeof(T)), p, first * p.classes, n);
    WCE_SYNC(narrow_forward_ready);
    for (int k = threadIdx.x; WCE_GUARD(narrow_rows, k < here); k += blockDim.x) {
      const narrow_row<T, BODY> row = narrow_row_at<T, BODY>(p, x, prob, k);
      const row_info<acc<T>> info = load_row_info(p, first + k, row.x);
      finish_row(p, out, first + k, row.scan(), info, mine);
    }
    WCE_SYNC(narrow_forward_reuse);
  }
  finish_block<acc<T>>(p, total, mine, partials, reinterpret_cast<sums *>(shared), bad);
}

template <class T, int BODY>
__global__ void __launch_bounds__(256, 2)
narrow_backward(wce_problem p, wce_row_grads g, int64_t tile, unsigned long long *bad) {
  using A = acc<T>;
  WCE_SHARED(shared);
  const int64_t rows = p.outer * p.inner;
  T *dx = static_cast<T *>(const_cast<void *>(g.dx.data));
  long long worst = no_row;
  for (int64_t first = blockIdx.x * tile; first < rows; first += gridDim.x * tile) {
    const int here = static_cast<int>(rows - first < tile ? rows - first : tile);
    const int n = here * static_cast<int>(p.classes);
    T *x = stage_in(shared, static_cast<const T *>(p.logits.data) + first * p.classes, n);
    const void *prob = nullptr;
    if (BODY != FAST && p.prob.data)
      prob = stage_prob(prob_tile(shared, tile, p.classes * sizeof(T)), p, first * p.classes, n);
    WCE_SYNC(narrow_backward_ready);
    for (int k = threadIdx.x; k < here; k += blockDim.x) {
      const narrow_row<T, BODY> row = narrow_row_at<T, BODY>(p, x, prob, k);
      const row_info<A> info = load_row_info(p, first + k, row.x);
      const stats<A, BODY> st = row.scan();
      const row_grad<A> d = grad_of_row(p, g, first + k, info, counts(p, info, st), st.m,
                                        log_sum_of(st.m, st.s), BODY == FAST ? A(0) : st.a);
      int c = row.start;
      for (int j = 0; j < row.classes; ++j, c = row.next(c)) {  // in place: nobody else's row
        const A a = BODY == FAST ? A(0) : row.coefficient(c, prob ? row.prob_at(c) : A(0));
        A v = grad_at<A, BODY>(d, row.logit(c), a);
        if (c == d.y) v += d.dy;
        if (c == d.y2) v += d.dy2;
        row.x[c] = rounder<T>::from(d.zero ? A(0) : v);
      }
      if (info.bad && first + k < worst) worst = first + k;
    }
    WCE_SYNC(narrow_backward_done);
    stage_out(x, dx + first * p.classes, n);
    WCE_SYNC(narrow_backward_reuse);
  }
  report_bad_target(p, worst, bad);
}

}  // namespace wce_cuda
#endif
