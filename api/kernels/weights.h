/* Weights packed as the kernels want them, once per process however many sessions use them.
 *
 * A session would keep the weights it was given beside the packed ones, and so would the next session. Here
 * whoever rewrites a graph has them packed, and puts only the number they are known by into the graph.
 */
#ifndef ASR_WEIGHTS_H
#define ASR_WEIGHTS_H

#include <stdint.h>

#define LANES 16 /* channels that are worked on together, a block */
#define MAX_TAPS 128

enum { GROUP = 4, PANEL_BLOCKS = 2 }; /* that a depthwise and a pointwise kernel do in one go */

#define MAX_DEPTH_AVX2 4096 /* of a pointwise convolution without VNNI: a few rows of it are widened at once */
#define MAX_DEPTH_FOUR_BITS 8192

enum {
  SET = 128,      /* weights of four bits that share a scale, */
  SMALL_SET = 32, /* or where they are no multiple of that */
  MIDDLE = 8,     /* what is added to one of them, so that it has no sign */
};

typedef enum {
  DEPTHWISE_VNNI,
  DEPTHWISE_AVX2,
  POINTWISE_VNNI,
  POINTWISE_WOVEN,
  POINTWISE_AVX2,
  FOUR_BITS,
  FOUR_BITS_SMALL,
} Layout;

typedef struct Weights Weights;
typedef struct Chunk Chunk;

struct Weights {
  Layout layout;
  int64_t channels; /* of the output */
  int64_t depth;    /* weights per channel: taps of a depthwise convolution, input channels of a pointwise one */
  int64_t blocks;   /* of LANES channels, those behind the last are zeros */
  int64_t block_bytes;
  uint8_t *packed;
  Chunk *chunk; /* of memory that `packed` is in */
  int32_t *sums; /* (blocks * LANES), of each channel's weights */
  int64_t id, references;
  Weights *next;
};

/* Channels up to the end of a line: as many does a value have that one kernel hands to the next woven, which is
 * uint8 (batch, 1, frames + WOVEN_MORE, channels): of each four frames, blocks of LANES channels, four by four. */
static inline int64_t whole_lines(int64_t channels) { return (channels + 63) / 64 * 64; }

enum { WOVEN_MORE = 3 }; /* the last four frames are there as a whole */

/* Where a channel is among the lanes of all blocks. */
int64_t weights_lane(const Weights *weights, int64_t channel);

/* Weights of a channel that share a scale; 0 where they are not of four bits. */
int64_t set_of(Layout layout);

/* NULL if there are none of that number. Whoever takes gives back. */
const Weights *weights_take(int64_t id);
void weights_give_back(const Weights *weights);

#endif
