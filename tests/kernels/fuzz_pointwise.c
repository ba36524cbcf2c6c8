#include "../../api/kernels/pointwise.c"

#include "fuzz.h"

static uint8_t expected(const PointwiseCall *call, const int8_t *w, int32_t bias, float scale, int64_t row, int64_t c) {
  const Pointwise *k = call->kernel;
  /* Unsigned, because long sums wrap around. */
  uint32_t sum = (uint32_t)bias;
  for (int64_t i = 0; i < k->depth; i++)
    sum += (uint32_t)((call->x[row * k->depth + i] - k->convolution.x_zero) * w[c * k->depth + i]);
  return as_byte(&k->convolution, (int32_t)sum, scale);
}

static int check(void) {
  Pointwise k = {.channels = pick(rand() % 4 ? 40 : 200), .depth = pick(rand() % 4 ? 40 : 700)};
  if (rand() % 64 == 0) k.depth = 65536 - rand() % 8, k.channels = pick(40);
  const size_t channels = (size_t)k.channels, depth = (size_t)k.depth;
  const int64_t rows = pick(k.depth > 1000 ? 5 : rand() % 4 ? 70 : 600);
  uint8_t *x = malloc((size_t)rows * depth), *y = malloc((size_t)rows * channels);
  int8_t *w = malloc(channels * depth);
  int32_t *bias = malloc(channels * sizeof *bias);
  float *scale = malloc(channels * sizeof *scale);
  const int extreme = rand() % 4 == 0;
  fill(x, (size_t)rows * depth, extreme, 255);
  fill((uint8_t *)w, channels * depth, extreme, 128);
  if (!set_up(&k.convolution, "pointwise", w, k.channels, k.depth, bias, scale)) return puts("no weights"), 1;
  k.panels = (k.channels + PANEL - 1) / PANEL;
  PointwiseCall call = {.kernel = &k, .x = x, .y = y, .rows = rows};
  const int64_t tasks = share_out(&call);
  for (int64_t task = 0; task < tasks; task++) run_task(&call, (size_t)task);
  int wrong = 0;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t c = 0; c < k.channels; c++)
      wrong += y[row * k.channels + c] != expected(&call, w, bias[c], scale[c], row, c);
  if (wrong) printf("%d wrong; channels %zu depth %zu rows %d\n", wrong, channels, depth, (int)rows);
  free(x), free(y), free(w), free(bias), free(scale);
  close_convolution(&k.convolution);
  return wrong != 0;
}

int main(int count, char **arguments) {
  if (!is_vnni()) return puts("skipped: this processor has no VNNI"), 1;
  return fuzz(count, arguments, check);
}
