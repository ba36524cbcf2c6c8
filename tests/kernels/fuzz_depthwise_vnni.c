#include "../../api/kernels/depthwise_vnni.c"

#include "fuzz_depthwise.h"

static int check(void) { return check_depthwise(depthwise_vnni, 1); }

int main(int count, char **arguments) {
  if (!is_vnni()) return puts("skipped: this processor has no VNNI"), 1;
  return fuzz(count, arguments, check);
}
