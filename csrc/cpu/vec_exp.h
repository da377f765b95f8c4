/* vec_exp.h -- e^d for d <= 1, written once from the vocabulary. Larger d give some number or inf.
 *
 *   e^d = 2^floor(t) * 2^(t - floor(t)),  t = d*log2(e)
 *
 * The second factor is a polynomial on [0, 1), fitted for the least relative error with the
 * constant term fixed to 1, so that e^0 is exactly 1: relative error 8.3e-8 (f32), 3.3e-18 (f64).
 * The rounding of t adds |t| * 2^-24: 63 ulp at d = -87, which is less than one ulp of a sum that
 * contains e^0. Far below the range the result is exactly 0; nan stays nan.                       */
#ifndef WCE_VEC_EXP_H
#define WCE_VEC_EXP_H

/* n vectors at a time, step by step, so that n independent chains lie close together: 7.8 -> 6.5
 * cycles a vector with n = 4 (AVX2, Zen 3).
 *
 * In two halves, as the first keeps the adders of a processor busy and the second its multipliers: a
 * loop that begins its next vectors before it ends the present ones uses both at once. Sum of e^d
 * from L1, AVX-512, Zen 4: 8.0 -> 6.2 cycles a vector. EXP_AHEAD (vec_*.h) says whether loops should:
 * whether there are registers for four more vectors and their fractions.                          */
#define WCE_DEFINE_EXP(acc, vec, type, log2e, ...)                                              \
  static const type acc##_exp_coefs[] = {__VA_ARGS__};                                          \
  WCE_INLINE void acc##_exp_begin(vec *d, vec *f, const int n) {                                \
    for (int k = 0; k < n; k++) d[k] = acc##_mul(d[k], acc##_set1(log2e));                      \
    for (int k = 0; k < n; k++) f[k] = acc##_fraction(d[k]);                                    \
  }                                                                                             \
  WCE_INLINE void acc##_exp_end(vec *d, const vec *f, const int n) {                            \
    vec p[4];                                                                                   \
    for (int k = 0; k < n; k++) p[k] = acc##_set1(acc##_exp_coefs[0]);                          \
    _Pragma("GCC unroll 16")                                                                    \
    for (size_t i = 1; i < sizeof acc##_exp_coefs / sizeof(type); i++)                          \
      for (int k = 0; k < n; k++)                                                               \
        p[k] = acc##_fma(p[k], f[k], acc##_set1(acc##_exp_coefs[i]));                           \
    for (int k = 0; k < n; k++) d[k] = acc##_scale(p[k], d[k]);                                 \
  }                                                                                             \
  WCE_INLINE void acc##_exp_n(vec *d, const int n) {                                            \
    vec f[4];                                                                                   \
    acc##_exp_begin(d, f, n);                                                                   \
    acc##_exp_end(d, f, n);                                                                     \
  }                                                                                             \
  WCE_INLINE vec acc##_exp(vec d) {                                                             \
    acc##_exp_n(&d, 1);                                                                         \
    return d;                                                                                   \
  }

WCE_DEFINE_EXP(f32, v_f32, float, 1.44269504f, 0x1.e974fcp-10f, 0x1.277854p-7f, 0x1.c91ce6p-5f,
               0x1.ebdb56p-3f, 0x1.62e4bap-1f, 1.0f)
WCE_DEFINE_EXP(f64, v_f64, double, 1.4426950408889634, 0x1.585570d838fe7p-31,
               0x1.c2c5204d8e9ddp-28, 0x1.b85f2b7c69bb8p-24, 0x1.628f374d667a5p-20,
               0x1.ffcfc67fc8a44p-17, 0x1.4308fa1efd4c4p-13, 0x1.5d87ff4d185d8p-10,
               0x1.3b2ab6f734486p-7, 0x1.c6b08d7065826p-5, 0x1.ebfbdff82c04bp-3,
               0x1.62e42fefa39f5p-1, 1.0)
#undef WCE_DEFINE_EXP

#endif
