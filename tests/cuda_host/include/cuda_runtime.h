// A CUDA device of one core: runs kernels on the CPU, threads of a block as fibers.
//
// Blocks run one after the other. The threads of a block run in an order drawn from a seed, each
// until it reaches a barrier or a shuffle, some warps far ahead of others; a kernel whose result
// depends on that order is wrong.
// An asynchronous copy happens at once or, by chance, not before its thread waits for it.
// Shared memory is allocated at its exact size and filled with nan for each block. A barrier that
// not every thread of the block (a shuffle: of the warp) reaches ends the process.
#pragma once

#include <assert.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <string>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace shim {

struct position {
  dim3 thread, block, block_size, grid;
};
const position &now();
void seed(unsigned value);
void leave_out(const char *place);        // the barrier or check of that name, from now on
bool is_left_out(const char *place);
void run(int64_t blocks, int64_t threads, size_t shared, const std::function<void()> &kernel);
unsigned char *shared();
void block_barrier();
uint64_t exchange(uint64_t mine, int lane);  // among the 32 threads of a warp
void copy16(void *to, const void *from);     // now, or when the thread waits for its copies
void wait_for_copies();

}  // namespace shim

#define threadIdx (shim::now().thread)
#define blockIdx (shim::now().block)
#define blockDim (shim::now().block_size)
#define gridDim (shim::now().grid)

#define WCE_LEFT_OUT(place)                                   \
  ([] {                                                       \
    static const bool left_out = shim::is_left_out(#place);   \
    return left_out;                                          \
  }())
#define WCE_SYNC(place)                              \
  do {                                               \
    if (!WCE_LEFT_OUT(place)) shim::block_barrier(); \
  } while (0)
#define WCE_COPY16(to, from) shim::copy16(to, from)
#define WCE_WAIT(place)                                \
  do {                                                 \
    if (!WCE_LEFT_OUT(place)) shim::wait_for_copies(); \
  } while (0)
#define WCE_GUARD(place, condition) (WCE_LEFT_OUT(place) || (condition))
#define WCE_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...) \
  ((void)(stream), shim::run((blocks), (threads), (shared_bytes), [=] { kernel(__VA_ARGS__); }))
#define WCE_SHARED(name) unsigned char *const name = shim::shared()

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  assert(mask == 0xffffffffu);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shim::exchange(bits, lane & 31);
  memcpy(&value, &bits, sizeof value);
  return value;
}

#define printf(...) fprintf(stderr, __VA_ARGS__)  // unbuffered: the device may stop right after

static inline unsigned long long atomicMin(unsigned long long *at, unsigned long long value) {
  const unsigned long long old = *at;
  if (value < old) *at = value;
  return old;
}

typedef void *cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline const char *cudaGetErrorString(cudaError_t) { return "error"; }
static inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind,
                                          cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
static inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
static inline cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = 0;
  return cudaSuccess;
}
