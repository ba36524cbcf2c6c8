#include "weights.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "processor.h"

enum { LINE_BYTES = 64 };

#define MOST INT64_C(65536) /* channels, and weights of one: no product of the two overflows, no sum of weights */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Weights *all = NULL;
static int64_t last_id = 0;

static int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/* In the order that unpacking four rows of 64 channels gives: a block has four channels of each sixteen. */
static int64_t woven_lane(int64_t channel) {
  return channel / 64 * 64 + channel % 16 / 4 * 16 + channel % 64 / 16 * 4 + channel % 4;
}

int64_t weights_lane(const Weights *weights, int64_t channel) {
  return weights->layout == DEPTHWISE_VNNI ? woven_lane(channel) : channel;
}

int64_t set_of(Layout layout) { return layout == FOUR_BITS ? SET : layout == FOUR_BITS_SMALL ? SMALL_SET : 0; }

static int is_pointwise(Layout layout) { return layout == POINTWISE_VNNI || layout == POINTWISE_WOVEN; }

/* Four weights of 16 channels in 64 bytes; in a panel two blocks take turns. AVX2: two weights of each, as 16 bits
 * where they are few. Four bits: eight weights of 16 channels, without a
 * sign; the first four are the lower halves of bytes. */
static void put(const Weights *weights, int64_t channel, int64_t index, int8_t weight) {
  const int64_t at = weights_lane(weights, channel), block = at / LANES, lane = at % LANES;
  int8_t *start = (int8_t *)weights->packed;
  if (weights->layout == DEPTHWISE_VNNI) {
    start += block * weights->block_bytes + index / 4 * LINE_BYTES;
    start[lane * 4 + index % 4] = weight;
  } else if (is_pointwise(weights->layout)) {
    /* In the order that the depthwise kernel leaves its blocks in. */
    if (weights->layout == POINTWISE_WOVEN) index = woven_lane(index);
    start += block / PANEL_BLOCKS * PANEL_BLOCKS * weights->block_bytes;
    start += (index / 4 * PANEL_BLOCKS + block % PANEL_BLOCKS) * LINE_BYTES;
    start[lane * 4 + index % 4] = weight;
  } else if (set_of(weights->layout) > 0) {
    start += block * weights->block_bytes + index / 8 * LINE_BYTES;
    start[lane * 4 + index % 4] |= (int8_t)((weight + MIDDLE) << (index / 4 % 2 * 4));
  } else if (weights->layout == POINTWISE_AVX2) {
    start += block * weights->block_bytes + index / 2 * (2 * LANES);
    start[lane * 2 + index % 2] = weight;
  } else {
    start += block * weights->block_bytes + index / 2 * LINE_BYTES;
    ((int16_t *)start)[lane * 2 + index % 2] = weight;
  }
}

/* Memory in chunks of huge pages, filled one weights after another, because an inference walks through all of
 * them: with small pages it waits for the page tables (2 % of a pointwise convolution), and what lies behind
 * the weights of one convolution is what the next will want. */
struct Chunk {
  uint8_t *memory;
  int64_t bytes, used, tenants;
};

#define HUGE_PAGE (INT64_C(2) << 20)

static Chunk *filling = NULL;

static void free_chunk(Chunk *chunk) {
  munmap(chunk->memory, (size_t)chunk->bytes);
  free(chunk);
}

static Chunk *new_chunk(int64_t bytes) {
  Chunk *chunk = calloc(1, sizeof *chunk);
  if (chunk == NULL) return NULL;
  chunk->bytes = up_to(bytes, HUGE_PAGE);
  /* One page more, so that there is a place where whole ones begin; what is around is given back. */
  const size_t room = (size_t)(chunk->bytes + HUGE_PAGE);
  uint8_t *start = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return free(chunk), NULL;
  const int64_t before = (int64_t)(-(uintptr_t)start % (uintptr_t)HUGE_PAGE);
  chunk->memory = start + before;
  if (before > 0) munmap(start, (size_t)before);
  if (before < HUGE_PAGE) munmap(chunk->memory + chunk->bytes, (size_t)(HUGE_PAGE - before));
  madvise(chunk->memory, (size_t)chunk->bytes, MADV_HUGEPAGE);
  return chunk;
}

/* Zeros. The mutex is held here and in `leave`. */
static int settle(Weights *weights, int64_t bytes) {
  bytes = up_to(bytes, LINE_BYTES);
  if (filling == NULL || filling->bytes - filling->used < bytes) {
    Chunk *chunk = new_chunk(bytes);
    if (chunk == NULL) return 0;
    if (filling != NULL && filling->tenants == 0) free_chunk(filling);
    filling = chunk;
  }
  weights->chunk = filling;
  weights->packed = filling->memory + filling->used;
  filling->used += bytes;
  filling->tenants++;
  return 1;
}

static void leave(Chunk *chunk) {
  if (--chunk->tenants > 0) return;
  if (chunk == filling) filling = NULL;
  free_chunk(chunk);
}

static void drop(Weights *weights) {
  free(weights->sums);
  free(weights);
}

/* Blocks that a kernel does in one go. */
static int64_t together(Layout layout) {
  return layout == POINTWISE_AVX2 || set_of(layout) > 0 ? 1 : is_pointwise(layout) ? PANEL_BLOCKS : GROUP;
}

