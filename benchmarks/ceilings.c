/* What the machine can do at best: read memory, copy memory, evaluate exp. Built by ceilings.py.
 *
 * Each function runs on `threads` OpenMP threads and is timed by the caller. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef uint64_t word8 __attribute__((vector_size(64), aligned(1), may_alias));

static void share(size_t n, int threads, int thread, size_t *begin, size_t *end) {
  *begin = n * (size_t)thread / (size_t)threads;
  *end = n * (size_t)(thread + 1) / (size_t)threads;
}

/* n cache lines; the result depends on all of them, so that nothing can be left out */
static uint64_t read_lines(const char *p, size_t n) {
  word8 a = {0}, b = {0}, c = {0}, d = {0};
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    word8 v[4];
    memcpy(v, p + 64 * i, sizeof v);
    a ^= v[0], b ^= v[1], c ^= v[2], d ^= v[3];
  }
  for (; i < n; i++) {
    word8 v;
    memcpy(&v, p + 64 * i, sizeof v);
    a ^= v;
  }
  a ^= b ^ c ^ d;
  return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
}

uint64_t ceiling_read(const char *p, size_t bytes, int threads) {
  uint64_t result = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(^ : result)
  for (int t = 0; t < threads; t++) {
    size_t begin, end;
    share(bytes / 64, threads, t, &begin, &end);
    result ^= read_lines(p + 64 * begin, end - begin);
  }
  return result;
}

/* dst starts at a multiple of 64. Streaming stores do not read the line that they overwrite. */
static void copy_streaming(char *dst, const char *src, size_t n) {
#if defined(__AVX__)
  for (size_t i = 0; i < n; i++) {
    const __m256i *from = (const __m256i *)(src + 64 * i);
    __m256i low = _mm256_loadu_si256(from), high = _mm256_loadu_si256(from + 1);
    _mm256_stream_si256((__m256i *)(dst + 64 * i), low);
    _mm256_stream_si256((__m256i *)(dst + 64 * i) + 1, high);
  }
  _mm_sfence();
#else
  memcpy(dst, src, 64 * n);
#endif
}

static void copy_plain(char *dst, const char *src, size_t n) {
  for (size_t i = 0; i < n; i++) {
    word8 v;
    memcpy(&v, src + 64 * i, sizeof v);
    memcpy(dst + 64 * i, &v, sizeof v);
  }
}

void ceiling_copy(char *dst, const char *src, size_t bytes, int threads, int streaming) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; t++) {
    size_t begin, end;
    share(bytes / 64, threads, t, &begin, &end);
    (streaming ? copy_streaming : copy_plain)(dst + 64 * begin, src + 64 * begin, end - begin);
  }
}

/* sum of 2^x over 4096 floats in L1, x in [-64, 0]: one exp as the loss needs it (a fused
 * multiply-add brings the argument to base 2, a polynomial of degree 5, the exponent put in). */
enum { BLOCK = 4096 };

#if defined(__AVX512F__)
static float exp_block(const float *x) {
  __m512 sum[4] = {0};
  const __m512 log2e = _mm512_set1_ps(1.44269504f), shift = _mm512_set1_ps(-1.5f);
  for (int i = 0; i < BLOCK; i += 64)
    for (int k = 0; k < 4; k++) {
      __m512 t = _mm512_fmadd_ps(_mm512_loadu_ps(x + i + 16 * k), log2e, shift);
      __m512 n = _mm512_roundscale_ps(t, 0), f = _mm512_sub_ps(t, n);
      __m512 p = _mm512_set1_ps(1.8775767e-3f);
      p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.9893397e-3f));
      p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5826318e-2f));
      p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4015361e-1f));
      p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9315308e-1f));
      p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.9999994e-1f));
      sum[k] = _mm512_add_ps(sum[k], _mm512_scalef_ps(p, n));
    }
  return _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}
#elif defined(__AVX2__) && defined(__FMA__)
static float exp_block(const float *x) {
  __m256 sum[4] = {{0}};
  const __m256 log2e = _mm256_set1_ps(1.44269504f), shift = _mm256_set1_ps(-1.5f);
  for (int i = 0; i < BLOCK; i += 32)
    for (int k = 0; k < 4; k++) {
      __m256 t = _mm256_fmadd_ps(_mm256_loadu_ps(x + i + 8 * k), log2e, shift);
      __m256 n = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      __m256 f = _mm256_sub_ps(t, n), p = _mm256_set1_ps(1.8775767e-3f);
      p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(8.9893397e-3f));
      p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5826318e-2f));
      p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4015361e-1f));
      p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9315308e-1f));
      p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.9999994e-1f));
      __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
      p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
      sum[k] = _mm256_add_ps(sum[k], p);
    }
  float part[8], result = 0;
  _mm256_storeu_ps(part, _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]),
                                       _mm256_add_ps(sum[2], sum[3])));
  for (int k = 0; k < 8; k++) result += part[k];
  return result;
}
#else
static float exp_block(const float *x) {
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  float sum[16] = {0}, result = 0;
  for (int i = 0; i < BLOCK; i += 16)
    for (int k = 0; k < 16; k++) {
      float t = x[i + k] * 1.44269504f - 1.5f, high = t + magic, f = t - (high - magic);
      float p = f * 1.8775767e-3f + 8.9893397e-3f;
      p = p * f + 5.5826318e-2f;
      p = p * f + 2.4015361e-1f;
      p = p * f + 6.9315308e-1f;
      p = p * f + 9.9999994e-1f;
      int32_t bits, n;
      memcpy(&bits, &p, sizeof bits);
      memcpy(&n, &high, sizeof n);
      bits = (int32_t)((uint32_t)bits + ((uint32_t)n << 23));
      memcpy(&p, &bits, sizeof p);
      sum[k] += p;
    }
  for (int k = 0; k < 16; k++) result += sum[k];
  return result;
}
#endif

/* blocks * BLOCK evaluations per thread */
double ceiling_exp(int64_t blocks, int threads) {
  double result = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : result)
  for (int t = 0; t < threads; t++) {
    _Alignas(64) float x[BLOCK];
    for (int i = 0; i < BLOCK; i++) x[i] = -(float)((i * 7919 + t) % 44);
    for (int64_t b = 0; b < blocks; b++) {
      result += exp_block(x);
      __asm__ volatile("" : : "r"(x) : "memory"); /* the next block is not the same to the compiler */
    }
  }
  return result;
}

int64_t ceiling_exp_block(void) { return BLOCK; }
