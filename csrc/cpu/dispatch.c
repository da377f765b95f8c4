/* dispatch.c -- instruction sets, weakest first, and the one in use; the processor's maker.       */

#include <stdatomic.h>
#include <string.h>

#include "table.h"

typedef struct {
  const char *name;
  const wce_kernels *table;
  int (*supported)(void);
} isa;

static int always(void) { return 1; }

#if defined(__x86_64__) || defined(_M_X64)
/* The compiler's built-in asks the processor, and the operating system through XGETBV whether it
 * saves the wide registers.                                                                       */
static int has_avx2(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
static int has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
int wce_cpu_is_intel(void) {
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") != 0;
}
#else
int wce_cpu_is_intel(void) { return 0; }
#endif

static const isa isas[] = {
  {"base", wce_kernels_base, always},
#if defined(__x86_64__) || defined(_M_X64)
  {"avx2", wce_kernels_avx2, has_avx2},
  {"avx512", wce_kernels_avx512, has_avx512},
#endif
};

enum { ISA_COUNT = sizeof isas / sizeof isas[0] };

static _Atomic int current = -1; /* -1: not chosen yet                                             */

int wce_cpu_isa_count(void) { return ISA_COUNT; }
const char *wce_cpu_isa_name(int index) { return isas[index].name; }
int wce_cpu_isa_supported(int index) { return isas[index].supported(); }

static int best(void) {
  int index = ISA_COUNT - 1;
  while (!isas[index].supported()) index--;
  return index;
}

int wce_cpu_isa_current(void) {
  int index = atomic_load_explicit(&current, memory_order_relaxed);
  if (index >= 0) return index;
  index = best();
  atomic_store_explicit(&current, index, memory_order_relaxed);
  return index;
}

int wce_cpu_isa_select(const char *name) {
  int index = name ? 0 : best();
  while (name && index < ISA_COUNT && strcmp(isas[index].name, name) != 0) index++;
  if (index == ISA_COUNT || !isas[index].supported()) return -1;
  atomic_store_explicit(&current, index, memory_order_relaxed);
  return 0;
}

const wce_kernels *wce_cpu_kernels(wce_dtype dtype) {
  return &isas[wce_cpu_isa_current()].table[dtype];
}
