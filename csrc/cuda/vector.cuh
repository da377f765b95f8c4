// vector.cuh -- 16 bytes of elements at a time, whatever their type.
//
// T: type of the logits (float, double, __nv_bfloat16, __half). A = acc<T>: type of the arithmetic.
// V = width<T>: elements in 16 bytes.
#ifndef WCE_CUDA_VECTOR_CUH
#define WCE_CUDA_VECTOR_CUH

#include <string.h>

#include "arch.cuh"
#include "wce_cuda.h"

namespace wce_cuda {

template <class T>
struct acc_of {
  using type = float;
};
template <>
struct acc_of<double> {
  using type = double;
};
template <class T>
using acc = typename acc_of<T>::type;

__host__ __device__ inline int bytes_of(wce_dtype dtype) {
  return dtype == WCE_F64 ? 8 : dtype == WCE_F32 ? 4 : 2;
}

template <class T>
constexpr int width = 16 / static_cast<int>(sizeof(T));

WCE_DEVICE float widen(float x) { return x; }
WCE_DEVICE double widen(double x) { return x; }
WCE_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
WCE_DEVICE float widen(__half x) { return __half2float(x); }

template <class T>
struct rounder {  // one rounding, to nearest even
  static __device__ __forceinline__ T from(acc<T> x) { return x; }
};
template <>
struct rounder<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 from(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct rounder<__half> {
  static __device__ __forceinline__ __half from(float x) { return __float2half_rn(x); }
};

template <class T>
struct alignas(16) packet {  // [V]
  T v[width<T>];
};

template <class T>
WCE_DEVICE packet<T> unpack(uint4 raw) {
  packet<T> p;
  memcpy(&p, &raw, 16);
  return p;
}

template <class T>
WCE_DEVICE uint4 pack(const acc<T> (&x)[width<T>]) {
  packet<T> p;
#pragma unroll
  for (int j = 0; j < width<T>; ++j) p.v[j] = rounder<T>::from(x[j]);
  uint4 raw;
  memcpy(&raw, &p, 16);
  return raw;
}

template <class T>
WCE_DEVICE void widen_all(const packet<T> &p, acc<T> (&to)[width<T>]) {
#pragma unroll
  for (int j = 0; j < width<T>; ++j) to[j] = widen(p.v[j]);
}

// V elements `step` apart, one by one: n of them, then `fill`.
template <class T>
WCE_DEVICE uint4 gather16(const T *from, int step = 1, int n = width<T>, T fill = T()) {
  packet<T> p;
#pragma unroll
  for (int j = 0; j < width<T>; ++j) p.v[j] = j < n ? from[static_cast<int64_t>(j) * step] : fill;
  uint4 raw;
  memcpy(&raw, &p, 16);
  return raw;
}

WCE_DEVICE bool aligned16(const void *address) {
  return (reinterpret_cast<uintptr_t>(address) & 15) == 0;
}

// How n elements at an address are read: head elements, then full vectors, then the rest.
struct frame {
  int head, vectors, loose;  // loose: head and rest together
};
template <class T>
WCE_DEVICE frame frame_of(const T *address, int n) {
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(address) & 15) / (int)sizeof(T);
  frame f;
  f.head = (width<T> - skew) % width<T>;
  if (f.head > n) f.head = n;
  f.vectors = (n - f.head) / width<T>;
  f.loose = n - f.vectors * width<T>;
  return f;
}
template <class T>  // the k-th loose element, k in [0, loose)
WCE_DEVICE int loose_at(const frame &f, int k) {
  return k < f.head ? k : f.vectors * width<T> + k;
}

// N elements of type S at any address, widened.
template <int N, class S, class A>
WCE_DEVICE void load_run(const S *from, A (&to)[N]) {
  constexpr int step = width<S> < N ? width<S> : N;
  if (step == width<S> && aligned16(from)) {
#pragma unroll
    for (int k = 0; k < N; k += step) {
      const packet<S> p = unpack<S>(load16(from + k));
#pragma unroll
      for (int j = 0; j < step; ++j) to[k + j] = static_cast<A>(widen(p.v[j]));
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = static_cast<A>(widen(from[k]));
  }
}

// The same where the type is known at run time only (target probabilities).
template <int N, class A>
WCE_DEVICE void load_run_as(wce_dtype dtype, const void *from, int64_t at, A (&to)[N]) {
  switch (dtype) {
    case WCE_F64: load_run<N>(static_cast<const double *>(from) + at, to); break;
    case WCE_BF16: load_run<N>(static_cast<const __nv_bfloat16 *>(from) + at, to); break;
    case WCE_F16: load_run<N>(static_cast<const __half *>(from) + at, to); break;
    default: load_run<N>(static_cast<const float *>(from) + at, to); break;
  }
}

template <class A>
WCE_DEVICE A load_as(wce_dtype dtype, const void *from, int64_t at) {
  A x[1];
  load_run_as<1>(dtype, from, at, x);
  return x[0];
}

template <class A>
WCE_DEVICE void store_as(wce_dtype dtype, void *to, int64_t at, A x) {
  switch (dtype) {
    case WCE_F64: static_cast<double *>(to)[at] = static_cast<double>(x); break;
    case WCE_BF16:
      static_cast<__nv_bfloat16 *>(to)[at] = __float2bfloat16_rn(static_cast<float>(x));
      break;
    case WCE_F16: static_cast<__half *>(to)[at] = __float2half_rn(static_cast<float>(x)); break;
    default: static_cast<float *>(to)[at] = static_cast<float>(x); break;
  }
}

}  // namespace wce_cuda
#endif
