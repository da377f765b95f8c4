// rows.cuh -- the class dimension is contiguous: `lanes` neighbouring threads share a row.
//
// A row (or a chunk of it) is read once, 16 bytes per load and several loads in flight per thread,
// with a running maximum. Rows may start anywhere: the elements before the first 16-byte boundary
// and after the last are read one by one. With chunks > 1 forward leaves a piece per chunk, and
// rows_combine finishes the rows.
#ifndef WCE_CUDA_ROWS_CUH
#define WCE_CUDA_ROWS_CUH

#include "row_math.cuh"

namespace wce_cuda {

// Loads of 16 bytes in flight per thread. General bodies keep a logit and a coefficient per element
// at hand: four loads of 16-bit logits (64 registers) or of float64 (32, and the longer exp) spill.
template <class T, int BODY>
constexpr int unroll = BODY == FAST || sizeof(T) == 4 ? 4 : 2;

// Blocks of 256 threads that a multiprocessor should hold: 3 keep 48 KiB of loads in flight.
template <class T, int BODY>
constexpr int rows_blocks = BODY == FAST && sizeof(T) < 8 ? 3 : 2;
// nvcc 13 spills the 16-bit backward at 80 registers from sm_100 on.
template <class T, int BODY>
constexpr int backward_blocks = sizeof(T) == 2 && from_sm_100 ? 2 : rows_blocks<T, BODY>;

struct rows_shape {  // the part of the plan that the kernels need
  int lanes;
  int64_t columns, chunks;
};

// Where a row's elements are, from column `first` on.
template <class T>
struct rows_source {
  using A = acc<T>;
  const wce_problem &p;
  const T *x;
  int64_t prob_at, first;

  __device__ __forceinline__ rows_source(const wce_problem &problem, const place &at, int64_t from)
      : p(problem), first(from) {
    x = static_cast<const T *>(p.logits.data) + offset_of(p.logits, at) + first;
    prob_at = offset_of(p.prob, at) + first;
  }

  // N logits from column `first + k` on, with their coefficients (without the spike).
  template <int N, int BODY>
  __device__ __forceinline__ void general(int k, A (&logit)[N], A (&coefficient)[N],
                                          int &any) const {
    if (BODY == FAST) return;
    if (p.prior) {
      A prior[N];
      load_run<N>(static_cast<const A *>(p.prior) + first + k, prior);
#pragma unroll
      for (int j = 0; j < N; ++j) logit[j] += prior[j];
    }
    const A floor = static_cast<A>(p.floor), soft = static_cast<A>(p.soft);
#pragma unroll
    for (int j = 0; j < N; ++j) coefficient[j] = floor;
    if (p.prob.data) {
      A q[N];
      load_run_as<N>(p.prob_dtype, p.prob.data, prob_at + k, q);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        any |= q[j] != 0;
        coefficient[j] += soft * q[j];
      }
    }
    if (p.weight) {
      A w[N];
      load_run<N>(static_cast<const A *>(p.weight) + first + k, w);
#pragma unroll
      for (int j = 0; j < N; ++j) coefficient[j] *= w[j];
    }
  }
};

// Statistics of n columns, this thread's share.
template <class T, int BODY>
WCE_DEVICE stats<acc<T>, BODY> rows_scan(const rows_source<T> &from, int n, int lane, int lanes) {
  using A = acc<T>;
  constexpr int V = width<T>, U = unroll<T, BODY>;
  stats<A, BODY> st;
  st.clear();
  const frame f = frame_of(from.x, n);
  for (int k = lane; WCE_GUARD(rows_loose, k < f.loose); k += lanes) {
    const int c = loose_at<T>(f, k);
    A x[1] = {widen(from.x[c])}, a[1] = {0};
    from.template general<1, BODY>(c, x, a, st.any);
    st.template add<1, 1>(x, a, 1);
  }
  for (int v = lane; v < f.vectors; v += U * lanes) {
    uint4 raw[U];
    A x[U * V], a[U * V];
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (WCE_GUARD(rows_vectors, v + u * lanes < f.vectors))
        raw[u] = load16_once(from.x + f.head + (int64_t)(v + u * lanes) * V);
    int live = 0;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      A one[V], c[V] = {};
      if (v + u * lanes < f.vectors) {
        live = u + 1;
        widen_all(unpack<T>(raw[u]), one);
        from.template general<V, BODY>(f.head + (v + u * lanes) * V, one, c, st.any);
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) one[j] = -infinity<A>();
      }
#pragma unroll
      for (int j = 0; j < V; ++j) {
        x[u * V + j] = one[j];
        a[u * V + j] = c[j];
      }
    }
    st.template add<U * V, V>(x, a, live);
  }
  return st;
}

// Shared memory to merge in, or to add up sums.
template <class S>
__host__ __device__ constexpr int rows_reduce_bytes(int threads) {
  return threads / 32 * static_cast<int>(sizeof(S) > sizeof(sums) ? sizeof(S) : sizeof(sums));
}

