// reduce.cuh -- what is known of a row after some of its classes, and how two such pieces merge.
#ifndef WCE_CUDA_REDUCE_CUH
#define WCE_CUDA_REDUCE_CUH

#include "vector.cuh"

namespace wce_cuda {

// FAST: one index target, no floor, no prior; the target's class is one scalar fix-up.
// GENERAL: any coefficients a_c. ENTROPY: GENERAL that also keeps sum e^(x-m)*(x-m).
enum body { FAST, GENERAL, ENTROPY };

template <class A>
WCE_DEVICE A base_of(A m) {  // what is subtracted from the logits: -inf - -inf must not be nan
  return m == -infinity<A>() ? A(0) : m;
}

// m: maximum so far. s: sum of e^(x-m). a: sum of a_c, without the target's spike.
// ax: sum of a_c*(x_c-m). ex: sum of e^(x-m)*(x-m). any: a target probability was not 0.
// A nan or +inf among the logits never enters m for good, but makes s nan, which stays.
template <class A, int BODY>
struct stats {
  A m, s, a, ax, ex;
  int any;

  __device__ __forceinline__ void clear() {
    m = -infinity<A>();
    s = a = ax = ex = 0;
    any = 0;
  }

  // Moves to a maximum that is not smaller.
  __device__ __forceinline__ void rebase(A top) {
    const A scale = m == top ? A(1) : exp_of(m - top);
    if (BODY != FAST) {
      const A shift = base_of(m) - base_of(top);
      if (a != 0) ax += a * shift;
      if (BODY == ENTROPY) ex = scale == 0 ? A(0) : scale * (ex + s * shift);
    }
    s *= scale;
    m = top;
  }

  // x: [N] logits, c: [N] coefficients; only those in the first `live` groups of G are used.
  // Logits beyond them must be -inf.
  template <int N, int G>
  __device__ __forceinline__ void add(const A (&x)[N], const A (&c)[N], int live) {
    A top = m;
#pragma unroll
    for (int k = 0; k < N; ++k) top = max_of(top, x[k]);
    rebase(top);
    const A base = base_of(m);
#pragma unroll
    for (int g = 0; g < N / G; ++g) {
      if (g < live) {
        A sum = 0;
#pragma unroll
        for (int k = g * G; k < (g + 1) * G; ++k) {
          const A d = x[k] - base, e = exp_of(d);
          sum += e;
          if (BODY != FAST) {
            a += c[k];
            ax += c[k] != 0 ? c[k] * d : A(0);
          }
          if (BODY == ENTROPY) ex += e != 0 ? e * d : A(0);
        }
        s += sum;
      }
    }
  }

  __device__ __forceinline__ void merge(stats b) {
    const A top = max_of(m, b.m);
    rebase(top);
    b.rebase(top);
    s += b.s;
    if (BODY != FAST) {
      a += b.a;
      ax += b.ax;
      any |= b.any;
    }
    if (BODY == ENTROPY) ex += b.ex;
  }

  // The piece of another lane of the warp; all 32 lanes call it.
  __device__ __forceinline__ stats from_lane(int lane) const {
    stats b = *this;
    b.m = __shfl_sync(0xffffffffu, m, lane);
    b.s = __shfl_sync(0xffffffffu, s, lane);
    if (BODY != FAST) {
      b.a = __shfl_sync(0xffffffffu, a, lane);
      b.ax = __shfl_sync(0xffffffffu, ax, lane);
      b.any = __shfl_sync(0xffffffffu, any, lane);
    }
    if (BODY == ENTROPY) b.ex = __shfl_sync(0xffffffffu, ex, lane);
    return b;
  }
};

// Merges the pieces of `lanes` neighbouring threads (4, 8, 16, 32, or the whole block); each of
// them gets the result. All threads of the block call it. shared: [threads/32] pieces.
template <class S>
WCE_DEVICE S merge_lanes(S mine, int lanes, S *shared) {
  const int lane = threadIdx.x & 31, in_warp = lanes < 32 ? lanes : 32;
  for (int step = in_warp / 2; step > 0; step /= 2) mine.merge(mine.from_lane(lane ^ step));
  mine = mine.from_lane(lane & ~(in_warp - 1));  // lane order alone decides the bits
  if (lanes > 32) {
    WCE_SYNC(merge_reuse);
    if (lane == 0) shared[threadIdx.x / 32] = mine;
    WCE_SYNC(merge_ready);
    mine = shared[0];
    for (int w = 1; w < lanes / 32; ++w) mine.merge(shared[w]);
  }
  return mine;
}

// Sums over rows, in double: the order is fixed, the size of the batch is not.
// bad: the smallest row whose target cannot be, no_row if there is none.
constexpr long long no_row = INT64_MAX;
struct sums {
  double loss, weight;
  double loss2, weight2;  // of the second half of a mixture
  long long bad;
  int any;  // some row counts

  __device__ __forceinline__ void clear() {
    loss = weight = loss2 = weight2 = 0;
    any = 0;
    bad = no_row;
  }
  __device__ __forceinline__ void add(const sums &b) {
    loss += b.loss;
    weight += b.weight;
    loss2 += b.loss2;
    weight2 += b.weight2;
    any |= b.any;
    if (b.bad < bad) bad = b.bad;
  }
};

// Sum over the block, valid in thread 0. All threads call it. shared: [threads/32].
WCE_DEVICE sums sum_block(sums mine, sums *shared) {
  const int lane = threadIdx.x & 31;
  for (int step = 16; step > 0; step /= 2) {
    sums b;
    b.loss = __shfl_sync(0xffffffffu, mine.loss, lane ^ step);
    b.weight = __shfl_sync(0xffffffffu, mine.weight, lane ^ step);
    b.loss2 = __shfl_sync(0xffffffffu, mine.loss2, lane ^ step);
    b.weight2 = __shfl_sync(0xffffffffu, mine.weight2, lane ^ step);
    b.any = __shfl_sync(0xffffffffu, mine.any, lane ^ step);
    b.bad = __shfl_sync(0xffffffffu, mine.bad, lane ^ step);
    mine.add(b);
  }
  WCE_SYNC(sum_reuse);
  if (lane == 0) shared[threadIdx.x / 32] = mine;
  WCE_SYNC(sum_ready);
  if (threadIdx.x == 0)
    for (unsigned w = 1; w < blockDim.x / 32; ++w) mine.add(shared[w]);
  return mine;
}

}  // namespace wce_cuda
#endif
