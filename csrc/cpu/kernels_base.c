#include "vec_scalar.h"

#define WCE_TABLE wce_kernels_base
#include "kernels.inc"
