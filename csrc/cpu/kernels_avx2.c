#include "vec_avx2.h"

#define WCE_TABLE wce_kernels_avx2
#include "kernels.inc"
