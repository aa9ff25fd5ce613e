// Intel's matrix tiles (AMX): whether this process may use them.
//
// Invariant: asked of the system once for a process; where it refuses, other kernels compute the same numbers.
#pragma once

#include "simd.h"

#if defined(MEGPT_AVX512) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__linux__)
#define MEGPT_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace megpt {

// Threads get room for tiles when they first use them (arch_prctl, ARCH_REQ_XCOMP_PERM of XTILEDATA).
inline bool amx_permitted() {
#if defined(MEGPT_AMX)
    static const bool permitted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return permitted;
#else
    return false;
#endif
}

// What the kernels use here: "amx" (where it is of use, else "avx512"), "avx512", "avx2" or "portable".
inline const char* instruction_set() { return amx_permitted() ? "amx" : MEGPT_ISA; }

}  // namespace megpt
