/* vec_exp.h -- e^d for d <= 0, written once from the vocabulary.
 *
 *   e^d = 2^floor(t) * 2^(t - floor(t)),  t = d*log2(e)
 *
 * The second factor is a polynomial on [0, 1), fitted for the least relative error with the
 * constant term fixed to 1, so that e^0 is exactly 1: relative error 8.3e-8 (f32), 3.3e-18 (f64).
 * The rounding of t adds |t| * 2^-24: 63 ulp at d = -87, which is less than one ulp of a sum that
 * contains e^0. Far below the range the result is exactly 0; nan stays nan.                       */
#ifndef WCE_VEC_EXP_H
#define WCE_VEC_EXP_H

WCE_INLINE v_f32 f32_exp(v_f32 d) {
  v_f32 t = f32_mul(d, f32_set1(1.44269504f)), f = f32_fraction(t);
  v_f32 p = f32_set1(0x1.e974fcp-10f);
  p = f32_fma(p, f, f32_set1(0x1.277854p-7f));
  p = f32_fma(p, f, f32_set1(0x1.c91ce6p-5f));
  p = f32_fma(p, f, f32_set1(0x1.ebdb56p-3f));
  p = f32_fma(p, f, f32_set1(0x1.62e4bap-1f));
  p = f32_fma(p, f, f32_set1(1.0f));
  return f32_scale(p, t);
}

WCE_INLINE v_f64 f64_exp(v_f64 d) {
  v_f64 t = f64_mul(d, f64_set1(1.4426950408889634)), f = f64_fraction(t);
  v_f64 p = f64_set1(0x1.585570d838fe7p-31);
  p = f64_fma(p, f, f64_set1(0x1.c2c5204d8e9ddp-28));
  p = f64_fma(p, f, f64_set1(0x1.b85f2b7c69bb8p-24));
  p = f64_fma(p, f, f64_set1(0x1.628f374d667a5p-20));
  p = f64_fma(p, f, f64_set1(0x1.ffcfc67fc8a44p-17));
  p = f64_fma(p, f, f64_set1(0x1.4308fa1efd4c4p-13));
  p = f64_fma(p, f, f64_set1(0x1.5d87ff4d185d8p-10));
  p = f64_fma(p, f, f64_set1(0x1.3b2ab6f734486p-7));
  p = f64_fma(p, f, f64_set1(0x1.c6b08d7065826p-5));
  p = f64_fma(p, f, f64_set1(0x1.ebfbdff82c04bp-3));
  p = f64_fma(p, f, f64_set1(0x1.62e42fefa39f5p-1));
  p = f64_fma(p, f, f64_set1(1.0));
  return f64_scale(p, t);
}

#endif
