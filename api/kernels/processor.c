#include "processor.h"

#include <cpuid.h>
#include <stdatomic.h>

static atomic_int avx2_only = 0;

/* By hand, because __builtin_cpu_supports always says no in what zig links (compiler_rt of zig 0.17). */
static int has(unsigned saved, unsigned wanted_ebx, unsigned wanted_ecx) {
  unsigned eax, ebx, ecx, edx;
  /* XCR0: the registers that the operating system saves, without which the instructions must not be used. */
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return 0;
  __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  if ((eax & saved) != saved || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
  return (ebx & wanted_ebx) == wanted_ebx && (ecx & wanted_ecx) == wanted_ecx;
}

enum { SAVES_YMM = 0x06, SAVES_ZMM = 0xe6 };

int is_avx2(void) { return has(SAVES_YMM, bit_AVX2, 0); }

int is_vnni(void) {
  return !avx2_only && has(SAVES_ZMM, bit_AVX2 | bit_AVX512F | bit_AVX512BW | bit_AVX512VL, bit_AVX512VNNI);
}

/* What the operators run on: "vnni", "avx2", or "" on processors where they would not run. */
EXPORTED const char *asr_instructions(void) {
  if (is_vnni()) return "vnni";
  return is_avx2() ? "avx2" : "";
}

/* For tests and benchmarks: weights that are packed from now on are for AVX2, also where there is VNNI. */
EXPORTED void asr_avx2_only(int value) { avx2_only = value; }
