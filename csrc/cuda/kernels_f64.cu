#include "kernels.cuh"

namespace wce_cuda {
wce_cuda_status forward_f64(const launch &l) { return forward_of<double>(l); }
wce_cuda_status backward_f64(const launch &l) { return backward_of<double>(l); }
}  // namespace wce_cuda
