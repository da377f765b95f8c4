// The bfloat16 of the host shim.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

static inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t bits = static_cast<uint32_t>(h.bits) << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fff};
  const uint32_t low = bits & 0xffffu, odd = (bits >> 16) & 1u;
  bits >>= 16;
  if (low > 0x8000u || (low == 0x8000u && odd)) ++bits;
  return {static_cast<uint16_t>(bits)};
}
