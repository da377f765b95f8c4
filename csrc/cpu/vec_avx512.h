/* vec_avx512.h -- the vocabulary of vec_scalar.h with 16 (f32) or 8 (f64) lanes: AVX-512 F, BW, DQ, VL. */
#ifndef WCE_VEC_H
#define WCE_VEC_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "../loss_math.h"

#define WCE_INLINE static inline __attribute__((always_inline))

typedef __m512 v_f32;
typedef __m512d v_f64;
typedef int32_t lane_f32;
typedef int64_t lane_f64;
enum { LANES_f32 = 16, LANES_f64 = 8, EXP_AHEAD = 1, EXP_IS_QUICK = 1 };

/* The first n lanes; all of them when n is larger. */
WCE_INLINE uint32_t wce_first_lanes(int n, int lanes) {
  return n >= lanes ? (1u << lanes) - 1u : (1u << n) - 1u;
}

#define WCE_AVX512_WORDS(acc, vec, type, sfx, int_sfx)                                              \
  WCE_INLINE vec acc##_set1(type a) { return _mm512_set1_##sfx(a); }                            \
  WCE_INLINE vec acc##_add(vec a, vec b) { return _mm512_add_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_sub(vec a, vec b) { return _mm512_sub_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_mul(vec a, vec b) { return _mm512_mul_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_fma(vec a, vec b, vec c) { return _mm512_fmadd_##sfx(a, b, c); }         \
  WCE_INLINE vec acc##_max(vec a, vec b) { return _mm512_max_##sfx(a, b); }                     \
  WCE_INLINE vec acc##_where(const lane_##acc *y, lane_##acc c, vec a, vec b) {                 \
    __m512i lanes = _mm512_loadu_si512(y);                                                      \
    return _mm512_mask_mov_##sfx(                                                               \
        b, _mm512_cmpeq_##int_sfx##_mask(lanes, _mm512_set1_##int_sfx(c)), a);                  \
  }                                                                                             \
  WCE_INLINE vec acc##_choose(const vec values[2], const lane_##acc *y) {                       \
    return _mm512_permutex2var_##sfx(values[0], _mm512_loadu_si512(y), values[1]);              \
  }                                                                                             \
  WCE_INLINE vec acc##_mulz(vec a, vec b) {                                                     \
    return _mm512_maskz_mul_##sfx(                                                              \
        _mm512_cmp_##sfx##_mask(a, _mm512_setzero_##sfx(), _CMP_NEQ_UQ), a, b);                 \
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
  WCE_INLINE void acc##_store_pair_##acc(type *p, vec a, vec b) {                               \
    _mm512_storeu_##sfx(p, a);                                                                  \
    _mm512_storeu_##sfx(p + LANES_##acc, b);                                                    \
  }

typedef __mmask16 f32_mask;
typedef __mmask8 f64_mask;
WCE_AVX512_WORDS(f32, v_f32, float, ps, epi32)
WCE_AVX512_WORDS(f64, v_f64, double, pd, epi64)
#undef WCE_AVX512_WORDS

WCE_INLINE float f32_first(v_f32 v) { return _mm512_cvtss_f32(v); }
WCE_INLINE double f64_first(v_f64 v) { return _mm512_cvtsd_f64(v); }

/* ---- lanes of two vectors ------------------------------------------------------------------------ */

