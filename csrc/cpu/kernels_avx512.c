#include "vec_avx512.h"

#define WCE_TABLE wce_kernels_avx512
#include "kernels.inc"
