// The half of the host shim: by arithmetic, to be plainly right.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

static inline float __half2float(__half h) {
  const int exponent = (h.bits >> 10) & 31, fraction = h.bits & 1023;
  float x = exponent == 31 ? (fraction ? NAN : INFINITY)
            : exponent     ? ldexpf(1024.0f + fraction, exponent - 25)
                           : ldexpf(static_cast<float>(fraction), -24);
  return h.bits & 0x8000 ? -x : x;
}

static inline __half __float2half_rn(float x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  if (x != x) return {static_cast<uint16_t>(sign | 0x7e00)};
  const double size = fabs(static_cast<double>(x));
  if (size >= 65520.0) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  frexp(size, &exponent);                       // size = f * 2^exponent, f in [0.5, 1)
  if (exponent < -13) exponent = -13;           // subnormal: units of 2^-24
  const double units = nearbyint(ldexp(size, 11 - exponent));  // ties to even
  const int biased = exponent + 14;             // 1 for the smallest normal exponent
  // 1024 units carry into the exponent by themselves.
  const int bits = units < 1024 ? static_cast<int>(units)
                                : (biased << 10) + static_cast<int>(units) - 1024;
  return {static_cast<uint16_t>(sign | bits)};
}
