/* Pointwise INT8 convolution, which is a matrix product: channels last, kernel 1 x 1, stride 1.
 *
 * x uint8 (..., frames, depth), w int8 (channels, depth), y uint8 (..., frames, channels):
 *   y[t, c] = clamp(round(scale[c] * (bias[c] + sum_k (x[t, k] - x_zero) * w[c, k])) + y_zero)
 *
 * x may also be what a depthwise kernel has left woven (weights.h).
 *
 * A panel is the weights of a few channels; it stays in the first cache while all rows of x pass by. The sums of a
 * few rows fill the registers, and become bytes there: ONNX Runtime writes them out and reads them once more.
 */
#ifndef ASR_POINTWISE_H
#define ASR_POINTWISE_H

#include "operator.h"

typedef struct Pointwise Pointwise;

typedef struct {
  const Pointwise *kernel;
  const uint8_t *x;
  uint8_t *y;
  int64_t rows, chunks, chunk; /* of an item, or of all items where one follows the other */
  int64_t item_bytes;          /* of x */
} PointwiseCall;

struct Pointwise {
  Convolution convolution;
  int64_t depth, channels; /* depth: bytes from one row to the next */
  int woven;
  /* Sets chunks of about the same size: how many tasks for so many items. */
  int64_t (*share_out)(PointwiseCall *call, int64_t items);
  void (*run)(void *call, size_t task); /* a chunk of rows by some of the channels */
};


int64_t pointwise_vnni_tasks(PointwiseCall *call, int64_t items);
void pointwise_vnni(void *call, size_t task);
int64_t pointwise_avx2_tasks(PointwiseCall *call, int64_t items);
void pointwise_avx2(void *call, size_t task);

#endif
