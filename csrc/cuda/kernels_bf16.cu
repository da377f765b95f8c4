#include "kernels.cuh"

namespace wce_cuda {
wce_cuda_status forward_bf16(const launch &l) { return forward_of<__nv_bfloat16>(l); }
wce_cuda_status backward_bf16(const launch &l) { return backward_of<__nv_bfloat16>(l); }
}  // namespace wce_cuda
