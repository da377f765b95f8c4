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
typedef int32_t lane_f32;
typedef int64_t lane_f64;
enum { LANES_f32 = 8, LANES_f64 = 4, EXP_AHEAD = 0, EXP_IS_QUICK = 0 };

/* All bits set in the first n lanes. */
WCE_INLINE __m256i wce_first_lanes_f32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
WCE_INLINE __m256i wce_first_lanes_f64(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

#define WCE_AVX2_WORDS(acc, vec, type, sfx, cmp_sfx, set_sfx)                                        \
  WCE_INLINE vec acc##_set1(type a) { return _mm256_set1_##sfx(a); }                            \
  WCE_INLINE vec acc##_add(vec a, vec b) { return _mm256_add_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_sub(vec a, vec b) { return _mm256_sub_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_mul(vec a, vec b) { return _mm256_mul_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_fma(vec a, vec b, vec c) { return _mm256_fmadd_##sfx(a, b, c); }         \
  WCE_INLINE vec acc##_max(vec a, vec b) { return _mm256_max_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_where(const lane_##acc *y, lane_##acc c, vec a, vec b) {                 \
    __m256i lanes = _mm256_loadu_si256((const __m256i *)(const void *)y);                       \
    __m256i equal = _mm256_cmpeq_##cmp_sfx(lanes, _mm256_set1_##set_sfx(c));                    \
    return _mm256_blendv_##sfx(b, a, _mm256_castsi256_##sfx(equal));                            \
  }                                                                                             \
  WCE_INLINE vec acc##_mulz(vec a, vec b) {                                                     \
    return _mm256_and_##sfx(_mm256_cmp_##sfx(a, _mm256_setzero_##sfx(), _CMP_NEQ_UQ),           \
                            _mm256_mul_##sfx(a, b));                                            \
  }                                                                                             \
  /* in its own type */                                                                         \
  WCE_INLINE vec acc##_load_##acc(const type *p) { return _mm256_loadu_##sfx(p); }              \
  WCE_INLINE vec acc##_load_n_##acc(const type *p, int n, vec fill) {                           \
    __m256i lanes = wce_first_lanes_##acc(n);                                                   \
    return _mm256_blendv_##sfx(fill, _mm256_maskload_##sfx(p, lanes),                           \
                               _mm256_castsi256_##sfx(lanes));                                  \
  }                                                                                             \
  WCE_INLINE void acc##_store_##acc(type *p, vec v) { _mm256_storeu_##sfx(p, v); }              \
  WCE_INLINE void acc##_store_pair_##acc(type *p, vec a, vec b) {                               \
    _mm256_storeu_##sfx(p, a);                                                                  \
    _mm256_storeu_##sfx(p + LANES_##acc, b);                                                    \
  }

WCE_AVX2_WORDS(f32, v_f32, float, ps, epi32, epi32)
WCE_AVX2_WORDS(f64, v_f64, double, pd, epi64, epi64x)
#undef WCE_AVX2_WORDS

/* Piece by piece: a masked store costs 18 or more micro-operations on AMD.                         */
WCE_INLINE void f32_store_n_f32(float *p, v_f32 v, int n) {
  if (n >= 8) {
    _mm256_storeu_ps(p, v);
    return;
  }
  __m128 part = _mm256_castps256_ps128(v);
  if (n >= 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps(v, 1);
    p += 4, n -= 4;
  }
  if (n >= 2) {
    _mm_storel_pi((__m64 *)(void *)p, part);
    part = _mm_movehl_ps(part, part);
    p += 2, n -= 2;
  }
  if (n == 1) _mm_store_ss(p, part);
}
WCE_INLINE void f64_store_n_f64(double *p, v_f64 v, int n) {
  if (n >= 4) {
    _mm256_storeu_pd(p, v);
    return;
  }
  __m128d part = _mm256_castpd256_pd128(v);
  if (n >= 2) {
    _mm_storeu_pd(p, part);
    part = _mm256_extractf128_pd(v, 1);
    p += 2, n -= 2;
  }
  if (n == 1) _mm_store_sd(p, part);
}

