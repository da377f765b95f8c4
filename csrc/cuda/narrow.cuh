// narrow.cuh -- few classes, rows packed one after the other: a thread per row.
//
// Tiles of rows pass through shared memory in 16-byte pieces, so global memory is read and written
// in full lines. A block has two buffers: the next tile comes into one while the threads work in
// the other. A tile keeps its offset within 16 bytes, so that both sides of a copy are aligned.
#ifndef WCE_CUDA_NARROW_CUH
#define WCE_CUDA_NARROW_CUH

#include "row_math.cuh"

namespace wce_cuda {

// Where memory that stands at `from` lies in its buffer of as many bytes and 16 more.
WCE_DEVICE unsigned char *staged(unsigned char *buffer, const unsigned char *from) {
  return buffer + (reinterpret_cast<uintptr_t>(from) & 15);
}

// Starts to copy it there.
WCE_DEVICE void stage_in(unsigned char *buffer, const unsigned char *from, int bytes) {
  const frame f = frame_of(from, bytes);
  unsigned char *to = staged(buffer, from);
#pragma unroll 4
  for (int v = threadIdx.x; v < f.vectors; v += blockDim.x)
    WCE_COPY16(to + f.head + v * 16, from + f.head + v * 16);
  for (int k = threadIdx.x; k < f.loose; k += blockDim.x) {
    const int at = loose_at<unsigned char>(f, k);
    to[at] = from[at];
  }
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

// Shared memory of one tensor's part of a tile.
__host__ __device__ inline int64_t part_bytes(int64_t elements, wce_dtype dtype) {
  return (elements * bytes_of(dtype) + 16 + 15) & ~int64_t(15);
}
__host__ __device__ inline int64_t narrow_buffer_bytes(const wce_problem &p, int64_t tile) {
  return part_bytes(tile * p.classes, p.dtype) +
         (p.prob.data ? part_bytes(tile * p.classes, p.prob_dtype) : 0);
}

// The tiles of a block, gridDim.x apart. The current one lies in one of two buffers.
struct narrow_tiles {
  const wce_problem &p;
  unsigned char *current, *other;  // logits, then target probabilities
  int64_t tile, rows, first;       // first: row of the current tile

  __device__ __forceinline__ narrow_tiles(const wce_problem &problem, int64_t tile_rows,
                                          unsigned char *shared)
      : p(problem), current(shared), other(shared + narrow_buffer_bytes(p, tile_rows)),
        tile(tile_rows), rows(p.outer * p.inner), first(blockIdx.x * tile) {
    fetch(current, first);
  }
  __device__ __forceinline__ bool more() const { return first < rows; }
  __device__ __forceinline__ int here() const { return rows_at(first); }
  __device__ __forceinline__ void fetch_next() const { fetch(other, first + gridDim.x * tile); }
  __device__ __forceinline__ void step() {
    unsigned char *const left = current;
    current = other;
    other = left;
    first += gridDim.x * tile;
  }
  __device__ __forceinline__ void *logits() const {
    return staged(current, source(p.logits, p.dtype, first));
  }
  __device__ __forceinline__ const void *prob() const {
    return p.prob.data ? staged(prob_part(current), source(p.prob, p.prob_dtype, first)) : nullptr;
  }

 private:
  __device__ __forceinline__ int rows_at(int64_t row) const {
    return static_cast<int>(rows - row < tile ? rows - row : tile);
  }
  __device__ __forceinline__ const unsigned char *source(const wce_view &from, wce_dtype dtype,
                                                         int64_t row) const {
    return static_cast<const unsigned char *>(from.data) + row * p.classes * bytes_of(dtype);
  }
  __device__ __forceinline__ unsigned char *prob_part(unsigned char *buffer) const {
    return buffer + part_bytes(tile * p.classes, p.dtype);
  }
  // Starts to copy the tile at `row`, if there is one.
  __device__ __forceinline__ void fetch(unsigned char *buffer, int64_t row) const {
    if (row >= rows) return;
    const int n = rows_at(row) * static_cast<int>(p.classes);
    stage_in(buffer, source(p.logits, p.dtype, row), n * bytes_of(p.dtype));
    if (p.prob.data)
      stage_in(prob_part(buffer), source(p.prob, p.prob_dtype, row), n * bytes_of(p.prob_dtype));
  }
};

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

template <class T, int BODY>
__global__ void __launch_bounds__(256, 2)
narrow_forward(wce_problem p, wce_row_outputs out, wce_cuda_total total, int64_t tile,
               sums *partials, unsigned long long *bad) {
  WCE_SHARED(shared);
  sums mine;
  mine.clear();
  for (narrow_tiles tiles(p, tile, shared); tiles.more(); tiles.step()) {
    WCE_WAIT(narrow_forward_copies);
    WCE_SYNC(narrow_forward_ready);  // and everybody has left the other buffer
    tiles.fetch_next();
    T *x = static_cast<T *>(tiles.logits());
    const void *prob = BODY == FAST ? nullptr : tiles.prob();
    for (int k = threadIdx.x; WCE_GUARD(narrow_rows, k < tiles.here()); k += blockDim.x) {
      const narrow_row<T, BODY> row = narrow_row_at<T, BODY>(p, x, prob, k);
      const row_info<acc<T>> info = load_row_info(p, tiles.first + k, row.x);
      finish_row(p, out, tiles.first + k, row.scan(), info, mine);
    }
  }
  finish_block<acc<T>>(p, total, mine, partials, reinterpret_cast<sums *>(shared), bad);
}

template <class T, int BODY>
__global__ void __launch_bounds__(256, 2)
narrow_backward(wce_problem p, wce_row_grads g, int64_t tile, unsigned long long *bad) {
  using A = acc<T>;
  WCE_SHARED(shared);
  T *dx = static_cast<T *>(const_cast<void *>(g.dx.data));
  long long worst = no_row;
  for (narrow_tiles tiles(p, tile, shared); tiles.more(); tiles.step()) {
    WCE_WAIT(narrow_backward_copies);
    WCE_SYNC(narrow_backward_ready);  // and the gradient in the other buffer is on its way out
    tiles.fetch_next();
    T *x = static_cast<T *>(tiles.logits());
    const void *prob = BODY == FAST ? nullptr : tiles.prob();
    const int here = tiles.here();
    for (int k = threadIdx.x; k < here; k += blockDim.x) {
      const int64_t at = tiles.first + k;
      const narrow_row<T, BODY> row = narrow_row_at<T, BODY>(p, x, prob, k);
      const row_info<A> info = load_row_info(p, at, row.x);
      const stats<A, BODY> st = row.scan();
      const row_grad<A> d = grad_of_row(p, g, at, info, counts(p, info, st), st.m,
                                        log_sum_of(st.m, st.s), BODY == FAST ? A(0) : st.a);
      int c = row.start;
      for (int j = 0; j < row.classes; ++j, c = row.next(c)) {  // in place: nobody else's row
        const A a = BODY == FAST ? A(0) : row.coefficient(c, prob ? row.prob_at(c) : A(0));
        A v = grad_at<A, BODY>(d, row.logit(c), a);
        if (c == d.y) v += d.dy;
        if (c == d.y2) v += d.dy2;
        row.x[c] = rounder<T>::from(d.zero ? A(0) : v);
      }
      if (info.bad && at < worst) worst = at;
    }
    WCE_SYNC(narrow_backward_done);
    stage_out(x, dx + tiles.first * p.classes, here * static_cast<int>(p.classes));
  }
  report_bad_target<A>(p, worst, bad);
}

}  // namespace wce_cuda
#endif