/* Of `depth` weights for each channel of a block, filled up to what one instruction takes. */
static int64_t block_bytes(Layout layout, int64_t depth) {
  switch (layout) {
    case DEPTHWISE_AVX2:
      return up_to(depth, 2) * LINE_BYTES / 2;
    case POINTWISE_AVX2:
      return up_to(depth, 2) * LANES;
    case FOUR_BITS:
    case FOUR_BITS_SMALL:
      return up_to(depth, set_of(layout)) * LANES / 2;
    case POINTWISE_WOVEN:
      return up_to(depth, 64) * LANES;
    default:
      return up_to(depth, 4) * LANES;
  }
}

/* w (channels, depth). NULL when there is no memory. */
static Weights *pack(Layout layout, const int8_t *w, int64_t channels, int64_t depth) {
  Weights *weights = calloc(1, sizeof *weights);
  if (weights == NULL) return NULL;
  weights->layout = layout;
  weights->channels = channels;
  weights->depth = depth;
  weights->blocks = up_to(channels, LANES * together(layout)) / LANES;
  weights->block_bytes = block_bytes(layout, depth);
  weights->sums = calloc((size_t)(weights->blocks * LANES), sizeof *weights->sums);
  if (weights->sums == NULL || !settle(weights, weights->blocks * weights->block_bytes)) return drop(weights), NULL;
  for (int64_t channel = 0; channel < channels; channel++) {
    int32_t *sum = weights->sums + weights_lane(weights, channel);
    for (int64_t index = 0; index < depth; index++) {
      put(weights, channel, index, w[channel * depth + index]);
      *sum += w[channel * depth + index];
    }
  }
  return weights;
}

/* How weights of a kind are packed for this processor; 0 where nothing here can use them. */
static int choose_layout(const char *kind, Layout *layout) {
  if (!is_avx2()) return 0;
  if (strcmp(kind, "depthwise") == 0)
    *layout = is_vnni() ? DEPTHWISE_VNNI : DEPTHWISE_AVX2;
  else if (strcmp(kind, "pointwise") == 0)
    *layout = is_vnni() ? POINTWISE_VNNI : POINTWISE_AVX2;
  else if (strcmp(kind, "woven") == 0 && is_vnni())
    *layout = POINTWISE_WOVEN;
  else if (strcmp(kind, "four_bits") == 0)
    *layout = FOUR_BITS;
  else if (strcmp(kind, "four_bits_small") == 0)
    *layout = FOUR_BITS_SMALL;
  else
    return 0;
  return 1;
}

static int64_t deepest(Layout layout) {
  switch (layout) {
    case DEPTHWISE_VNNI:
    case DEPTHWISE_AVX2:
      return MAX_TAPS;
    case POINTWISE_AVX2:
      return MAX_DEPTH_AVX2;
    case FOUR_BITS:
    case FOUR_BITS_SMALL:
      return MAX_DEPTH_FOUR_BITS;
    default:
      return MOST;
  }
}

/* Larger ones would overflow what the products are added up in. */
static int are_four_bits(const int8_t *w, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (w[i] < -MIDDLE || w[i] >= MIDDLE) return 0;
  return 1;
}

/* The number of weights int8 (channels, depth); 0 if they are not `bytes`, or nothing here can use them. */
EXPORTED int64_t asr_keep_weights(const char *kind, const int8_t *w, int64_t bytes, int64_t channels, int64_t depth) {
  Layout layout;
  if (channels < 1 || channels > MOST || depth < 1 || depth > MOST || bytes != channels * depth) return 0;
  if (!choose_layout(kind, &layout) || depth > deepest(layout)) return 0;
  if (set_of(layout) > 0 && !are_four_bits(w, bytes)) return 0;
  int64_t id = 0;
  pthread_mutex_lock(&mutex);
  Weights *weights = pack(layout, w, channels, depth);
  if (weights != NULL) {
    /* Never the same number again: one that is left over somewhere finds nothing. */
    id = weights->id = ++last_id;
    weights->references = 1;
    weights->next = all;
    all = weights;
  }
  pthread_mutex_unlock(&mutex);
  return id;
}

static Weights **find(int64_t id) {
  Weights **at = &all;
  while (*at != NULL && (*at)->id != id) at = &(*at)->next;
  return at;
}

const Weights *weights_take(int64_t id) {
  pthread_mutex_lock(&mutex);
  Weights *weights = *find(id);
  if (weights != NULL) weights->references++;
  pthread_mutex_unlock(&mutex);
  return weights;
}

/* Whoever kept them needs them no longer. They go when the last kernel that took them has gone. */
EXPORTED void asr_let_go_of_weights(int64_t id) {
  pthread_mutex_lock(&mutex);
  Weights **at = find(id), *weights = *at;
  if (weights != NULL && --weights->references == 0) {
    *at = weights->next;
    leave(weights->chunk);
    drop(weights);
  }
  pthread_mutex_unlock(&mutex);
}

void weights_give_back(const Weights *weights) {
  if (weights != NULL) asr_let_go_of_weights(weights->id);
}

/* Bytes of all that are kept, for tests and the log. */
EXPORTED int64_t asr_weights_bytes(void) {
  int64_t bytes = 0;
  pthread_mutex_lock(&mutex);
  for (const Weights *weights = all; weights != NULL; weights = weights->next)
    bytes += weights->blocks * weights->block_bytes;
  pthread_mutex_unlock(&mutex);
  return bytes;
}
