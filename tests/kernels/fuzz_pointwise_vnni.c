#include "../../api/kernels/pointwise_vnni.c"

#include "fuzz_pointwise.h"

static int check(void) { return check_pointwise(pointwise_vnni_tasks, pointwise_vnni, 65536, 1); }

int main(int count, char **arguments) {
  if (!is_vnni()) return puts("skipped: this processor has no VNNI"), 1;
  return fuzz(count, arguments, check);
}
