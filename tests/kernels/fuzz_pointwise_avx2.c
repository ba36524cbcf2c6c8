#include "../../api/kernels/pointwise_avx2.c"

#include "fuzz_pointwise.h"

static int check(void) { return check_pointwise(pointwise_avx2_tasks, pointwise_avx2, MAX_DEPTH_AVX2, 0); }

int main(int count, char **arguments) {
  asr_avx2_only(1);
  if (!is_avx2()) return puts("skipped: this processor has no AVX2"), 1;
  return fuzz(count, arguments, check);
}
