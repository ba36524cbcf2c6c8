#include "../../api/kernels/depthwise_avx2.c"

#include "fuzz_depthwise.h"

static int check(void) { return check_depthwise(depthwise_avx2, 0); }

int main(int count, char **arguments) {
  asr_avx2_only(1);
  if (!is_avx2()) return puts("skipped: this processor has no AVX2"), 1;
  return fuzz(count, arguments, check);
}
