#include "kernels.cuh"

namespace wce_cuda {
wce_cuda_status forward_f16(const launch &l) { return forward_of<__half>(l); }
wce_cuda_status backward_f16(const launch &l) { return backward_of<__half>(l); }
}  // namespace wce_cuda