// Item `item` of rows*chunks.
struct rows_item {
  int64_t row, first;
  int n;
};
WCE_DEVICE rows_item item_at(const wce_problem &p, const rows_shape &shape, int64_t item,
                             int64_t items) {
  if (!WCE_GUARD(rows_items, item < items)) return {-1, 0, 0};
  const place cut = place_of(item, shape.chunks);
  const int64_t first = cut.inner * shape.columns, left = p.classes - first;
  return {cut.outer, first, static_cast<int>(left < shape.columns ? left : shape.columns)};
}

template <class T, int BODY>
__global__ void __launch_bounds__(256, rows_blocks<T, BODY>)
rows_forward(wce_problem p, wce_row_outputs out, wce_cuda_total total, rows_shape shape,
             sums *partials, stats<acc<T>, BODY> *pieces, unsigned long long *bad) {
  using A = acc<T>;
  using S = stats<A, BODY>;
  WCE_SHARED(shared);
  const int groups = blockDim.x / shape.lanes, group = threadIdx.x / shape.lanes;
  const int lane = threadIdx.x % shape.lanes;
  const int64_t items = p.outer * p.inner * shape.chunks;
  sums mine;
  mine.clear();
  for (int64_t start = (int64_t)blockIdx.x * groups; start < items;
       start += (int64_t)gridDim.x * groups) {
    const rows_item item = item_at(p, shape, start + group, items);
    const place at = place_of(item.row >= 0 ? item.row : 0, p.inner);
    const rows_source<T> from(p, at, item.first);
    S st = rows_scan<T, BODY>(from, item.n, lane, shape.lanes);
    st = merge_lanes(st, shape.lanes, reinterpret_cast<S *>(shared));
    if (item.row < 0 || lane != 0) continue;
    if (pieces)
      pieces[start + group] = st;
    else  // one chunk: its item is its row, its first column 0
      finish_row(p, out, start + group, st, load_row_info(p, start + group, from.x), mine);
  }
  if (!pieces) finish_block<A>(p, total, mine, partials, reinterpret_cast<sums *>(shared), bad);
}

// Merges the pieces of each row in order; a warp per row.
template <class T, int BODY>
__global__ void __launch_bounds__(256, 2)
rows_combine(wce_problem p, wce_row_outputs out, wce_cuda_total total, int64_t chunks,
             sums *partials, const stats<acc<T>, BODY> *pieces, unsigned long long *bad) {
  using A = acc<T>;
  using S = stats<A, BODY>;
  WCE_SHARED(shared);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t rows = p.outer * p.inner;
  sums mine;
  mine.clear();
  for (int64_t start = (int64_t)blockIdx.x * warps; start < rows;
       start += (int64_t)gridDim.x * warps) {
    const int64_t row = start + warp;
    S st;
    st.clear();
    for (int64_t k = lane; row < rows && k < chunks; k += 32) st.merge(pieces[row * chunks + k]);
    st = merge_lanes(st, 32, reinterpret_cast<S *>(shared));
    if (row < rows && lane == 0) {
      const place at = place_of(row, p.inner);
      const T *x = static_cast<const T *>(p.logits.data) + offset_of(p.logits, at);
      finish_row(p, out, row, st, load_row_info(p, row, x), mine);
    }
  }
  finish_block<A>(p, total, mine, partials, reinterpret_cast<sums *>(shared), bad);
}

// Sum of a_c without the spike over the whole row, from the target probabilities. All threads call.
template <class T, int BODY>
WCE_DEVICE stats<acc<T>, BODY> rows_coefficients(const rows_source<T> &from, int n, int lane,
                                                 int lanes) {
  using A = acc<T>;
  stats<A, BODY> st;
  st.clear();
  const A floor = static_cast<A>(from.p.floor), soft = static_cast<A>(from.p.soft);
#pragma unroll 4
  for (int k = lane; k < n; k += lanes) {
    const A q = load_as<A>(from.p.prob_dtype, from.p.prob.data, from.prob_at + k);
    const A w = from.p.weight ? value_at<A>(from.p.weight, from.first + k) : A(1);
    st.any |= q != 0;
    st.a += w * (floor + soft * q);
  }
  return st;
}

// What backward has to know of the row apart from its target. All threads of the block call it.
// pieces: left by a forward pass over the chunks, where rows are cut and something is missing.
template <class T, int BODY>
WCE_DEVICE stats<acc<T>, BODY> rows_missing(const wce_problem &p, const wce_row_grads &g,
                                            const rows_shape &shape, const rows_item &item,
                                            const place &at,
                                            const stats<acc<T>, BODY> *pieces,
                                            unsigned char *shared) {
  using S = stats<acc<T>, BODY>;
  const int lane = threadIdx.x % shape.lanes;
  S st;
  st.clear();
  if (pieces) {
    if (item.row >= 0)
      for (int64_t k = 0; k < shape.chunks; ++k) st.merge(pieces[item.row * shape.chunks + k]);
    return st;
  }
  const rows_source<T> whole(p, at, 0);
  const int n = item.row >= 0 ? static_cast<int>(p.classes) : 0;
  if (!g.max)
    st = rows_scan<T, BODY>(whole, n, lane, shape.lanes);
  else if (BODY != FAST && needs_coefficients(p, g))
    st = rows_coefficients<T, BODY>(whole, n, lane, shape.lanes);
  else
    return st;
  return merge_lanes(st, shape.lanes, reinterpret_cast<S *>(shared));
}