/* 2^floor(t), made in the bits of the exponent: t is limited to where these bits are all 0, which is
 * 2^n = 0. floor(t) + bias becomes an integer in the low bits when a large number is added to it. */
#define WCE_AVX2_SCALE(acc, vec, sfx, slli, bias, mantissa_bits)                                \
  WCE_INLINE vec acc##_fraction(vec t) {                                                        \
    vec limited = _mm256_max_##sfx(_mm256_set1_##sfx(-bias), t);                                \
    return _mm256_sub_##sfx(limited, _mm256_floor_##sfx(limited));                              \
  }                                                                                             \
  WCE_INLINE vec acc##_scale(vec p, vec t) {                                                    \
    vec n = _mm256_floor_##sfx(_mm256_max_##sfx(_mm256_set1_##sfx(-bias), t));                  \
    vec biased = _mm256_add_##sfx(n, _mm256_set1_##sfx(0x1.8p##mantissa_bits + bias));          \
    return _mm256_mul_##sfx(                                                                    \
        p, _mm256_castsi256_##sfx(slli(_mm256_cast##sfx##_si256(biased), mantissa_bits)));      \
  }
WCE_AVX2_SCALE(f32, v_f32, ps, _mm256_slli_epi32, 127, 23)
WCE_AVX2_SCALE(f64, v_f64, pd, _mm256_slli_epi64, 1023, 52)
#undef WCE_AVX2_SCALE

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

/* The bit of y that says which vector moves to where blends look for it.                           */
WCE_INLINE v_f32 f32_choose(const v_f32 values[2], const lane_f32 *y) {
  __m256i lanes = _mm256_loadu_si256((const __m256i *)(const void *)y);
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(values[0], lanes),
                          _mm256_permutevar8x32_ps(values[1], lanes),
                          _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28)));
}
/* Halves of a lane go each for itself: 2*y and 2*y + 1.                                            */
WCE_INLINE v_f64 f64_choose(const v_f64 values[2], const lane_f64 *y) {
  __m256i lanes = _mm256_loadu_si256((const __m256i *)(const void *)y);
  __m256i both = _mm256_shuffle_epi32(_mm256_slli_epi64(lanes, 1), 0xa0);
  __m256i halves = _mm256_add_epi32(both, _mm256_set1_epi64x((int64_t)1 << 32));
  __m256 first = _mm256_permutevar8x32_ps(_mm256_castpd_ps(values[0]), halves);
  __m256 second = _mm256_permutevar8x32_ps(_mm256_castpd_ps(values[1]), halves);
  return _mm256_blendv_pd(_mm256_castps_pd(first), _mm256_castps_pd(second),
                          _mm256_castsi256_pd(_mm256_slli_epi64(lanes, 61)));
}

/* ---- lanes of two vectors ------------------------------------------------------------------------ */

WCE_INLINE void f32_halves(const float *a, const float *b, v_f32 two[2]) {
  for (int i = 0; i < 2; i++)
    two[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a + 4 * i)),
                                  _mm_loadu_ps(b + 4 * i), 1);
}
WCE_INLINE v_f32 f32_pick(v_f32 a, v_f32 b, const int d) {
  return d == 2 ? _mm256_blend_ps(a, b, 0xcc) : _mm256_blend_ps(a, b, 0xaa);
}
WCE_INLINE v_f32 f32_cross(v_f32 a, v_f32 b, const int d) {
  return d == 2 ? _mm256_shuffle_ps(a, b, 0x4e) : _mm256_permute_ps(f32_pick(b, a, d), 0xb1);
}
WCE_INLINE void f64_halves(const double *a, const double *b, v_f64 two[2]) {
  for (int i = 0; i < 2; i++)
    two[i] = _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(a + 2 * i)),
                                  _mm_loadu_pd(b + 2 * i), 1);
}
WCE_INLINE v_f64 f64_pick(v_f64 a, v_f64 b, const int d) {
  return (void)d, _mm256_blend_pd(a, b, 0xa);
}
WCE_INLINE v_f64 f64_cross(v_f64 a, v_f64 b, const int d) {
  return (void)d, _mm256_shuffle_pd(a, b, 0x5);
}

