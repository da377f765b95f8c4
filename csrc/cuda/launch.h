// launch.h -- what dispatch.cu hands to the files of the element types.
#ifndef WCE_CUDA_LAUNCH_H
#define WCE_CUDA_LAUNCH_H

#include "wce_cuda.h"

namespace wce_cuda {

struct launch {
  const wce_cuda_plan *plan;
  const wce_problem *problem;
  const wce_row_outputs *out;    // forward
  const wce_cuda_total *total;   // forward
  const wce_row_grads *grads;    // backward
  int64_t blocks, sum_blocks;    // sum_blocks: of the launch that leaves partial sums
  void *workspace;               // partial sums
  void *pieces;                  // of chunks, or NULL
  const void *weight_sum;        // acc, one value, or NULL
  uint64_t *bad;
  void *stream;
};

constexpr int combine_threads = 256;

// The error of the launch just made, with the kernel's name.
wce_cuda_status launched(const char *kernel);

wce_cuda_status forward_f32(const launch &), backward_f32(const launch &);
wce_cuda_status forward_f64(const launch &), backward_f64(const launch &);
wce_cuda_status forward_bf16(const launch &), backward_bf16(const launch &);
wce_cuda_status forward_f16(const launch &), backward_f16(const launch &);

}  // namespace wce_cuda
#endif