template <class T, int BODY, int N>
WCE_DEVICE void rows_gradient(const rows_source<T> &from, const row_grad<acc<T>> &d, int k,
                              acc<T> (&x)[N]) {
  using A = acc<T>;
  A a[N] = {};
  int any = 0;
  from.template general<N, BODY>(k, x, a, any);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = grad_at<A, BODY>(d, x[j], a[j]);
  const int64_t y = d.y - (from.first + k), y2 = d.y2 - (from.first + k);
  if (d.y >= 0 && y >= 0 && y < N) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j == y) x[j] += d.dy;
  }
  if (d.y2 >= 0 && y2 >= 0 && y2 < N) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j == y2) x[j] += d.dy2;
  }
}

template <class T>
WCE_DEVICE void rows_zero(T *dx, int n, int lane, int lanes) {
  const frame f = frame_of(dx, n);
  const T zero = rounder<T>::from(0);
  for (int k = lane; k < f.loose; k += lanes) dx[loose_at<T>(f, k)] = zero;
  for (int v = lane; v < f.vectors; v += lanes)
    store16_once(dx + f.head + (int64_t)v * width<T>, make_uint4(0, 0, 0, 0));
}

// Writes n columns of the gradient; vectors are those of dx, x follows as it lies.
template <class T, int BODY>
WCE_DEVICE void rows_write(const rows_source<T> &from, const row_grad<acc<T>> &d, T *dx, int n,
                           int lane, int lanes) {
  using A = acc<T>;
  constexpr int V = width<T>, U = unroll<T, BODY>;
  const frame f = frame_of(dx, n);
  for (int k = lane; k < f.loose; k += lanes) {
    const int c = loose_at<T>(f, k);
    A x[1] = {widen(from.x[c])};
    rows_gradient<T, BODY, 1>(from, d, c, x);
    dx[c] = rounder<T>::from(x[0]);
  }
  const bool aligned = aligned16(from.x + f.head);
  for (int v = lane; v < f.vectors; v += U * lanes) {
    uint4 raw[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const T *x = from.x + f.head + (int64_t)(v + u * lanes) * V;
      if (v + u * lanes < f.vectors) raw[u] = aligned ? load16_once(x) : gather16(x);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int k = f.head + (v + u * lanes) * V;
      if (v + u * lanes < f.vectors) {
        A x[V];
        widen_all(unpack<T>(raw[u]), x);
        rows_gradient<T, BODY, V>(from, d, k, x);
        store16_once(dx + k, pack<T>(x));
      }
    }
  }
}

template <class T, int BODY>
__global__ void __launch_bounds__(256, backward_blocks<T, BODY>)
rows_backward(wce_problem p, wce_row_grads g, rows_shape shape, const acc<T> *weight_sum,
              const stats<acc<T>, BODY> *pieces, unsigned long long *bad) {
  using A = acc<T>;
  WCE_SHARED(shared);
  const int groups = blockDim.x / shape.lanes, group = threadIdx.x / shape.lanes;
  const int lane = threadIdx.x % shape.lanes;
  const int64_t items = p.outer * p.inner * shape.chunks;
  long long worst = no_row;
  for (int64_t start = (int64_t)blockIdx.x * groups; start < items;
       start += (int64_t)gridDim.x * groups) {
    const rows_item item = item_at(p, shape, start + group, items);
    const place at = place_of(item.row >= 0 ? item.row : 0, p.inner);
    const stats<A, BODY> st = rows_missing<T, BODY>(p, g, shape, item, at, pieces, shared);
    if (item.row < 0) continue;
    const rows_source<T> from(p, at, item.first);
    const row_info<A> info = load_row_info(p, item.row, from.x - item.first);
    const A m = g.max ? value_at<A>(g.max, item.row) : st.m;
    const A l = g.max ? value_at<A>(g.log_sum, item.row) : log_sum_of(st.m, st.s);
    A a = 0;
    if (BODY != FAST) a = coef_sum_of<A>(p, g, item.row, st.a, weight_sum);
    const row_grad<A> d = grad_of_row(p, g, item.row, info, counts(p, info, st), m, l, a);
    T *dx = static_cast<T *>(const_cast<void *>(g.dx.data)) + offset_of(g.dx, at) + item.first;
    if (d.zero)
      rows_zero(dx, item.n, lane, shape.lanes);
    else
      rows_write<T, BODY>(from, d, dx, item.n, lane, shape.lanes);
    if (info.bad && lane == 0 && item.row < worst) worst = item.row;
  }
  report_bad_target<A>(p, worst, bad);
}

}  // namespace wce_cuda
#endif
