/* A product with weights of four bits, each set of a channel's weights with a scale of its own. A set is SET weights or
 * SMALL_SET; each has its own copy of the loops that count, in which that is a constant.
 *
 * x float (..., depth), w whole numbers from -8 to 7 (channels, depth), scale float (channels, sets), bias float
 * (channels), y float (..., channels); a row's sets have a scale, too, and become bytes:
 *   level[t, s] = max_k |x[t, k]| / 127 over the set s,  q[t, k] = round(x[t, k] / level[t, s])
 *   y[t, c] = bias[c] + sum_s level[t, s] * scale[c, s] * sum_k q[t, k] * w[c, k]
 *
 * It is what ONNX Runtime's MatMulNBits does at accuracy level 4. Sums of a set are exact; sets are added up one after
 * another, so that a row gives the same bits whatever is beside it.
 */
#ifndef ASR_FOUR_BITS_H
#define ASR_FOUR_BITS_H

#include "operator.h"

enum {
  QUAD = 4,            /* products of a channel that lie side by side */
  FOUR_BITS_ROWS = 12, /* that a kernel does in one go at most */
};

/* Some rows of x as bytes. */
typedef struct {
  int8_t *values;   /* (rows, sets * set), zeros behind the depth */
  float *levels;    /* (rows, sets) */
  int32_t *middles; /* (rows, sets): what a sum begins with, because MIDDLE was added to each weight */
} Bytes;

typedef struct FourBits FourBits;

/* The first of `end` rows of a block of channels, whose weights are w, to y (rows, stride): how many, FOUR_BITS_ROWS at
 * most. */
typedef int64_t FourBitsRows(const FourBits *kernel, int64_t block, const uint8_t *w, const Bytes *x, int64_t end,
                             float *y, int64_t stride);

/* One row times a block of channels to y (LANES), from the weights as they are packed: a decoder's token waits for them to
 * be read, and unpacking pays for several rows only. */
typedef void FourBitsRow(const FourBits *kernel, int64_t block, const uint8_t *packed, const Bytes *x, float *y);

struct FourBits {
  const OrtApi *api;
  const Weights *weights;
  int64_t set, sets; /* weights of one, and how many */
  float *scale;      /* (blocks, sets, LANES) */
  float *bias;       /* (blocks, LANES) */
  FourBitsRows *run;
  FourBitsRow *run_row;
};

typedef struct {
  const FourBits *kernel;
  const float *x;
  float *y;
  int64_t rows, chunk;
} FourBitsCall;

/* Sets `chunk`: how many tasks. */
int64_t four_bits_tasks(FourBitsCall *call);
void four_bits_task(void *call, size_t task);

void four_bits_bytes(const FourBits *kernel, const float *x, int64_t rows, Bytes to);

/* Weights of a block: `bytes` of two each, to one in a byte, QUAD of each channel side by side. */
void four_bits_unpack(const uint8_t *packed, int64_t bytes, uint8_t *to);

FourBitsRows four_bits_avx2, four_bits_vnni;
FourBitsRow four_bits_row_avx2, four_bits_row_vnni;

#endif