/* ---- pairs -------------------------------------------------------------------------------------- */

/* 0xd8: the two quarters in the middle change places. */
WCE_INLINE __m256 wce_swap_middle(__m256 v) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}
WCE_INLINE void f32_split(v_f32 two[2]) {
  __m256 first = _mm256_shuffle_ps(two[0], two[1], 0x88);
  two[1] = wce_swap_middle(_mm256_shuffle_ps(two[0], two[1], 0xdd));
  two[0] = wce_swap_middle(first);
}
WCE_INLINE void f32_zip(v_f32 two[2]) {
  __m256 low = _mm256_unpacklo_ps(two[0], two[1]), high = _mm256_unpackhi_ps(two[0], two[1]);
  two[0] = _mm256_permute2f128_ps(low, high, 0x20);
  two[1] = _mm256_permute2f128_ps(low, high, 0x31);
}
WCE_INLINE void f64_split(v_f64 two[2]) {
  __m256d first = _mm256_unpacklo_pd(two[0], two[1]);
  two[1] = _mm256_permute4x64_pd(_mm256_unpackhi_pd(two[0], two[1]), 0xd8);
  two[0] = _mm256_permute4x64_pd(first, 0xd8);
}
WCE_INLINE void f64_zip(v_f64 two[2]) {
  __m256d low = _mm256_unpacklo_pd(two[0], two[1]), high = _mm256_unpackhi_pd(two[0], two[1]);
  two[0] = _mm256_permute2f128_pd(low, high, 0x20);
  two[1] = _mm256_permute2f128_pd(low, high, 0x31);
}

/* ---- quads: four classes of LANES rows --------------------------------------------------------- */

/* 4 by 4 in each half: r[i] element j <-> r[j] element i.                                          */
WCE_INLINE void wce_transpose_f32(__m256 r[4]) {
  __m256 t0 = _mm256_unpacklo_ps(r[0], r[1]), t1 = _mm256_unpackhi_ps(r[0], r[1]);
  __m256 t2 = _mm256_unpacklo_ps(r[2], r[3]), t3 = _mm256_unpackhi_ps(r[2], r[3]);
  r[0] = _mm256_shuffle_ps(t0, t2, 0x44);
  r[1] = _mm256_shuffle_ps(t0, t2, 0xee);
  r[2] = _mm256_shuffle_ps(t1, t3, 0x44);
  r[3] = _mm256_shuffle_ps(t1, t3, 0xee);
}

WCE_INLINE void f32_load_quad_f32(const float *p, int64_t step, v_f32 quad[4]) {
  for (int i = 0; i < 4; i++) /* row i below, row i+4 above                                        */
    quad[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + i * step)),
                                   _mm_loadu_ps(p + (i + 4) * step), 1);
  wce_transpose_f32(quad);
}

WCE_INLINE void f32_store_quad_f32(float *p, int64_t step, const v_f32 quad[4]) {
  v_f32 rows[4] = {quad[0], quad[1], quad[2], quad[3]};
  wce_transpose_f32(rows);
  for (int i = 0; i < 4; i++) _mm_storeu_ps(p + i * step, _mm256_castps256_ps128(rows[i]));
  for (int i = 0; i < 4; i++) _mm_storeu_ps(p + (i + 4) * step, _mm256_extractf128_ps(rows[i], 1));
}

WCE_INLINE void wce_transpose_f64(__m256d r[4]) {
  __m256d t0 = _mm256_unpacklo_pd(r[0], r[1]), t1 = _mm256_unpackhi_pd(r[0], r[1]);
  __m256d t2 = _mm256_unpacklo_pd(r[2], r[3]), t3 = _mm256_unpackhi_pd(r[2], r[3]);
  r[0] = _mm256_permute2f128_pd(t0, t2, 0x20);
  r[1] = _mm256_permute2f128_pd(t1, t3, 0x20);
  r[2] = _mm256_permute2f128_pd(t0, t2, 0x31);
  r[3] = _mm256_permute2f128_pd(t1, t3, 0x31);
}