WCE_INLINE void f32_halves(const float *a, const float *b, v_f32 two[2]) {
  for (int i = 0; i < 2; i++)
    two[i] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a + 8 * i)),
                                _mm256_loadu_ps(b + 8 * i), 1);
}
WCE_INLINE v_f32 f32_pick(v_f32 a, v_f32 b, const int d) {
  return _mm512_mask_blend_ps(d == 4 ? 0xf0f0 : d == 2 ? 0xcccc : 0xaaaa, a, b);
}
WCE_INLINE v_f32 f32_cross(v_f32 a, v_f32 b, const int d) {
  if (d == 2) return _mm512_shuffle_ps(a, b, 0x4e);
  v_f32 others = f32_pick(b, a, d);
  return d == 4 ? _mm512_shuffle_f32x4(others, others, 0xb1) : _mm512_permute_ps(others, 0xb1);
}
WCE_INLINE void f64_halves(const double *a, const double *b, v_f64 two[2]) {
  for (int i = 0; i < 2; i++)
    two[i] = _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(a + 4 * i)),
                                _mm256_loadu_pd(b + 4 * i), 1);
}
WCE_INLINE v_f64 f64_pick(v_f64 a, v_f64 b, const int d) {
  return _mm512_mask_blend_pd(d == 2 ? 0xcc : 0xaa, a, b);
}
WCE_INLINE v_f64 f64_cross(v_f64 a, v_f64 b, const int d) {
  if (d == 1) return _mm512_shuffle_pd(a, b, 0x55);
  v_f64 others = f64_pick(b, a, d);
  return _mm512_shuffle_f64x2(others, others, 0xb1);
}

/* ---- pairs -------------------------------------------------------------------------------------- */

WCE_INLINE void f32_split(v_f32 two[2]) {
  __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  __m512 first = _mm512_permutex2var_ps(two[0], even, two[1]);
  two[1] = _mm512_permutex2var_ps(two[0], _mm512_add_epi32(even, _mm512_set1_epi32(1)), two[1]);
  two[0] = first;
}
WCE_INLINE void f32_zip(v_f32 two[2]) {
  __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  __m512 first = _mm512_permutex2var_ps(two[0], low, two[1]);
  two[1] = _mm512_permutex2var_ps(two[0], _mm512_add_epi32(low, _mm512_set1_epi32(8)), two[1]);
  two[0] = first;
}
WCE_INLINE void f64_split(v_f64 two[2]) {
  __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  __m512d first = _mm512_permutex2var_pd(two[0], even, two[1]);
  two[1] = _mm512_permutex2var_pd(two[0], _mm512_add_epi64(even, _mm512_set1_epi64(1)), two[1]);
  two[0] = first;
}
WCE_INLINE void f64_zip(v_f64 two[2]) {
  __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  __m512d first = _mm512_permutex2var_pd(two[0], low, two[1]);
  two[1] = _mm512_permutex2var_pd(two[0], _mm512_add_epi64(low, _mm512_set1_epi64(4)), two[1]);
  two[0] = first;
}

/* ---- quads: four classes of LANES rows --------------------------------------------------------- */

/* 4 by 4 in each quarter: r[i] element j <-> r[j] element i.                                       */
WCE_INLINE void wce_transpose_f32(__m512 r[4]) {
  __m512 t0 = _mm512_unpacklo_ps(r[0], r[1]), t1 = _mm512_unpackhi_ps(r[0], r[1]);
  __m512 t2 = _mm512_unpacklo_ps(r[2], r[3]), t3 = _mm512_unpackhi_ps(r[2], r[3]);
  r[0] = _mm512_shuffle_ps(t0, t2, 0x44);
  r[1] = _mm512_shuffle_ps(t0, t2, 0xee);
  r[2] = _mm512_shuffle_ps(t1, t3, 0x44);
  r[3] = _mm512_shuffle_ps(t1, t3, 0xee);
}

WCE_INLINE void f32_load_quad_f32(const float *p, int64_t step, v_f32 quad[4]) {
  for (int i = 0; i < 4; i++) { /* rows i, i+4, i+8, i+12                                          */
    const float *row = p + i * step;
    __m512 r = _mm512_castps128_ps512(_mm_loadu_ps(row));
    r = _mm512_insertf32x4(r, _mm_loadu_ps(row + 4 * step), 1);
    r = _mm512_insertf32x4(r, _mm_loadu_ps(row + 8 * step), 2);
    quad[i] = _mm512_insertf32x4(r, _mm_loadu_ps(row + 12 * step), 3);
  }
  wce_transpose_f32(quad);
}

