#include "../../api/kernels/head_input.c"

#include "fuzz.h"

static int check(void) {
  HeadInputCall call = {.frames = pick(60), .channels = LANES * pick(12), .zero = rand() % 256};
  call.scale = (float)pick(1000) / 7919;
  const int64_t batch = pick(3), groups = (call.channels / LANES + GROUP - 1) / GROUP;
  const size_t size = (size_t)(batch * call.frames * call.channels);
  uint8_t *x = malloc(size);
  fill(x, size, 0, 0);
  call.x = x, call.y = malloc(size * sizeof *call.y);
  for (int64_t task = 0; task < batch * groups; task++) run_head_input(&call, (size_t)task);
  int wrong = 0;
  for (int64_t item = 0; item < batch; item++)
    for (int64_t frame = 0; frame < call.frames; frame++)
      for (int64_t channel = 0; channel < call.channels; channel++) {
        const int64_t start = item * call.frames * call.channels;
        const int64_t block = channel / LANES * call.frames + frame;
        const int32_t byte = x[start + frame * call.channels + channel];
        wrong += call.y[start + block * LANES + channel % LANES] != (float)(byte - call.zero) * call.scale;
      }
  if (wrong) printf("%d wrong; frames %d channels %d\n", wrong, (int)call.frames, (int)call.channels);
  free(x), free(call.y);
  return wrong != 0;
}

int main(int count, char **arguments) {
  if (!is_vnni()) return puts("skipped: this processor has no VNNI"), 1;
  return fuzz(count, arguments, check);
}
