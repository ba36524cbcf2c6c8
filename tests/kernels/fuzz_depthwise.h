/* Depthwise convolutions of any shape, every buffer of exactly its size. */
#include "depthwise.h"
#include "fuzz.h"

static uint8_t expected(const DepthwiseCall *call, const int8_t *w, int32_t bias, float scale, int64_t item, int64_t t,
                        int64_t c) {
  const Depthwise *k = call->kernel;
  int32_t sum = bias;
  for (int64_t tap = 0; tap < k->taps; tap++) {
    const int64_t frame = t + tap * k->dilation - k->pad;
    if (frame < 0 || frame >= call->frames) continue;
    int32_t x = call->x[(item * call->frames + frame) * k->channels + c];
    if (call->mask != NULL && call->mask[item * call->frames + frame] < x) x = call->mask[item * call->frames + frame];
    sum += (x - k->convolution.x_zero) * w[c * k->taps + tap];
  }
  return as_byte(&k->convolution, sum, scale);
}

static int check_depthwise(void (*run)(void *, size_t), int may_be_woven) {
  Depthwise k = {
      .channels = pick(rand() % 4 ? 40 : 200),
      .taps = pick(MAX_TAPS),
      .dilation = rand() % 8 ? pick(3) : pick(INT32_MAX),
  };
  k.pad = rand() % ((k.taps - 1) * k.dilation + 1);
  const size_t channels = (size_t)k.channels, taps = (size_t)k.taps;
  const int64_t batch = pick(2), frames = pick(rand() % 4 ? 70 : 900);
  const size_t size = (size_t)(batch * frames), bytes = size * channels;
  k.woven = k.dilation == 1 && may_be_woven && rand() % 2;
  const size_t item = (size_t)(k.woven ? (frames + WOVEN_MORE) * whole_lines(k.channels) : frames * k.channels);
  uint8_t *x = malloc(bytes), *y = malloc((size_t)batch * item), *mask = malloc(size);
  int8_t *w = malloc(channels * taps);
  int32_t *bias = malloc(channels * sizeof *bias);
  float *scale = malloc(channels * sizeof *scale);
  const int extreme = rand() % 4 == 0;
  fill(x, bytes, extreme, 255);
  fill((uint8_t *)w, channels * taps, extreme, 128);
  for (size_t i = 0; i < size; i++) mask[i] = rand() % 4 ? 255 : (uint8_t)rand();
  if (!set_up(&k.convolution, "depthwise", w, k.channels, k.taps, bias, scale)) return puts("no weights"), 1;
  DepthwiseCall call = {.kernel = &k, .x = x, .y = y, .mask = rand() % 2 ? mask : NULL, .frames = frames};
  call.groups = (k.channels + LINE - 1) / LINE;
  for (int64_t task = 0; task < batch * call.groups; task++) run(&call, (size_t)task);
  int wrong = 0;
  for (int64_t i = 0; i < batch; i++)
    for (int64_t t = 0; t < frames; t++)
      for (int64_t c = 0; c < k.channels; c++) {
        const size_t at = k.woven ? woven_place(k.channels, t, c) : (size_t)(t * k.channels + c);
        wrong += y[(size_t)i * item + at] != expected(&call, w, bias[c], scale[c], i, t, c);
      }
  if (wrong)
    printf("%d wrong; woven %d channels %zu taps %zu dilation %d pad %d frames %d batch %d\n", wrong, (int)k.woven,
           channels, taps, (int)k.dilation, (int)k.pad, (int)frames, (int)batch);
  free(x), free(y), free(mask), free(w), free(bias), free(scale);
  close_convolution(&k.convolution);
  return wrong != 0;
}
