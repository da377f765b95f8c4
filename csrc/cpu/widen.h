/* widen.h -- arrays and scalars of any element type as acc, from the vocabulary.                  */
#ifndef WCE_WIDEN_H
#define WCE_WIDEN_H

#define WCE_DEFINE_TWO(acc, elem, elem_t)                                                       \
  WCE_INLINE void acc##_load_two_##elem(const elem_t *p, v_##acc two[2]) {                      \
    two[0] = acc##_load_##elem(p), two[1] = acc##_load_##elem(p + LANES_##acc);                 \
  }                                                                                             \
  WCE_INLINE void acc##_store_two_##elem(elem_t *p, const v_##acc two[2]) {                     \
    acc##_store_pair_##elem(p, two[0], two[1]);                                                 \
  }                                                                                             \
  WCE_INLINE void acc##_order_two_##elem(v_##acc two[2]) { (void)two; }
WCE_DEFINE_TWO(f32, f32, float)
WCE_DEFINE_TWO(f64, f64, double)
WCE_DEFINE_TWO(f32, f16, uint16_t)
#ifndef WCE_HAVE_TWO_bf16
WCE_DEFINE_TWO(f32, bf16, uint16_t)
#endif
#undef WCE_DEFINE_TWO

/* n elements; dst has room for LANES more. */
#define WCE_DEFINE_WIDEN(acc, type, elem, elem_t)                                               \
  static inline void acc##_widen_##elem(type *dst, const elem_t *src, int64_t n) {              \
    int64_t i = 0;                                                                              \
    for (; i + LANES_##acc <= n; i += LANES_##acc)                                              \
      acc##_store_##acc(dst + i, acc##_load_##elem(src + i));                                   \
    if (i < n)                                                                                  \
      acc##_store_##acc(dst + i, acc##_load_n_##elem(src + i, (int)(n - i), acc##_set1(0)));    \
  }
WCE_DEFINE_WIDEN(f32, float, f32, float)
WCE_DEFINE_WIDEN(f32, float, bf16, uint16_t)
WCE_DEFINE_WIDEN(f32, float, f16, uint16_t)
WCE_DEFINE_WIDEN(f64, double, f64, double)
#undef WCE_DEFINE_WIDEN

static inline void f32_widen(float *dst, const void *src, wce_dtype dtype, int64_t n) {
  switch (dtype) {
  case WCE_BF16: f32_widen_bf16(dst, (const uint16_t *)src, n); break;
  case WCE_F16: f32_widen_f16(dst, (const uint16_t *)src, n); break;
  default: f32_widen_f32(dst, (const float *)src, n); break;
  }
}
static inline void f64_widen(double *dst, const void *src, wce_dtype dtype, int64_t n) {
  (void)dtype; /* soft targets of f64 logits are f64 */
  f64_widen_f64(dst, (const double *)src, n);
}

/* e^x of n numbers in place. */
#define WCE_DEFINE_EXP_ARRAY(acc, type)                                                         \
  static inline void acc##_exp_array(type *x, int n) {                                          \
    for (int i = 0; i < n; i += LANES_##acc) {                                                  \
      v_##acc part = acc##_load_n_##acc(x + i, n - i, acc##_set1(0));                           \
      acc##_store_n_##acc(x + i, acc##_exp(part), n - i);                                       \
    }                                                                                           \
  }
WCE_DEFINE_EXP_ARRAY(f32, float)
WCE_DEFINE_EXP_ARRAY(f64, double)
#undef WCE_DEFINE_EXP_ARRAY

/* Element i of an array of any type. */
static inline double wce_get(const void *p, wce_dtype dtype, int64_t i) {
  switch (dtype) {
  case WCE_F32: return ((const float *)p)[i];
  case WCE_F64: return ((const double *)p)[i];
  case WCE_BF16: return wce_bf16_to_float(((const uint16_t *)p)[i]);
  default: return wce_f16_to_float(((const uint16_t *)p)[i]);
  }
}

/* value has the precision of acc already, so that f32 -> bf16 rounds once. */
static inline void wce_put(void *p, wce_dtype dtype, int64_t i, double value) {
  switch (dtype) {
  case WCE_F32: ((float *)p)[i] = (float)value; break;
  case WCE_F64: ((double *)p)[i] = value; break;
  case WCE_BF16: ((uint16_t *)p)[i] = wce_float_to_bf16((float)value); break;
  default: ((uint16_t *)p)[i] = wce_float_to_f16((float)value); break;
  }
}

#endif
