#include "../../api/kernels/four_bits_vnni.c"

#include "fuzz_four_bits.h"

static int check(void) { return check_four_bits(four_bits_vnni, four_bits_row_vnni); }

int main(int count, char **arguments) {
  if (!is_vnni()) return puts("skipped: this processor has no VNNI"), 1;
  return fuzz(count, arguments, check);
}