WCE_INLINE void f64_load_quad_f64(const double *p, int64_t step, v_f64 quad[4]) {
  for (int i = 0; i < 4; i++) quad[i] = _mm256_loadu_pd(p + i * step);
  wce_transpose_f64(quad);
}

WCE_INLINE void f64_store_quad_f64(double *p, int64_t step, const v_f64 quad[4]) {
  v_f64 rows[4] = {quad[0], quad[1], quad[2], quad[3]};
  wce_transpose_f64(rows);
  for (int i = 0; i < 4; i++) _mm256_storeu_pd(p + i * step, rows[i]);
}

/* ---- 16-bit types ----------------------------------------------------------------------------- */

WCE_INLINE __m256 wce_widen_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* bf16 of each float, in its high half: rounded to nearest even in integers; all bits set for nan. */
WCE_INLINE __m256i wce_round_bf16(__m256 v) {
  __m256i bits = _mm256_castps_si256(v), nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
  return _mm256_or_si256(rounded, nan);
}

WCE_INLINE __m256i wce_narrow_pair_bf16(__m256 a, __m256 b) {
  __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(wce_round_bf16(a), 16),
                                       _mm256_srli_epi32(wce_round_bf16(b), 16));
  return _mm256_permute4x64_epi64(packed, 0xd8); /* packus works within halves                     */
}

WCE_INLINE __m128i wce_narrow_bf16(__m256 v) {
  return _mm256_castsi256_si128(wce_narrow_pair_bf16(v, v));
}

