/* vec_scalar.h -- the vector vocabulary with one lane: the reference that the others must equal.
 *
 * For each acc (f32, f64): type v_<acc>, number of lanes LANES_<acc>, an integer as wide as a lane
 * lane_<acc>, and the words
 *
 *   set1 add sub mul fma        fma(a, b, c) = a*b + c
 *   max(a, b)                   b where either is nan: max(x, acc) leaves nan out of acc
 *   where(y, c, a, b)           a where the lane's integer of y is c, else b; y: array of lane_<acc>
 *   choose(values, y)           element y of the two vectors `values`, for each lane's y: 0 .. 2*LANES-1
 *   mulz(a, b)                  0 where a is 0, else a*b (also where b is infinite)
 *   fraction(t)                 t - floor(t); 0 for -inf
 *   scale(p, t)                 p * 2^floor(t); 0 for t = -inf or p*2^floor(t) far below the range
 *   first hadd hmax             lane 0, sum of lanes (fixed order), maximum of lanes
 *   halves(a, b, two)           from memory: the lower halves of the vectors at a and b, then the upper
 *   pick(a, b, d)               a in lanes whose number has no d in it, else b; d = 1, 2 .. LANES/4
 *   cross(a, b, d)              the lanes that pick leaves out, each moved by d to where it took one
 *   split(two)  zip(two)        LANES pairs, one behind the other, to their first and their second
 *                               members, and back
 *   load_<elem>(p)  load_n_<elem>(p, n, fill)  store_<elem>(p, v)  store_n_<elem>(p, v, n)
 *   store_pair_<elem>(p, a, b)           store a, then b behind it
 *   load_two_<elem>(p, two)  store_two_<elem>(p, two)   2*LANES elements, each in some lane: the order is
 *                                        the type's own, the same for both (in widen.h unless quicker)
 *   order_two_<elem>(two)               vectors in order, to the order of load_two
 *   load_quad_<elem>(p, step, quad)      quad[c] lane j = p[j*step + c], c = 0..3: four classes of LANES rows
 *   store_quad_<elem>(p, step, quad)     the reverse, rows in ascending order
 *
 * EXP_AHEAD: 1 where there are 32 registers, see vec_exp.h.
 * EXP_IS_QUICK: 1 where an exp of float32 may take no longer than to keep it: order_of in rows_both.inc.
 *
 * and for all types: stream_line(to, from), 64 bytes past the caches, to aligned; stream_fence().
 */
#ifndef WCE_VEC_H
#define WCE_VEC_H

#include <math.h>
#include <stdint.h>

#include "../loss_math.h"

#define WCE_INLINE static inline __attribute__((always_inline))

typedef float v_f32;
typedef double v_f64;
typedef int32_t lane_f32;
typedef int64_t lane_f64;
enum { LANES_f32 = 1, LANES_f64 = 1, EXP_AHEAD = 0, EXP_IS_QUICK = 0 };

#define WCE_SCALAR_WORDS(acc, type, floor_fn, ldexp_fn)                                        \
  WCE_INLINE type acc##_set1(type a) { return a; }                                             \
  WCE_INLINE type acc##_add(type a, type b) { return a + b; }                                  \
  WCE_INLINE type acc##_sub(type a, type b) { return a - b; }                                  \
  WCE_INLINE type acc##_mul(type a, type b) { return a * b; }                                  \
  WCE_INLINE type acc##_fma(type a, type b, type c) { return a * b + c; }                      \
  WCE_INLINE type acc##_max(type a, type b) { return a > b ? a : b; }                          \
  WCE_INLINE type acc##_where(const lane_##acc *y, lane_##acc c, type a, type b) {             \
    return *y == c ? a : b;                                                                    \
  }                                                                                            \
  WCE_INLINE type acc##_choose(const type values[2], const lane_##acc *y) { return values[*y]; } \
  WCE_INLINE type acc##_mulz(type a, type b) { return a == 0 ? 0 : a * b; }                    \
  WCE_INLINE type acc##_fraction(type t) { return t == -INFINITY ? 0 : t - floor_fn(t); }      \
  WCE_INLINE type acc##_scale(type p, type t) {                                                \
    return t < -2000 ? 0 : t != t ? t : ldexp_fn(p, (int)floor_fn(t > 2000 ? 2000 : t));       \
  }                                                                                            \
  WCE_INLINE void acc##_halves(const type *a, const type *b, type two[2]) {                    \
    two[0] = *a, two[1] = *b;                                                                  \
  }                                                                                            \
  WCE_INLINE type acc##_pick(type a, type b, int d) { return (void)b, (void)d, a; }            \
  WCE_INLINE type acc##_cross(type a, type b, int d) { return (void)a, (void)d, b; }           \
  WCE_INLINE void acc##_split(type two[2]) { (void)two; }                                      \
  WCE_INLINE void acc##_zip(type two[2]) { (void)two; }                                        \
  WCE_INLINE type acc##_first(type v) { return v; }                                            \
  WCE_INLINE type acc##_hadd(type v) { return v; }                                             \
  WCE_INLINE type acc##_hmax(type v) { return v; }

WCE_SCALAR_WORDS(f32, float, floorf, ldexpf)
WCE_SCALAR_WORDS(f64, double, floor, ldexp)

#define WCE_SCALAR_MEMORY(acc, type, elem, memory, to_acc, from_acc)                           \
  WCE_INLINE type acc##_load_##elem(const memory *p) { return to_acc(*p); }                    \
  WCE_INLINE type acc##_load_n_##elem(const memory *p, int n, type fill) {                     \
    return n > 0 ? to_acc(*p) : fill;                                                          \
  }                                                                                            \
  WCE_INLINE void acc##_store_##elem(memory *p, type v) { *p = from_acc(v); }                  \
  WCE_INLINE void acc##_store_n_##elem(memory *p, type v, int n) {                             \
    if (n > 0) *p = from_acc(v);                                                               \
  }                                                                                            \
  WCE_INLINE void acc##_store_pair_##elem(memory *p, type a, type b) {                         \
    p[0] = from_acc(a), p[1] = from_acc(b);                                                    \
  }                                                                                            \
  WCE_INLINE void acc##_load_quad_##elem(const memory *p, int64_t step, type quad[4]) {        \
    (void)step;                                                                                \
    for (int c = 0; c < 4; c++) quad[c] = to_acc(p[c]);                                        \
  }                                                                                            \
  WCE_INLINE void acc##_store_quad_##elem(memory *p, int64_t step, const type quad[4]) {       \
    (void)step;                                                                                \
    for (int c = 0; c < 4; c++) p[c] = from_acc(quad[c]);                                      \
  }

WCE_SCALAR_MEMORY(f32, float, f32, float, , )
WCE_SCALAR_MEMORY(f64, double, f64, double, , )
WCE_SCALAR_MEMORY(f32, float, bf16, uint16_t, wce_bf16_to_float, wce_float_to_bf16)
WCE_SCALAR_MEMORY(f32, float, f16, uint16_t, wce_f16_to_float, wce_float_to_f16)

WCE_INLINE void wce_stream_line(void *to, const void *from) { memcpy(to, from, 64); }
WCE_INLINE void wce_stream_fence(void) {}

#endif
