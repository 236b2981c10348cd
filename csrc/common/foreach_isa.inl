// Includes FASTSEG_KERNEL_FILE once per instruction set, each time in a namespace of that name.
// Where FASTSEG_KERNEL_BF16 is defined, also with AVX-512's bfloat16 dot products and with AMX.
// Standard and intrinsics headers must be included before, outside the regions. See common/isa.h.

// Inside the kernel file: the register width in bytes and a number to compare with #if.
#define FASTSEG_ISA_LEVEL 0
namespace baseline {
#include FASTSEG_KERNEL_FILE
}
#undef FASTSEG_ISA_LEVEL

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTSEG_ISA_LEVEL 1
namespace avx2 {
#include FASTSEG_KERNEL_FILE
}
#undef FASTSEG_ISA_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                                 \
    __attribute__((                                                                           \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define FASTSEG_ISA_LEVEL 2
namespace avx512 {
#include FASTSEG_KERNEL_FILE
}
#undef FASTSEG_ISA_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#if defined(FASTSEG_KERNEL_BF16)
#if defined(__clang__)
#pragma clang attribute push(                                                                     \
    __attribute__((target(                                                                        \
        "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif
#define FASTSEG_ISA_LEVEL 3
namespace avx512_bf16 {
#include FASTSEG_KERNEL_FILE
}
#undef FASTSEG_ISA_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#if defined(FASTSEG_AMX)
#if defined(__clang__)
#pragma clang attribute push(                                                                   \
    __attribute__((                                                                             \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16," \
               "prefer-vector-width=512"))),                                                    \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
#define FASTSEG_ISA_LEVEL 4
namespace amx {
#include FASTSEG_KERNEL_FILE
}
#undef FASTSEG_ISA_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // FASTSEG_AMX
#undef FASTSEG_KERNEL_BF16
#endif  // FASTSEG_KERNEL_BF16
#endif  // __x86_64__
#undef FASTSEG_KERNEL_FILE
