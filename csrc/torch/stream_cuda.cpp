// stream_cuda.cpp -- the current stream, through torch's device-independent interface: a torch
// without CUDA has no CUDA headers.
#include "stream_cuda.h"

#include <c10/core/impl/VirtualGuardImpl.h>

namespace wce {

void *current_cuda_stream(const c10::Device &device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return reinterpret_cast<void *>(guard.getStream(device).native_handle());
}

}  // namespace wce
