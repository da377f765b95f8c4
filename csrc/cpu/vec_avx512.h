/* vec_avx512.h -- the vocabulary of vec_scalar.h with 16 (f32) or 8 (f64) lanes: AVX-512 F, BW, DQ, VL. */
#ifndef WCE_VEC_H
#define WCE_VEC_H

#include <immintrin.h>
#include <stdint.h>

#include "../loss_math.h"

#define WCE_INLINE static inline __attribute__((always_inline))

typedef __m512 v_f32;
typedef __m512d v_f64;
enum { LANES_f32 = 16, LANES_f64 = 8 };
typedef int32_t index_f32;
typedef int64_t index_f64;

/* The first n lanes; all of them when n is larger. */
WCE_INLINE uint32_t wce_first_lanes(int n, int lanes) {
  return n >= lanes ? (1u << lanes) - 1u : (1u << n) - 1u;
}

#define WCE_AVX512_WORDS(acc, vec, type, sfx, index_sfx)                                        \
  WCE_INLINE vec acc##_set1(type a) { return _mm512_set1_##sfx(a); }                            \
  WCE_INLINE vec acc##_add(vec a, vec b) { return _mm512_add_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_sub(vec a, vec b) { return _mm512_sub_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_mul(vec a, vec b) { return _mm512_mul_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_fma(vec a, vec b, vec c) { return _mm512_fmadd_##sfx(a, b, c); }         \
  WCE_INLINE vec acc##_max(vec a, vec b) { return _mm512_max_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_mulz(vec a, vec b) {                                                     \
    return _mm512_maskz_mul_##sfx(                                                              \
        _mm512_cmp_##sfx##_mask(a, _mm512_setzero_##sfx(), _CMP_NEQ_UQ), a, b);                 \
  }                                                                                             \
  WCE_INLINE vec acc##_add_if(vec v, const index_##acc *index, int64_t c, vec y) {              \
    return _mm512_mask_add_##sfx(                                                               \
        v,                                                                                      \
        _mm512_cmpeq_##index_sfx##_mask(_mm512_loadu_si512(index),                              \
                                        _mm512_set1_##index_sfx((index_##acc)c)),               \
        v, y);                                                                                  \
  }                                                                                             \
  WCE_INLINE vec acc##_fraction(vec t) { return _mm512_reduce_##sfx(t, 0x09); } /* 1: floor */  \
  WCE_INLINE vec acc##_scale(vec p, vec t) { return _mm512_scalef_##sfx(p, t); }                \
  WCE_INLINE type acc##_hadd(vec v) { return _mm512_reduce_add_##sfx(v); }                      \
  WCE_INLINE type acc##_hmax(vec v) { return _mm512_reduce_max_##sfx(v); }                      \
  /* in its own type */                                                                         \
  WCE_INLINE vec acc##_load_##acc(const type *p) { return _mm512_loadu_##sfx(p); }              \
  WCE_INLINE vec acc##_load_n_##acc(const type *p, int n, vec fill) {                           \
    return _mm512_mask_loadu_##sfx(fill, (acc##_mask)wce_first_lanes(n, LANES_##acc), p);       \
  }                                                                                             \
  WCE_INLINE void acc##_store_##acc(type *p, vec v) { _mm512_storeu_##sfx(p, v); }              \
  WCE_INLINE void acc##_store_n_##acc(type *p, vec v, int n) {                                  \
    _mm512_mask_storeu_##sfx(p, (acc##_mask)wce_first_lanes(n, LANES_##acc), v);                \
  }                                                                                             \
  WCE_INLINE void acc##_stream_##acc(type *p, vec v) { _mm512_stream_##sfx(p, v); }

typedef __mmask16 f32_mask;
typedef __mmask8 f64_mask;
WCE_AVX512_WORDS(f32, v_f32, float, ps, epi32)
WCE_AVX512_WORDS(f64, v_f64, double, pd, epi64)
#undef WCE_AVX512_WORDS

WCE_INLINE float f32_first(v_f32 v) { return _mm512_cvtss_f32(v); }
WCE_INLINE double f64_first(v_f64 v) { return _mm512_cvtsd_f64(v); }

/* ---- 16-bit types ----------------------------------------------------------------------------- */

WCE_INLINE __m512 wce_widen_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* To nearest even in integers: vcvtneps2bf16 is not everywhere and takes subnormals for 0. */
WCE_INLINE __m256i wce_narrow_bf16(__m512 v) {
  __m512i bits = _mm512_castps_si512(v), lsb;
  __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

WCE_INLINE __m512 wce_widen_f16(__m256i h) { return _mm512_cvtph_ps(h); }
WCE_INLINE __m256i wce_narrow_f16(__m512 v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#define WCE_AVX512_HALF(elem)                                                                   \
  WCE_INLINE v_f32 f32_load_##elem(const uint16_t *p) {                                         \
    return wce_widen_##elem(_mm256_loadu_si256((const __m256i *)p));                            \
  }                                                                                             \
  WCE_INLINE v_f32 f32_load_n_##elem(const uint16_t *p, int n, v_f32 fill) {                    \
    __mmask16 lanes = (__mmask16)wce_first_lanes(n, 16);                                        \
    return _mm512_mask_mov_ps(fill, lanes, wce_widen_##elem(_mm256_maskz_loadu_epi16(lanes, p))); \
  }                                                                                             \
  WCE_INLINE void f32_store_##elem(uint16_t *p, v_f32 v) {                                      \
    _mm256_storeu_si256((__m256i *)p, wce_narrow_##elem(v));                                    \
  }                                                                                             \
  WCE_INLINE void f32_store_n_##elem(uint16_t *p, v_f32 v, int n) {                             \
    _mm256_mask_storeu_epi16(p, (__mmask16)wce_first_lanes(n, 16), wce_narrow_##elem(v));       \
  }                                                                                             \
  WCE_INLINE void f32_stream_##elem(uint16_t *p, v_f32 v) {                                     \
    _mm256_stream_si256((__m256i *)p, wce_narrow_##elem(v));                                    \
  }
WCE_AVX512_HALF(bf16)
WCE_AVX512_HALF(f16)
#undef WCE_AVX512_HALF

WCE_INLINE void wce_stream_fence(void) { _mm_sfence(); }

/* ---- transposes ------------------------------------------------------------------------------- */

WCE_INLINE void f32_transpose(__m512 r[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) { /* pairs of rows, 32 bits at a time                            */
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) { /* fours of rows, 64 bits at a time                            */
#define WCE_PD(x) _mm512_castps_pd(x)
    r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(WCE_PD(t[i]), WCE_PD(t[i + 2])));
    r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(WCE_PD(t[i]), WCE_PD(t[i + 2])));
    r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(WCE_PD(t[i + 1]), WCE_PD(t[i + 3])));
    r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(WCE_PD(t[i + 1]), WCE_PD(t[i + 3])));
#undef WCE_PD
  }
  for (int i = 0; i < 4; i++) { /* quarters of 128 bits: even ones, odd ones                       */
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}

WCE_INLINE void f64_transpose(__m512d r[8]) {
  __m512d t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_pd(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_pd(r[i], r[i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
    r[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
    r[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
    r[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f64x2(r[i], r[i + 4], 0xdd);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

#endif
