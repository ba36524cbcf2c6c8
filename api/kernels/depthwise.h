/* Depthwise INT8 convolution over time: one channel per group, channels last, stride 1.
 *
 * x uint8 (batch, 1, frames, channels), w int8 (channels, taps), y like x:
 *   y[t, c] = clamp(round(scale[c] * (bias[c] + sum_k (x[t + k * dilation - pad, c] - x_zero) * w[c, k])) + y_zero)
 * With a mask, uint8 (batch, 1, frames, 1), x is min(x, mask).
 *
 * ONNX Runtime multiplies one tap at a time. The instructions for bytes add neighbouring products, so here
 * the rows of a few frames are woven together (for each channel the bytes of four frames side by side), once
 * for a group of channels and a tile of frames; each output is then a chain of products that are added.
 * Frames that are `dilation` apart are a convolution of their own.
 */
#ifndef ASR_DEPTHWISE_H
#define ASR_DEPTHWISE_H

#include "operator.h"

enum { LINE = GROUP * LANES }; /* channels per task: one cache line of every frame */

typedef struct Depthwise Depthwise;

typedef struct {
  const Depthwise *kernel;
  const uint8_t *x, *mask;
  uint8_t *y;
  int64_t frames, groups;
} DepthwiseCall;

struct Depthwise {
  Convolution convolution;
  void (*run)(void *call, size_t task); /* all frames of one group of one item */
  int64_t channels, taps, pad, dilation;
  int64_t woven; /* whether the output stays as it is for a pointwise kernel (weights.h) */
};

/* A task as both sets of instructions take it apart. */
typedef struct {
  const uint8_t *x, *mask;
  uint8_t *y;
  int64_t group, width; /* of its channels, LINE but in the last group */
} DepthwiseTask;

DepthwiseTask depthwise_task(const DepthwiseCall *call, size_t task);

void depthwise_vnni(void *call, size_t task);
void depthwise_avx2(void *call, size_t task);

#endif
