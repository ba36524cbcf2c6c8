/* What the processor can do, found out once it is needed, so that one library serves all of them. */
#ifndef ASR_PROCESSOR_H
#define ASR_PROCESSOR_H

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define AVX2 __attribute__((target("avx2")))
#define INLINE __attribute__((always_inline)) static inline
#define EXPORTED __attribute__((visibility("default")))

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* sums[i] += four bytes of `a` times four of `b`. In assembly, because with the intrinsic GCC copies every sum
 * from register to register. */
#define ADD_PRODUCTS(sum, a, b) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))

/* A sum that stays in its register: GCC would take all products first, for which there are too few. */
#define KEEP(sum) __asm__("" : "+x"(sum))

/* What the compiler must not know about a pointer: that the same values have just been loaded. */
#define FORGET(pointer) __asm__("" : "+r"(pointer))

int is_avx2(void);

/* Unless told to do without by asr_avx2_only. */
int is_vnni(void);

#endif
