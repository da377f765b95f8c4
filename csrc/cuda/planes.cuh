// planes.cuh -- positions are contiguous, classes lie a plane apart: a thread owns V positions and
// walks the classes, several planes at a time with a running maximum.
//
// Its positions are those of 16 bytes where every plane starts on a 16-byte boundary. Where planes
// start anywhere (an odd number of positions), no vector of one plane is a vector in the next: then
// the positions of a thread lie `step` apart, and neighbouring threads read neighbouring elements.
//
// A block is `across` threads side by side times blockDim/across slices; slice k takes the groups
// k, k+slices, ... of classes (few positions, many classes), and the slices merge at the end.
#ifndef WCE_CUDA_PLANES_CUH
#define WCE_CUDA_PLANES_CUH

#include "row_math.cuh"

namespace wce_cuda {

template <class T, int BODY>
constexpr int plane_group = BODY == FAST ? 8 : (width<T> > 4 ? 2 : 4);

// Whether each plane of v starts on a 16-byte boundary.
template <class T>
WCE_DEVICE bool planes_aligned(const wce_view &v) {
  return aligned16(v.data) && v.stride_class % width<T> == 0 && v.stride_outer % width<T> == 0;
}

// The positions of one thread.
template <class T>
struct plane_unit {
  const T *x;        // class 0
  int64_t row;       // of the first position
  int64_t prob_at;   // of class 0 within the target probabilities
  int64_t dx_at;     // likewise within the gradient
  int step;          // from one position to the next
  int n;             // positions, at most V; 0 beyond the end
  int column, slice, slices;
  bool vectors;      // every plane can be read and written 16 bytes at a time

  __device__ __forceinline__ int64_t at(int j) const { return static_cast<int64_t>(j) * step; }
};

template <class T>
WCE_DEVICE plane_unit<T> plane_unit_at(const wce_problem &p, const wce_view *dx, int64_t first,
                                       int across) {
  constexpr int V = width<T>;
  plane_unit<T> u;
  u.column = threadIdx.x % across;
  u.slice = threadIdx.x / across;
  u.slices = blockDim.x / across;
  const bool aligned = planes_aligned<T>(p.logits) && (!dx || planes_aligned<T>(*dx));
  const int64_t per_outer = (p.inner + V - 1) / V, unit = first + u.column;
  const place at = place_of(unit, per_outer);
  const bool apart = !aligned && per_outer <= INT32_MAX;
  const int64_t i = apart ? at.inner : at.inner * V;
  u.step = apart ? static_cast<int>(per_outer) : 1;
  u.n = 0;
  if (unit < p.outer * per_outer)
    while (u.n < V && i + u.at(u.n) < p.inner) ++u.n;
  u.row = at.outer * p.inner + i;
  u.x = static_cast<const T *>(p.logits.data) + at.outer * p.logits.stride_outer + i;
  u.prob_at = at.outer * p.prob.stride_outer + i;
  u.dx_at = dx ? at.outer * dx->stride_outer + i : 0;
  u.vectors = aligned && WCE_GUARD(planes_tail, u.n == V);
  return u;
}

// Planes c .. c+K of the unit, -inf where there is none.
template <class T, int K>
WCE_DEVICE void load_planes(const wce_problem &p, const plane_unit<T> &u, int c, bool once,
                            uint4 (&to)[K]) {
  const int classes = static_cast<int>(p.classes);
  const T *x = u.x + c * p.logits.stride_class;
  const T none = rounder<T>::from(-infinity<acc<T>>());
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const T *plane = x + k * p.logits.stride_class;
    if (u.vectors && WCE_GUARD(planes_classes, c + k < classes))
      to[k] = once ? load16_once(plane) : load16(plane);
    else
      to[k] = gather16(plane, u.step, c + k < classes ? u.n : 0, none);
  }
}

