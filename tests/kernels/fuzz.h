/* What the programs that test_memory.py compiles have in common. usage: fuzz SECONDS SEED */
#ifndef ASR_FUZZ_H
#define ASR_FUZZ_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "operator.h"
#include "processor.h"

int64_t asr_keep_weights(const char *kind, const int8_t *w, int64_t bytes, int64_t channels, int64_t depth);
void asr_let_go_of_weights(int64_t id);
int64_t asr_weights_bytes(void);
void asr_avx2_only(int value);

static inline int64_t pick(int64_t most) { return 1 + rand() % most; }

static inline void fill(uint8_t *bytes, size_t count, int extreme, uint8_t largest) {
  for (size_t i = 0; i < count; i++) bytes[i] = extreme ? largest : (uint8_t)rand();
}

/* Where a value is among the bytes of an item that one kernel hands to the next woven, as weights.h says. */
static inline size_t woven_place(int64_t channels, int64_t frame, int64_t channel) {
  const int64_t group = channel / 64, sixteenth = channel % 64 / 16, block = channel % 16 / 4;
  const int64_t quad = frame / 4 * (whole_lines(channels) / 16) + group * 4 + block;
  return (size_t)(quad * 64 + sixteenth * 16 + frame % 4 * 4 + channel % 4);
}

/* One value after another, as the definition says. */
static inline uint8_t as_byte(const Convolution *convolution, int32_t sum, float scale) {
  float value = (float)sum * scale;
  value = fminf(fmaxf(value, (float)-convolution->y_zero), (float)(255 - convolution->y_zero));
  return (uint8_t)((int32_t)nearbyintf(value) + convolution->y_zero);
}

/* Weights of exactly their size, given away at once: the convolution has them then. */
static inline int set_up(Convolution *convolution, const char *kind, const int8_t *w, int64_t channels, int64_t depth,
                         int32_t *bias, float *scale) {
  const int64_t id = asr_keep_weights(kind, w, channels * depth, channels, depth);
  convolution->weights = weights_take(id);
  asr_let_go_of_weights(id);
  if (convolution->weights == NULL || !allocate_lanes(convolution)) return 0;
  convolution->x_zero = rand() % 256;
  convolution->y_zero = rand() % 256;
  for (int64_t i = 0; i < channels; i++) {
    bias[i] = rand() % 100000 - 50000;
    scale[i] = (rand() % 2 ? 0.5f : 0.00137f) / (float)pick(64);
    set_channel(convolution, i, bias[i], scale[i]);
  }
  return 1;
}

/* Rounds of `check` until the time is up; whatever was kept must have gone. */
static inline int fuzz(int count, char **arguments, int (*check)(void)) {
  const unsigned seed = count > 2 ? (unsigned)atoi(arguments[2]) : 1;
  srand(seed);
  const time_t end = time(NULL) + (count > 1 ? atoi(arguments[1]) : 5);
  int rounds = 0;
  for (; time(NULL) < end; rounds++)
    if (check() || asr_weights_bytes() != 0) return printf("seed %u\n", seed), 1;
  printf("%d rounds\n", rounds);
  return rounds == 0;
}

#endif
