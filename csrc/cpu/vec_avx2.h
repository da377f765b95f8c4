/* vec_avx2.h -- the vocabulary of vec_scalar.h with 8 (f32) or 4 (f64) lanes: AVX2, FMA, F16C.    */
#ifndef WCE_VEC_H
#define WCE_VEC_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "../loss_math.h"

#define WCE_INLINE static inline __attribute__((always_inline))

typedef __m256 v_f32;
typedef __m256d v_f64;
enum { LANES_f32 = 8, LANES_f64 = 4 };
typedef int32_t index_f32;
typedef int64_t index_f64;

/* All bits set in the first n lanes. */
WCE_INLINE __m256i wce_first_lanes_f32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
WCE_INLINE __m256i wce_first_lanes_f64(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

#define WCE_AVX2_WORDS(acc, vec, type, sfx, index_set1, index_cmpeq)                            \
  WCE_INLINE vec acc##_set1(type a) { return _mm256_set1_##sfx(a); }                            \
  WCE_INLINE vec acc##_add(vec a, vec b) { return _mm256_add_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_sub(vec a, vec b) { return _mm256_sub_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_mul(vec a, vec b) { return _mm256_mul_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_fma(vec a, vec b, vec c) { return _mm256_fmadd_##sfx(a, b, c); }         \
  WCE_INLINE vec acc##_max(vec a, vec b) { return _mm256_max_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_mulz(vec a, vec b) {                                                     \
    return _mm256_and_##sfx(_mm256_cmp_##sfx(a, _mm256_setzero_##sfx(), _CMP_NEQ_UQ),           \
                            _mm256_mul_##sfx(a, b));                                            \
  }                                                                                             \
  WCE_INLINE vec acc##_add_if(vec v, const index_##acc *index, int64_t c, vec y) {              \
    __m256i equal = index_cmpeq(_mm256_loadu_si256((const __m256i *)index),                     \
                                index_set1((index_##acc)c));                                    \
    return _mm256_blendv_##sfx(v, _mm256_add_##sfx(v, y), _mm256_castsi256_##sfx(equal));       \
  }                                                                                             \
  /* -inf - -inf would be nan: limited first; t far below the range needs no exact fraction */  \
  WCE_INLINE vec acc##_fraction(vec t) {                                                        \
    vec limited = _mm256_max_##sfx(_mm256_set1_##sfx(-5000), t);                                \
    return _mm256_sub_##sfx(limited, _mm256_floor_##sfx(limited));                              \
  }                                                                                             \
  /* in its own type */                                                                         \
  WCE_INLINE vec acc##_load_##acc(const type *p) { return _mm256_loadu_##sfx(p); }              \
  WCE_INLINE vec acc##_load_n_##acc(const type *p, int n, vec fill) {                           \
    __m256i lanes = wce_first_lanes_##acc(n);                                                   \
    return _mm256_blendv_##sfx(fill, _mm256_maskload_##sfx(p, lanes),                           \
                               _mm256_castsi256_##sfx(lanes));                                  \
  }                                                                                             \
  WCE_INLINE void acc##_store_##acc(type *p, vec v) { _mm256_storeu_##sfx(p, v); }              \
  WCE_INLINE void acc##_store_n_##acc(type *p, vec v, int n) {                                  \
    _mm256_maskstore_##sfx(p, wce_first_lanes_##acc(n), v);                                     \
  }                                                                                             \
  WCE_INLINE void acc##_stream_##acc(type *p, vec v) { _mm256_stream_##sfx(p, v); }

WCE_AVX2_WORDS(f32, v_f32, float, ps, _mm256_set1_epi32, _mm256_cmpeq_epi32)
WCE_AVX2_WORDS(f64, v_f64, double, pd, _mm256_set1_epi64x, _mm256_cmpeq_epi64)
#undef WCE_AVX2_WORDS

/* 2^floor(t) is made in the exponent's bits; a result below the normal range becomes 0. A nan in p
 * survives: the comparison is "not less", which is true of nan.                                   */
WCE_INLINE v_f32 f32_scale(v_f32 p, v_f32 t) {
  __m256i n = _mm256_cvtps_epi32(_mm256_floor_ps(_mm256_max_ps(_mm256_set1_ps(-126), t)));
  __m256 two_n = _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  __m256 normal = _mm256_cmp_ps(t, _mm256_set1_ps(-126), _CMP_NLT_UQ);
  return _mm256_blendv_ps(_mm256_setzero_ps(), _mm256_mul_ps(p, two_n), normal);
}