// Adds the prior to plane c and computes its coefficients (without the spike).
template <class T, int BODY>
WCE_DEVICE void plane_general(const wce_problem &p, const plane_unit<T> &u, int c,
                              acc<T> (&x)[width<T>], acc<T> (&a)[width<T>],
                              bool (&any)[width<T>]) {
  using A = acc<T>;
  constexpr int V = width<T>;
#pragma unroll
  for (int j = 0; j < V; ++j) a[j] = 0;
  if (BODY == FAST || c >= p.classes) return;
  const A prior = p.prior ? value_at<A>(p.prior, c) : A(0);
  const A w = p.weight ? value_at<A>(p.weight, c) : A(1);
  A q[V] = {};
  if (p.prob.data) {
    const int64_t at = u.prob_at + c * p.prob.stride_class;
    if (u.vectors) {
      load_run_as<V>(p.prob_dtype, p.prob.data, at, q);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (j < u.n) q[j] = load_as<A>(p.prob_dtype, p.prob.data, at + u.at(j));
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    x[j] += prior;
    any[j] |= q[j] != 0;
    a[j] = w * (static_cast<A>(p.floor) + static_cast<A>(p.soft) * q[j]);
  }
}

// Statistics of this slice's classes, per position.
template <class T, int BODY>
WCE_DEVICE void planes_scan(const wce_problem &p, const plane_unit<T> &u, bool once,
                            stats<acc<T>, BODY> (&st)[width<T>]) {
  using A = acc<T>;
  constexpr int V = width<T>, K = plane_group<T, BODY>;
  const int classes = u.n > 0 ? static_cast<int>(p.classes) : 0;
  for (int c = u.slice * K; c < classes; c += u.slices * K) {
    uint4 raw[K];
    load_planes<T, K>(p, u, c, once, raw);
    const int live = classes - c < K ? classes - c : K;
    A x[K][V], a[K][V];
    bool any[V] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      widen_all(unpack<T>(raw[k]), x[k]);
      plane_general<T, BODY>(p, u, c + k, x[k], a[k], any);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      A column[K], coefficient[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        column[k] = x[k][j];
        coefficient[k] = a[k][j];
      }
      st[j].template add<K, 1>(column, coefficient, live);
      if (BODY != FAST) st[j].any |= any[j];
    }
  }
}

// Merges the slices; slice 0 gets the result, or all of them where `everyone`. All threads call.
// shared: [threads/2][V], for everyone [across][V].
template <class T, int BODY>
WCE_DEVICE void merge_slices(const plane_unit<T> &u, int across, bool everyone,
                             stats<acc<T>, BODY> *shared, stats<acc<T>, BODY> (&st)[width<T>]) {
  constexpr int V = width<T>;
  for (int half = u.slices / 2; half > 0; half /= 2) {
    WCE_SYNC(slices_reuse);
    if (u.slice >= half && u.slice < 2 * half)
      for (int j = 0; j < V; ++j) shared[((u.slice - half) * across + u.column) * V + j] = st[j];
    WCE_SYNC(slices_ready);
    if (u.slice < half)
#pragma unroll
      for (int j = 0; j < V; ++j) st[j].merge(shared[(u.slice * across + u.column) * V + j]);
  }
  if (!everyone || u.slices == 1) return;  // slice 0 overwrites what it alone has read
  if (u.slice == 0)
    for (int j = 0; j < V; ++j) shared[u.column * V + j] = st[j];
  WCE_SYNC(slices_all_ready);
#pragma unroll
  for (int j = 0; j < V; ++j) st[j] = shared[u.column * V + j];
}

template <class T, int BODY>
__global__ void __launch_bounds__(128, BODY == FAST ? 4 : 3)
planes_forward(wce_problem p, wce_row_outputs out, wce_cuda_total total, int across,
               sums *partials, unsigned long long *bad) {
  using S = stats<acc<T>, BODY>;
  constexpr int V = width<T>;
  WCE_SHARED(shared);
  const int64_t units = p.outer * ((p.inner + V - 1) / V);
  sums mine;
  mine.clear();
  for (int64_t first = (int64_t)blockIdx.x * across; first < units;
       first += (int64_t)gridDim.x * across) {
    const plane_unit<T> u = plane_unit_at<T>(p, nullptr, first, across);
    S st[V];
#pragma unroll
    for (int j = 0; j < V; ++j) st[j].clear();
    planes_scan<T, BODY>(p, u, true, st);
    merge_slices<T, BODY>(u, across, false, reinterpret_cast<S *>(shared), st);
    if (u.slice == 0)
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (j < u.n) {
          const int64_t at = u.at(j);
          const row_info<acc<T>> info = load_row_info(p, u.row + at, u.x + at);
          finish_row(p, out, u.row + at, st[j], info, mine);
        }
  }
  finish_block<acc<T>>(p, total, mine, partials, reinterpret_cast<sums *>(shared), bad);
}

// Sum of a_c without the spike over this slice's classes, from the target probabilities.
template <class T, int BODY>
WCE_DEVICE void planes_coefficients(const wce_problem &p, const plane_unit<T> &u,
                                    stats<acc<T>, BODY> (&st)[width<T>]) {
  using A = acc<T>;
  constexpr int V = width<T>, K = plane_group<T, BODY>;
  const int classes = u.n > 0 ? static_cast<int>(p.classes) : 0;
  bool any[V] = {};
  for (int c = u.slice * K; c < classes; c += u.slices * K) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      A x[V] = {}, a[V];
      plane_general<T, BODY>(p, u, c + k, x, a, any);
#pragma unroll
      for (int j = 0; j < V; ++j) st[j].a += a[j];
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) st[j].any = any[j];
}

