/* What both sets of instructions are compared with. */
#include "pointwise.h"

#include "fuzz.h"

static uint8_t expected(const Pointwise *k, const uint8_t *x, const int8_t *w, int32_t bias, float scale,
                        int64_t depth) {
  /* Unsigned, because long sums wrap around. */
  uint32_t sum = (uint32_t)bias;
  for (int64_t i = 0; i < depth; i++) sum += (uint32_t)((x[i] - k->convolution.x_zero) * w[i]);
  return as_byte(&k->convolution, (int32_t)sum, scale);
}

/* x (batch, rows, depth) as a depthwise kernel would have left it. */
static uint8_t *weave(const uint8_t *x, int64_t batch, int64_t rows, int64_t depth) {
  const size_t item = (size_t)((rows + WOVEN_MORE) * whole_lines(depth));
  uint8_t *woven = malloc((size_t)batch * item);
  for (size_t i = 0; i < (size_t)batch * item; i++) woven[i] = (uint8_t)rand();
  for (int64_t i = 0; i < batch; i++)
    for (int64_t row = 0; row < rows; row++)
      for (int64_t k = 0; k < depth; k++)
        woven[(size_t)i * item + woven_place(depth, row, k)] = x[(i * rows + row) * depth + k];
  return woven;
}

/* `deepest`: depth that weights may have; `woven`: whether x may be. */
static int check_pointwise(int64_t (*share_out)(PointwiseCall *, int64_t), void (*run)(void *, size_t), int64_t deepest,
                           int woven) {
  Pointwise k = {.channels = pick(rand() % 4 ? 40 : 200), .woven = woven && rand() % 2};
  int64_t depth = pick(rand() % 4 ? 40 : 700);
  if (rand() % 64 == 0) depth = deepest - rand() % 8, k.channels = pick(40);
  const size_t channels = (size_t)k.channels;
  const int64_t batch = pick(3), rows = pick(depth > 1000 ? 5 : rand() % 4 ? 70 : 400), all = batch * rows;
  uint8_t *x = malloc((size_t)(all * depth)), *y = malloc((size_t)all * channels);
  int8_t *w = malloc(channels * (size_t)depth);
  int32_t *bias = malloc(channels * sizeof *bias);
  float *scale = malloc(channels * sizeof *scale);
  const int extreme = rand() % 4 == 0;
  fill(x, (size_t)(all * depth), extreme, 255);
  fill((uint8_t *)w, channels * (size_t)depth, extreme, 128);
  if (!set_up(&k.convolution, k.woven ? "woven" : "pointwise", w, k.channels, depth, bias, scale))
    return puts("no weights"), 1;
  k.depth = k.woven ? whole_lines(depth) : depth;
  uint8_t *given = k.woven ? weave(x, batch, rows, depth) : x;
  PointwiseCall call = {.kernel = &k, .x = given, .y = y, .rows = k.woven ? rows : all};
  call.item_bytes = (rows + WOVEN_MORE) * k.depth;
  const int64_t tasks = share_out(&call, k.woven ? batch : 1);
  for (int64_t task = 0; task < tasks; task++) run(&call, (size_t)task);
  int wrong = 0;
  for (int64_t row = 0; row < all; row++)
    for (int64_t c = 0; c < k.channels; c++)
      wrong += y[row * k.channels + c] != expected(&k, x + row * depth, w + c * depth, bias[c], scale[c], depth);
  if (wrong)
    printf("%d wrong; woven %d channels %zu depth %d rows %d\n", wrong, k.woven, channels, (int)depth, (int)rows);
  if (given != x) free(given);
  free(x), free(y), free(w), free(bias), free(scale);
  close_convolution(&k.convolution);
  return wrong != 0;
}