WCE_INLINE v_f64 f64_scale(v_f64 p, v_f64 t) {
  __m256d limited = _mm256_floor_pd(_mm256_max_pd(_mm256_set1_pd(-1022), t));
  __m256i n = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(limited));
  __m256d two_n = _mm256_castsi256_pd(
      _mm256_slli_epi64(_mm256_add_epi64(n, _mm256_set1_epi64x(1023)), 52));
  __m256d normal = _mm256_cmp_pd(t, _mm256_set1_pd(-1022), _CMP_NLT_UQ);
  return _mm256_blendv_pd(_mm256_setzero_pd(), _mm256_mul_pd(p, two_n), normal);
}

WCE_INLINE float f32_first(v_f32 v) { return _mm256_cvtss_f32(v); }
WCE_INLINE double f64_first(v_f64 v) { return _mm256_cvtsd_f64(v); }

#define WCE_AVX2_ACROSS(name, op)                                                               \
  WCE_INLINE float f32_h##name(v_f32 v) {                                                       \
    __m128 h = _mm_##op##_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));           \
    h = _mm_##op##_ps(h, _mm_movehl_ps(h, h));                                                  \
    return _mm_cvtss_f32(_mm_##op##_ss(h, _mm_shuffle_ps(h, h, 1)));                            \
  }                                                                                             \
  WCE_INLINE double f64_h##name(v_f64 v) {                                                      \
    __m128d h = _mm_##op##_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));          \
    return _mm_cvtsd_f64(_mm_##op##_sd(h, _mm_unpackhi_pd(h, h)));                              \
  }
WCE_AVX2_ACROSS(add, add)
WCE_AVX2_ACROSS(max, max)
#undef WCE_AVX2_ACROSS

/* ---- 16-bit types ----------------------------------------------------------------------------- */

WCE_INLINE __m256 wce_widen_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

WCE_INLINE __m128i wce_narrow_bf16(__m256 v) {
  __m256i bits = _mm256_castps_si256(v);
  __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  __m256i packed = _mm256_packus_epi32(rounded, rounded);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

WCE_INLINE __m256 wce_widen_f16(__m128i h) { return _mm256_cvtph_ps(h); }
WCE_INLINE __m128i wce_narrow_f16(__m256 v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#define WCE_AVX2_HALF(elem)                                                                     \
  WCE_INLINE v_f32 f32_load_##elem(const uint16_t *p) {                                         \
    return wce_widen_##elem(_mm_loadu_si128((const __m128i *)p));                               \
  }                                                                                             \
  WCE_INLINE v_f32 f32_load_n_##elem(const uint16_t *p, int n, v_f32 fill) {                    \
    if (n >= 8) return f32_load_##elem(p);                                                      \
    uint16_t part[8] = {0};                                                                     \
    for (int i = 0; i < n; i++) part[i] = p[i];                                                 \
    return _mm256_blendv_ps(fill, f32_load_##elem(part),                                        \
                            _mm256_castsi256_ps(wce_first_lanes_f32(n)));                       \
  }                                                                                             \
  WCE_INLINE void f32_store_##elem(uint16_t *p, v_f32 v) {                                      \
    _mm_storeu_si128((__m128i *)p, wce_narrow_##elem(v));                                       \
  }                                                                                             \
  WCE_INLINE void f32_store_n_##elem(uint16_t *p, v_f32 v, int n) {                             \
    uint16_t part[8];                                                                           \
    f32_store_##elem(part, v);                                                                  \
    memcpy(p, part, sizeof(uint16_t) * (size_t)(n < 8 ? n : 8));                                \
  }                                                                                             \
  WCE_INLINE void f32_stream_##elem(uint16_t *p, v_f32 v) {                                     \
    _mm_stream_si128((__m128i *)p, wce_narrow_##elem(v));                                       \
  }
WCE_AVX2_HALF(bf16)
WCE_AVX2_HALF(f16)
#undef WCE_AVX2_HALF

WCE_INLINE void wce_stream_fence(void) { _mm_sfence(); }

/* ---- transposes ------------------------------------------------------------------------------- */

WCE_INLINE void f32_transpose(__m256 r[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) { /* pairs of rows                                                */
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) { /* fours of rows                                                */
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) { /* halves of 128 bits                                              */
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

WCE_INLINE void f64_transpose(__m256d r[4]) {
  __m256d a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
  __m256d c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
  r[0] = _mm256_permute2f128_pd(a, c, 0x20);
  r[1] = _mm256_permute2f128_pd(b, d, 0x20);
  r[2] = _mm256_permute2f128_pd(a, c, 0x31);
  r[3] = _mm256_permute2f128_pd(b, d, 0x31);
}

#endif
