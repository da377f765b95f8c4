/* loss_math.h -- the formulas for one row, as scalar C. Also compiled by nvcc.
 *
 * Letters as in wce.h. What is here runs once per row or less; the loops over classes are in
 * cpu/row.inc, cpu/side.inc and cpu/tile.inc.                                                    */
#ifndef WCE_LOSS_MATH_H
#define WCE_LOSS_MATH_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define WCE_FN static inline __host__ __device__
#else
#define WCE_FN static inline
#endif

/* ---- 16-bit floats: exact to float, and from float rounded to nearest even ------------------- */

WCE_FN float wce_bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

WCE_FN uint32_t wce_float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

WCE_FN float wce_bf16_to_float(uint16_t h) { return wce_bits_float((uint32_t)h << 16); }

WCE_FN uint16_t wce_float_to_bf16(float value) {
  uint32_t bits = wce_float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u); /* keep it a nan */
  return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

WCE_FN float wce_f16_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return wce_bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return wce_bits_float(sign | ((magnitude << 13) + 0x38000000u));
  float value = (float)magnitude * 5.9604644775390625e-8f; /* subnormal: units of 2^-24           */
  return sign ? -value : value;
}

WCE_FN uint16_t wce_float_to_f16(float value) {
  uint32_t bits = wce_float_bits(value), sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
  if (bits < 0x38800000u) { /* below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the
                               low bits                                                            */
    uint32_t sum = wce_float_bits(wce_bits_float(bits) + 0.5f);
    return (uint16_t)(sign | (sum - 0x3f000000u));
  }
  return (uint16_t)(sign | (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13);
}

/* ---- log of a sum of exponentials -------------------------------------------------------------
 * s >= 1, or nan. Written without branches so that compilers vectorise loops over rows.
 *   s = 2^k * (1 + r),  1 + r in [sqrt(1/2), sqrt(2))
 * float: log(1 + r) = r - r^2/2 + r^3 * P(r), P fitted for the least relative error of the whole
 * (5.8e-9); within 1.03 ulp over all s, 0.86 with fma. Without a division: Zen 5, ns a row, 0.24 -> 0.17.
 * double: 2*atanh(z), z = (f - 1)/(f + 1), f = 1 + r; with |z| < 0.1716 its series in z^2 ends after 10
 * terms; within 2 ulp.                                                                            */

/* a*b + c, rounded once where the processor can. */
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
#define WCE_FMA_F32(a, b, c) __builtin_fmaf(a, b, c)
#define WCE_FMA_F64(a, b, c) __builtin_fma(a, b, c)
#else
#define WCE_FMA_F32(a, b, c) ((a) * (b) + (c))
#define WCE_FMA_F64(a, b, c) ((a) * (b) + (c))
#endif

WCE_FN float wce_log_f32(float s) {
  uint32_t bits = wce_float_bits(s);
  int32_t k = (int32_t)(bits - 0x3f3504f3u) >> 23; /* 0x3f3504f3 = sqrt(1/2)                       */
  float r = wce_bits_float(bits - ((uint32_t)k << 23)) - 1.0f, square = r * r, n = (float)k;
  float p = -0x1.38b576p-4f;
  p = WCE_FMA_F32(p, r, 0x1.055b68p-3f);
  p = WCE_FMA_F32(p, r, -0x1.0d8542p-3f);
  p = WCE_FMA_F32(p, r, 0x1.22da1ep-3f);
  p = WCE_FMA_F32(p, r, -0x1.547244p-3f);
  p = WCE_FMA_F32(p, r, 0x1.99a008p-3f);
  p = WCE_FMA_F32(p, r, -0x1.000226p-2f);
  p = WCE_FMA_F32(p, r, 0x1.555554p-2f);
  /* k*log(2) in two parts, the smaller ones first                                                 */
  float small = WCE_FMA_F32(square, -0.5f, square * r * p);
  small = WCE_FMA_F32(n, -1.904654323148236e-9f, small);
  return WCE_FMA_F32(n, 0.693147182464599609375f, r + small) + s * 0.0f; /* nan stays nan          */
}

WCE_FN double wce_log_f64(double s) {
  uint64_t bits;
  memcpy(&bits, &s, sizeof bits);
  int64_t k = (int64_t)(bits - 0x3fe6a09e667f3bcdull) >> 52; /* sqrt(1/2)                          */
  uint64_t f_bits = bits - ((uint64_t)k << 52);
  double f;
  memcpy(&f, &f_bits, sizeof f);
  double z = (f - 1.0) / (f + 1.0), q = z * z;
  double series = 1.0 / 21;
  series = WCE_FMA_F64(q, series, 1.0 / 19);
  series = WCE_FMA_F64(q, series, 1.0 / 17);
  series = WCE_FMA_F64(q, series, 1.0 / 15);
  series = WCE_FMA_F64(q, series, 1.0 / 13);
  series = WCE_FMA_F64(q, series, 1.0 / 11);
  series = WCE_FMA_F64(q, series, 1.0 / 9);
  series = WCE_FMA_F64(q, series, 1.0 / 7);
  series = WCE_FMA_F64(q, series, 1.0 / 5);
  series = WCE_FMA_F64(q, series, 1.0 / 3);
  double log_f = 2.0 * z + 2.0 * z * (q * series);
  double n = (double)(int32_t)k;
  double result = n * 6.93147180369123816490e-01 + (log_f + n * 1.90821492927058770002e-10);
  return result + s * 0.0;
}

/* ---- one row ---------------------------------------------------------------------------------- */

/* loss / s of a counted row. x_y: logit of the target class, spike_w = spike * w_y; A and D = sum
 * of a_c*(x_c - m) without the spike. Coefficients of exactly 0 add nothing, also at -inf.        */
#define WCE_DEFINE_ROW_LOSS(acc)                                                       \
  WCE_FN acc wce_row_loss_##acc(acc m, acc L, acc x_y, acc spike_w, acc A, acc D) {    \
    acc target_part = spike_w == 0 ? L * 0 : spike_w * (L - (x_y - m));                \
    return target_part + (A * L - D);                                                  \
  }
WCE_DEFINE_ROW_LOSS(float)
WCE_DEFINE_ROW_LOSS(double)
#undef WCE_DEFINE_ROW_LOSS

/* ---- all rows ---------------------------------------------------------------------------------- */

/* The mean's own denominator; weight: sum of s*w_y of the rows that count. Where that is 0 the mean
 * and the gradient of these rows are nan, as without smoothing (0/0): the smoothing term over 0
 * would be inf. A denominator that the caller gives is taken as it is.                            */
WCE_FN double wce_own_denominator(double weight) { return weight == 0 ? (double)NAN : weight; }

#endif
