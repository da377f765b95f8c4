#include "kernels.cuh"

namespace wce_cuda {
wce_cuda_status forward_f32(const launch &l) { return forward_of<float>(l); }
wce_cuda_status backward_f32(const launch &l) { return backward_of<float>(l); }
}  // namespace wce_cuda
