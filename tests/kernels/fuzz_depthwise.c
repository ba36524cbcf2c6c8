/* Every buffer of exactly its size, shapes at random, each output against one multiplication after another.
 * Compiled with the address and undefined-behaviour sanitizers by test_depthwise.py. usage: fuzz SECONDS SEED */
#include "../../api/kernels/depthwise.c"

#include <math.h>
#include <stdio.h>
#include <time.h>

static int64_t pick(int64_t most) { return 1 + rand() % most; }

static uint8_t expected(const Call *call, const int8_t *w, const int32_t *bias, int64_t item, int64_t t, int64_t c) {
  const Kernel *k = call->kernel;
  int32_t sum = bias[c];
  for (int64_t tap = 0; tap < k->taps; tap++) {
    const int64_t frame = t + tap * k->dilation - k->pad;
    if (frame < 0 || frame >= call->frames) continue;
    int32_t x = call->x[(item * call->frames + frame) * k->channels + c];
    if (call->mask != NULL && call->mask[item * call->frames + frame] < x) x = call->mask[item * call->frames + frame];
    sum += (x - k->x_zero) * w[c * k->taps + tap];
  }
  float value = (float)sum * k->scale[c];
  value = fminf(fmaxf(value, (float)-k->y_zero), (float)(255 - k->y_zero));
  return (uint8_t)((int32_t)nearbyintf(value) + k->y_zero);
}

static int check(int avx2) {
  Kernel k = {.channels = pick(rand() % 4 ? 40 : 200), .taps = pick(MAX_TAPS), .dilation = rand() % 8 ? pick(3) : pick(INT32_MAX)};
  k.blocks = (k.channels + LANES - 1) / LANES;
  k.tile = avx2 ? tile_avx2 : tile_vnni;
  k.pad = rand() % ((k.taps - 1) * k.dilation + 1);
  k.x_zero = rand() % 256, k.y_zero = rand() % 256;
  const size_t channels = (size_t)k.channels, taps = (size_t)k.taps, blocks = (size_t)k.blocks;
  const int64_t batch = pick(2), frames = pick(rand() % 4 ? 70 : 900);
  const size_t size = (size_t)(batch * frames), bytes = size * channels;
  uint8_t *x = malloc(bytes), *y = malloc(bytes), *mask = malloc(size);
  int8_t *w = malloc(channels * taps);
  int32_t *bias = malloc(channels * sizeof *bias);
  const int extreme = rand() % 4 == 0;
  for (size_t i = 0; i < bytes; i++) x[i] = extreme ? 255 : (uint8_t)rand();
  for (size_t i = 0; i < channels * taps; i++) w[i] = (int8_t)(extreme ? -128 : rand());
  for (size_t i = 0; i < size; i++) mask[i] = rand() % 4 ? 255 : (uint8_t)rand();
  if (!allocate(&k)) return 1;
  for (size_t i = 0; i < channels; i++) {
    bias[i] = rand() % 100000 - 50000;
    k.scale[i] = (rand() % 2 ? 0.5f : 0.00137f) / (float)pick(64);
  }
  pack(&k, w, bias);
  Call call = {.kernel = &k, .x = x, .y = y, .mask = rand() % 2 ? mask : NULL, .frames = frames};
  call.groups = (k.blocks + GROUP - 1) / GROUP;
  for (int64_t task = 0; task < batch * call.groups; task++) run_group(&call, (size_t)task);
  int wrong = 0;
  for (int64_t item = 0; item < batch; item++)
    for (int64_t t = 0; t < frames; t++)
      for (int64_t c = 0; c < k.channels; c++)
        wrong += y[(item * frames + t) * k.channels + c] != expected(&call, w, bias, item, t, c);
  if (wrong)
    printf("%s: %d wrong; channels %zu taps %zu dilation %d pad %d frames %d batch %d blocks %zu\n",
           avx2 ? "avx2" : "vnni", wrong, channels, taps, (int)k.dilation, (int)k.pad, (int)frames, (int)batch, blocks);
  free(x), free(y), free(mask), free(w), free(bias);
  free(k.weights), free(k.bias), free(k.scale);
  return wrong != 0;
}

int main(int count, char **arguments) {
  if (!is_avx2()) return puts("no AVX2"), 1;
  const unsigned seed = count > 2 ? (unsigned)atoi(arguments[2]) : 1;
  srand(seed);
  const time_t end = time(NULL) + (count > 1 ? atoi(arguments[1]) : 5);
  int rounds = 0;
  for (; time(NULL) < end; rounds++)
    for (int avx2 = is_vnni() ? 0 : 1; avx2 < 2; avx2++)
      if (check(avx2)) return printf("seed %u\n", seed), 1;
  printf("%d rounds\n", rounds);
  return rounds == 0;
}
