#include "../../api/kernels/four_bits_avx2.c"

#include "fuzz_four_bits.h"

static int check(void) { return check_four_bits(four_bits_avx2, four_bits_row_avx2); }

int main(int count, char **arguments) {
  if (!is_avx2()) return puts("skipped: this processor has no AVX2"), 1;
  return fuzz(count, arguments, check);
}
