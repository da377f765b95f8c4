// stream_cuda.h -- the one question that the CUDA glue has to ask a device.
#pragma once

#include <c10/core/Device.h>

namespace wce {

// torch's current stream of the device: a cudaStream_t.
void *current_cuda_stream(const c10::Device &device);

}  // namespace wce