// The gradient's coefficients (row_grad) of one thread's positions, few enough for registers.
template <class T>
struct plane_grads {
  using A = acc<T>;
  static constexpr int V = width<T>;
  A m[V], ke[V], ka[V], dy[V];
  int y[V];
  unsigned zero, second;  // bit j: position j is 0 as a whole; has a second target

  template <int BODY>
  __device__ __forceinline__ void load(const wce_problem &p, const wce_row_grads &g,
                                       const plane_unit<T> &u, const stats<A, BODY> (&st)[V],
                                       const A *weight_sum, long long &worst) {
    zero = second = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      m[j] = ke[j] = ka[j] = dy[j] = 0;
      y[j] = -1;
      if (j >= u.n) continue;
      const int64_t row = u.row + u.at(j);
      const row_info<A> info = load_row_info(p, row, u.x + u.at(j));
      const A top = g.max ? value_at<A>(g.max, row) : st[j].m;
      const A l = g.max ? value_at<A>(g.log_sum, row) : log_sum_of(st[j].m, st[j].s);
      A a = 0;
      if (BODY != FAST) a = coef_sum_of<A>(p, g, row, st[j].a, weight_sum);
      const row_grad<A> d = grad_of_row(p, g, row, info, counts(p, info, st[j]), top, l, a);
      m[j] = d.m;
      ke[j] = d.ke;
      ka[j] = d.ka;
      dy[j] = d.dy;
      y[j] = static_cast<int>(d.y);
      zero |= d.zero ? 1u << j : 0u;
      second |= !d.zero && d.dy2 != 0 ? 1u << j : 0u;
      if (info.bad && row < worst) worst = row;
    }
  }

  template <int BODY>
  __device__ __forceinline__ A at(int j, int c, A x, A a) const {
    A v = ke[j] * exp_of(x - m[j]);
    if (BODY != FAST && a != 0) v -= ka[j] * a;
    if (c == y[j]) v += dy[j];
    return zero >> j & 1 ? A(0) : v;
  }

  // Rare, so it costs loads instead of registers.
  __device__ __forceinline__ void add_second(const wce_problem &p, const wce_row_grads &g,
                                             const plane_unit<T> &u, int c, A (&x)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int64_t row = u.row + u.at(j);
      if ((second >> j & 1) && p.target2[row] == c)
        x[j] += second_spike<A>(p, g, row);
    }
  }
};

template <class T, int BODY>
__global__ void __launch_bounds__(128, BODY == FAST ? 4 : 3)
planes_backward(wce_problem p, wce_row_grads g, int across, const acc<T> *weight_sum,
                unsigned long long *bad) {
  using A = acc<T>;
  using S = stats<A, BODY>;
  constexpr int V = width<T>, K = BODY == FAST ? 4 : 2;
  WCE_SHARED(shared);
  const int64_t units = p.outer * ((p.inner + V - 1) / V);
  const int classes = static_cast<int>(p.classes);
  long long worst = no_row;
  for (int64_t first = (int64_t)blockIdx.x * across; first < units;
       first += (int64_t)gridDim.x * across) {
    const plane_unit<T> u = plane_unit_at<T>(p, &g.dx, first, across);
    S st[V];
#pragma unroll
    for (int j = 0; j < V; ++j) st[j].clear();
    if (!g.max) planes_scan<T, BODY>(p, u, false, st);
    else if (BODY != FAST && needs_coefficients(p, g)) planes_coefficients<T, BODY>(p, u, st);
    if (!g.max || (BODY != FAST && needs_coefficients(p, g)))
      merge_slices<T, BODY>(u, across, true, reinterpret_cast<S *>(shared), st);

    plane_grads<T> d;
    d.load(p, g, u, st, weight_sum, worst);
    T *dx = static_cast<T *>(const_cast<void *>(g.dx.data)) + u.dx_at;
    bool none[V] = {};
    for (int c = u.slice * K; u.n > 0 && c < classes; c += u.slices * K) {
      uint4 raw[K];
      load_planes<T, K>(p, u, c, true, raw);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (c + k >= classes) continue;
        A x[V], a[V];
        widen_all(unpack<T>(raw[k]), x);
        plane_general<T, BODY>(p, u, c + k, x, a, none);
#pragma unroll
        for (int j = 0; j < V; ++j) x[j] = d.template at<BODY>(j, c + k, x[j], a[j]);
        if (BODY != FAST && d.second) d.add_second(p, g, u, c + k, x);
        T *plane = dx + (c + k) * g.dx.stride_class;
        if (u.vectors) {
          store16_once(plane, pack<T>(x));
        } else {
#pragma unroll
          for (int j = 0; j < V; ++j)
            if (j < u.n) plane[u.at(j)] = rounder<T>::from(x[j]);
        }
      }
    }
  }
  report_bad_target<A>(p, worst, bad);
}

}  // namespace wce_cuda
#endif