WCE_INLINE __m256 wce_widen_f16(__m128i h) { return _mm256_cvtph_ps(h); }
WCE_INLINE __m128i wce_narrow_f16(__m256 v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
WCE_INLINE __m256i wce_narrow_pair_f16(__m256 a, __m256 b) {
  return _mm256_set_m128i(wce_narrow_f16(b), wce_narrow_f16(a));
}

/* n < 8 elements, the rest 0. From four on: two overlapping loads of four.                         */
WCE_INLINE __m128i wce_load_part(const uint16_t *p, int n) {
  uint64_t low = 0, high = 0;
  if (n >= 4) {
    memcpy(&low, p, 8);
    memcpy(&high, p + n - 4, 8);
    high = high >> 8 * (8 - n) >> 8 * (8 - n); /* in two steps: 64 is too far for one                */
  } else {
    uint32_t two = 0;
    if (n & 2) memcpy(&two, p, 4);
    low = two;
    if (n & 1) low |= (uint64_t)p[n - 1] << 16 * (n - 1);
  }
  return _mm_set_epi64x((int64_t)high, (int64_t)low);
}

/* The first n < 8 elements. */
WCE_INLINE void wce_store_part(uint16_t *p, __m128i v, int n) {
  uint64_t low = (uint64_t)_mm_cvtsi128_si64(v), high = (uint64_t)_mm_extract_epi64(v, 1);
  if (n >= 4) {
    uint64_t last = low >> 8 * (n - 4) >> 8 * (n - 4) | high << 8 * (8 - n) << 8 * (8 - n);
    memcpy(p, &low, 8);
    memcpy(p + n - 4, &last, 8);
  } else {
    if (n & 2) memcpy(p, &low, 4);
    if (n & 1) p[n - 1] = (uint16_t)(low >> 16 * (n - 1));
  }
}

#define WCE_AVX2_HALF(elem)                                                                     \
  WCE_INLINE v_f32 f32_load_##elem(const uint16_t *p) {                                         \
    return wce_widen_##elem(_mm_loadu_si128((const __m128i *)p));                               \
  }                                                                                             \
  WCE_INLINE v_f32 f32_load_n_##elem(const uint16_t *p, int n, v_f32 fill) {                    \
    if (n >= 8) return f32_load_##elem(p);                                                      \
    return _mm256_blendv_ps(fill, wce_widen_##elem(wce_load_part(p, n)),                        \
                            _mm256_castsi256_ps(wce_first_lanes_f32(n)));                       \
  }                                                                                             \
  WCE_INLINE void f32_store_##elem(uint16_t *p, v_f32 v) {                                      \
    _mm_storeu_si128((__m128i *)p, wce_narrow_##elem(v));                                       \
  }                                                                                             \
  WCE_INLINE void f32_store_n_##elem(uint16_t *p, v_f32 v, int n) {                             \
    if (n >= 8) f32_store_##elem(p, v);                                                         \
    else wce_store_part(p, wce_narrow_##elem(v), n);                                            \
  }                                                                                             \
  WCE_INLINE void f32_store_pair_##elem(uint16_t *p, v_f32 a, v_f32 b) {                        \
    _mm256_storeu_si256((__m256i *)p, wce_narrow_pair_##elem(a, b));                            \
  }                                                                                             \
  WCE_INLINE void f32_load_quad_##elem(const uint16_t *p, int64_t step, v_f32 quad[4]) {        \
    for (int i = 0; i < 4; i++) { /* row i below, row i+4 above                              */ \
      __m128i low = _mm_loadl_epi64((const __m128i *)(p + i * step));                           \
      __m128i high = _mm_loadl_epi64((const __m128i *)(p + (i + 4) * step));                    \
      quad[i] = wce_widen_##elem(_mm_unpacklo_epi64(low, high));                                \
    }                                                                                           \
    wce_transpose_f32(quad);                                                                    \
  }                                                                                             \
  WCE_INLINE void f32_store_quad_##elem(uint16_t *p, int64_t step, const v_f32 quad[4]) {       \
    v_f32 rows[4] = {quad[0], quad[1], quad[2], quad[3]};                                       \
    __m128i half[4];                                                                            \
    wce_transpose_f32(rows);                                                                    \
    for (int i = 0; i < 4; i++) half[i] = wce_narrow_##elem(rows[i]);                           \
    for (int i = 0; i < 4; i++) _mm_storel_epi64((__m128i *)(p + i * step), half[i]);           \
    for (int i = 0; i < 4; i++)                                                                 \
      _mm_storel_epi64((__m128i *)(p + (i + 4) * step), _mm_unpackhi_epi64(half[i], half[i]));  \
  }
WCE_AVX2_HALF(bf16)
WCE_AVX2_HALF(f16)
#undef WCE_AVX2_HALF

/* Even elements, then odd ones: a bf16 is the high half of its float.                              */
#define WCE_HAVE_TWO_bf16
WCE_INLINE void f32_load_two_bf16(const uint16_t *p, v_f32 two[2]) {
  __m256i both = _mm256_loadu_si256((const __m256i *)p), high = _mm256_set1_epi32((int)0xffff0000);
  two[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  two[1] = _mm256_castsi256_ps(_mm256_and_si256(both, high));
}
WCE_INLINE void f32_order_two_bf16(v_f32 two[2]) { f32_split(two); }
WCE_INLINE void f32_store_two_bf16(uint16_t *p, const v_f32 two[2]) {
  __m256i even = _mm256_srli_epi32(wce_round_bf16(two[0]), 16), odd = wce_round_bf16(two[1]);
  _mm256_storeu_si256((__m256i *)p, _mm256_blend_epi16(even, odd, 0xaa));
}

/* ---- 64 bytes past the caches ----------------------------------------------------------------- */

WCE_INLINE void wce_stream_line(void *to, const void *from) {
  const __m256i *line = (const __m256i *)from;
  _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256(line));
  _mm256_stream_si256((__m256i *)to + 1, _mm256_loadu_si256(line + 1));
}
WCE_INLINE void wce_stream_fence(void) { _mm_sfence(); }

#endif