WCE_INLINE void f32_store_quad_f32(float *p, int64_t step, const v_f32 quad[4]) {
  v_f32 rows[4] = {quad[0], quad[1], quad[2], quad[3]};
  wce_transpose_f32(rows);
#define WCE_STORE_QUARTER(k)                                                                    \
  for (int i = 0; i < 4; i++)                                                                   \
    _mm_storeu_ps(p + (4 * k + i) * step, _mm512_extractf32x4_ps(rows[i], k));
  WCE_STORE_QUARTER(0)
  WCE_STORE_QUARTER(1)
  WCE_STORE_QUARTER(2)
  WCE_STORE_QUARTER(3)
#undef WCE_STORE_QUARTER
}

/* r[i]: four classes of row {0, 1, 4, 5}[i] below, of the row two further on above; becomes four
 * classes of 8 rows in order.                                                                     */
WCE_INLINE void wce_classes_f64(__m512d r[4]) {
  __m512d t0 = _mm512_unpacklo_pd(r[0], r[1]), t1 = _mm512_unpackhi_pd(r[0], r[1]);
  __m512d t2 = _mm512_unpacklo_pd(r[2], r[3]), t3 = _mm512_unpackhi_pd(r[2], r[3]);
  r[0] = _mm512_shuffle_f64x2(t0, t2, 0x88);
  r[1] = _mm512_shuffle_f64x2(t1, t3, 0x88);
  r[2] = _mm512_shuffle_f64x2(t0, t2, 0xdd);
  r[3] = _mm512_shuffle_f64x2(t1, t3, 0xdd);
}

WCE_INLINE void f64_load_quad_f64(const double *p, int64_t step, v_f64 quad[4]) {
  for (int i = 0; i < 4; i++) {
    const double *row = p + (i < 2 ? i : i + 2) * step;
    quad[i] = _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(row)),
                                 _mm256_loadu_pd(row + 2 * step), 1);
  }
  wce_classes_f64(quad);
}

WCE_INLINE void f64_store_quad_f64(double *p, int64_t step, const v_f64 quad[4]) {
  __m512d t0 = _mm512_unpacklo_pd(quad[0], quad[1]), t1 = _mm512_unpackhi_pd(quad[0], quad[1]);
  __m512d t2 = _mm512_unpacklo_pd(quad[2], quad[3]), t3 = _mm512_unpackhi_pd(quad[2], quad[3]);
#define WCE_STORE_ROWS(k) /* rows 2*k and 2*k + 1: their classes 0, 1 stand in t0, t1; 2, 3 in t2, t3 */ \
  _mm_storeu_pd(p + 2 * k * step, _mm512_extractf64x2_pd(t0, k));                               \
  _mm_storeu_pd(p + 2 * k * step + 2, _mm512_extractf64x2_pd(t2, k));                           \
  _mm_storeu_pd(p + (2 * k + 1) * step, _mm512_extractf64x2_pd(t1, k));                         \
  _mm_storeu_pd(p + (2 * k + 1) * step + 2, _mm512_extractf64x2_pd(t3, k));
  WCE_STORE_ROWS(0)
  WCE_STORE_ROWS(1)
  WCE_STORE_ROWS(2)
  WCE_STORE_ROWS(3)
#undef WCE_STORE_ROWS
}

/* ---- 16-bit types ----------------------------------------------------------------------------- */

WCE_INLINE __m512 wce_widen_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* bf16 of each float, in its high half: rounded to nearest even in integers, as vcvtneps2bf16 is not
 * everywhere and takes subnormals for 0. Numbers only.                                            */
WCE_INLINE __m512i wce_round_bf16(__m512 v) {
  __m512i bits = _mm512_castps_si512(v);
  __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
}

/* All bits set where v is nan. */
WCE_INLINE __m512i wce_keep_nan(__m512i rounded, __m512 v) {
  __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(-1));
}

