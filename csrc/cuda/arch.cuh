// arch.cuh -- everything that depends on the machine: PTX, barriers, the launch syntax.
//
// Each helper has a host twin, so that the kernels also run on a CPU (tests/cuda_host), where the
// macros below are defined first. There a test can leave out one barrier, wait or bounds check by
// its name, and expects to be told of it.
#ifndef WCE_CUDA_ARCH_CUH
#define WCE_CUDA_ARCH_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>

#undef NDEBUG  // a bad target must stop the device in every build
#include <assert.h>

#ifndef WCE_SYNC
#define WCE_SYNC(place) __syncthreads()
#define WCE_GUARD(place, condition) (condition)
#define WCE_COPY16(to, from) copy16_async(to, from)
#define WCE_WAIT(place) wait_for_copies()
#define WCE_LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  kernel<<<(unsigned)(blocks), (unsigned)(threads), (shared), (stream)>>>(__VA_ARGS__)
#define WCE_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define WCE_DEVICE static __device__ __forceinline__

namespace wce_cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool from_sm_100 = true;
#else
constexpr bool from_sm_100 = false;
#endif

// 2^x with at most 2 ulp of error; -inf gives 0, nan gives nan. Denormal results become 0.
WCE_DEVICE float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 16 bytes that are read once: past L1, and early out of L2.
WCE_DEVICE uint4 load16_once(const void *address) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
#else
  return *static_cast<const uint4 *>(address);
#endif
}

// 16 bytes that will be read again by this block.
WCE_DEVICE uint4 load16(const void *address) {
#ifdef __CUDA_ARCH__
  return __ldg(static_cast<const uint4 *>(address));
#else
  return *static_cast<const uint4 *>(address);
#endif
}

// 16 bytes from global to shared memory without a detour through registers. They are there for this
// thread after wait_for_copies(), for the block after a barrier behind it. sm_75 cannot: it waits.
WCE_DEVICE void copy16_async(void *shared, const void *global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4 *>(shared) = load16_once(global);
#endif
}

WCE_DEVICE void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// 16 bytes of output that this kernel does not read again.
WCE_DEVICE void store16_once(void *address, uint4 v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
#else
  *static_cast<uint4 *>(address) = v;
#endif
}

WCE_DEVICE float exp_of(float x) { return exp2_approx(x * 1.4426950408889634f); }
WCE_DEVICE double exp_of(double x) { return exp(x); }
WCE_DEVICE float log_of(float x) { return logf(x); }
WCE_DEVICE double log_of(double x) { return log(x); }
WCE_DEVICE float max_of(float a, float b) { return fmaxf(a, b); }  // drops nan, both of them
WCE_DEVICE double max_of(double a, double b) { return fmax(a, b); }

template <class A>
WCE_DEVICE A infinity() {
  return static_cast<A>(INFINITY);
}

}  // namespace wce_cuda
#endif