WCE_INLINE __m256i wce_narrow_bf16(__m512 v) {
  __m512i rounded = wce_keep_nan(wce_round_bf16(v), v);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

/* As wce_round_bf16, nan included: one look for two vectors.                                       */
WCE_INLINE void wce_round_two_bf16(__m512 a, __m512 b, __m512i rounded[2]) {
  rounded[0] = wce_round_bf16(a), rounded[1] = wce_round_bf16(b);
  if (__builtin_expect(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0, 0))
    rounded[0] = wce_keep_nan(rounded[0], a), rounded[1] = wce_keep_nan(rounded[1], b);
}

WCE_INLINE __m512 wce_widen_f16(__m256i h) { return _mm512_cvtph_ps(h); }
WCE_INLINE __m256i wce_narrow_f16(__m512 v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* Four elements each of two rows. */
WCE_INLINE __m128i wce_two_rows(const uint16_t *low, const uint16_t *high) {
  return _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)low),
                            _mm_loadl_epi64((const __m128i *)high));
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
  WCE_INLINE void f32_load_quad_##elem(const uint16_t *p, int64_t step, v_f32 quad[4]) {        \
    for (int i = 0; i < 4; i++) { /* rows i, i+4, i+8, i+12                                  */ \
      const uint16_t *row = p + i * step;                                                       \
      quad[i] = wce_widen_##elem(_mm256_set_m128i(                                              \
          wce_two_rows(row + 8 * step, row + 12 * step), wce_two_rows(row, row + 4 * step)));   \
    }                                                                                           \
    wce_transpose_f32(quad);                                                                    \
  }                                                                                             \
  WCE_INLINE void f32_store_quad_##elem(uint16_t *p, int64_t step, const v_f32 quad[4]) {       \
    v_f32 rows[4] = {quad[0], quad[1], quad[2], quad[3]};                                       \
    uint64_t four[4][4]; /* [i][k]: row i + 4*k                                              */ \
    wce_transpose_f32(rows);                                                                    \
    for (int i = 0; i < 4; i++)                                                                 \
      _mm256_storeu_si256((__m256i *)four[i], wce_narrow_##elem(rows[i]));                      \
    for (int j = 0; j < 16; j++) memcpy(p + j * step, &four[j % 4][j / 4], sizeof(uint64_t));   \
  }
WCE_AVX512_HALF(bf16)
WCE_AVX512_HALF(f16)
#undef WCE_AVX512_HALF

WCE_INLINE void f32_store_pair_bf16(uint16_t *p, v_f32 a, v_f32 b) {
  __m512i rounded[2], odd = _mm512_set_epi16(
    63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17, 15,
    13, 11, 9, 7, 5, 3, 1);
  wce_round_two_bf16(a, b, rounded);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(rounded[0], odd, rounded[1]));
}
WCE_INLINE void f32_store_pair_f16(uint16_t *p, v_f32 a, v_f32 b) {
  f32_store_f16(p, a);
  f32_store_f16(p + 16, b);
}

/* Even elements, then odd ones: a bf16 is the high half of its float.                              */
#define WCE_HAVE_TWO_bf16
WCE_INLINE void f32_load_two_bf16(const uint16_t *p, v_f32 two[2]) {
  __m512i both = _mm512_loadu_si512(p), high = _mm512_set1_epi32((int)0xffff0000);
  two[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  two[1] = _mm512_castsi512_ps(_mm512_and_si512(both, high));
}
WCE_INLINE void f32_order_two_bf16(v_f32 two[2]) { f32_split(two); }
WCE_INLINE void f32_store_two_bf16(uint16_t *p, const v_f32 two[2]) {
  __m512i rounded[2], high = _mm512_set1_epi32((int)0xffff0000);
  wce_round_two_bf16(two[0], two[1], rounded);
  rounded[0] = _mm512_srli_epi32(rounded[0], 16); /* 0xd8: the second where `high`, else the first  */
  _mm512_storeu_si512(p, _mm512_ternarylogic_epi32(rounded[0], rounded[1], high, 0xd8));
}

/* ---- 64 bytes past the caches ----------------------------------------------------------------- */

WCE_INLINE void wce_stream_line(void *to, const void *from) {
  _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
}
WCE_INLINE void wce_stream_fence(void) { _mm_sfence(); }

#endif
