/* Without VNNI bytes widen to 16 bits, and pairs of frames are multiplied and added, 8 channels at a time. */
#include <immintrin.h>
#include <string.h>

#include "depthwise.h"
#include "processor.h"

enum {
  PAIR = 2,
  HALF = LANES / 2,
  SHORT = 8, /* outputs in registers */
  TILE = 256, /* frames that are woven at once: the rows stay in the first cache */
  ROWS = TILE + MAX_TAPS + 4, /* what a tile reads, and a last load beyond */
};

/* Outputs are computed in groups; those behind the last are thrown away. */
static int64_t rounded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* SHORT outputs, two frames apart, of half a block. */
AVX2 INLINE void run(const Depthwise *kernel, int64_t block, int half, const __m256i *woven, uint8_t *out) {
  const Convolution *convolution = &kernel->convolution;
  const int64_t pairs = (kernel->taps + PAIR - 1) / PAIR;
  const uint8_t *packed = convolution->weights->packed + block * convolution->weights->block_bytes;
  const __m256i *weights = (const __m256i *)packed + half;
  const __m256i bias = _mm256_loadu_si256((const __m256i *)(convolution->bias + block * LANES + half * HALF));
  __m256i sums[SHORT];
  UNROLL for (int i = 0; i < SHORT; i++) sums[i] = bias;
  for (int64_t pair = 0; pair < pairs; pair++) {
    const __m256i weight = _mm256_loadu_si256(weights + pair * (LANES / HALF));
    const __m256i *from = woven + pair;
    /* Each step loads what the one before has loaded one place further; there are no registers to keep it in. */
    FORGET(from);
    UNROLL for (int i = 0; i < SHORT; i++) sums[i] =
        _mm256_add_epi32(sums[i], _mm256_madd_epi16(from[i], weight));
  }
  const __m256 scale = _mm256_loadu_ps(convolution->scale + block * LANES + half * HALF);
  UNROLL for (int i = 0; i < SHORT; i++) {
    const __m256i value = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[i]), scale));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    const __m128i whole = _mm_adds_epi16(words, _mm_set1_epi16((short)convolution->y_zero));
    _mm_storel_epi64((__m128i *)(out + i * PAIR * LINE), _mm_packus_epi16(whole, whole));
  }
}

/* `count` outputs of one block from its rows (uint8 (ROWS, LANES)). */
AVX2 static void run_block(const Depthwise *kernel, const uint8_t *rows, int64_t block, int64_t count, uint8_t *out) {
  const int64_t outputs = rounded(count) / PAIR, wovens = outputs + (kernel->taps + PAIR - 1) / PAIR - 1;
  __m256i woven[LANES / HALF][PAIR][(TILE + MAX_TAPS) / PAIR];
  for (int64_t row = 0; row < wovens * PAIR; row++) {
    const __m128i first = _mm_loadu_si128((const __m128i *)(rows + row * LANES));
    const __m128i second = _mm_loadu_si128((const __m128i *)(rows + (row + 1) * LANES));
    woven[0][row % PAIR][row / PAIR] = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(first, second));
    woven[1][row % PAIR][row / PAIR] = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(first, second));
  }
  for (int half = 0; half < LANES / HALF; half++)
    for (int phase = 0; phase < PAIR; phase++)
      for (int64_t at = 0; at < outputs; at += SHORT)
        run(kernel, block, half, woven[half][phase] + at, out + (at * PAIR + phase) * LINE + half * HALF);
}

/* `count` frames of a group's channels, `dilation` apart, from `first` on; `x_zero` outside of the clip. */
static void gather(const DepthwiseCall *call, const DepthwiseTask *task, int64_t first, int64_t count,
                   uint8_t rows[GROUP][ROWS][LANES]) {
  const Depthwise *kernel = call->kernel;
  for (int64_t row = 0; row < count; row++) {
    const int64_t frame = first + row * kernel->dilation;
    const int inside = frame >= 0 && frame < call->frames;
    const __m128i most = _mm_set1_epi8(inside && task->mask != NULL ? (char)task->mask[frame] : (char)255);
    uint8_t line[LINE];
    const uint8_t *from = line;
    if (!inside)
      memset(line, kernel->convolution.x_zero, LINE);
    else if (task->width == LINE)
      from = task->x + frame * kernel->channels;
    else
      memcpy(line, task->x + frame * kernel->channels, (size_t)task->width);
    for (int block = 0; block < GROUP; block++) {
      const __m128i bytes = _mm_loadu_si128((const __m128i *)(from + block * LANES));
      _mm_storeu_si128((__m128i *)rows[block][row], _mm_min_epu8(bytes, most));
    }
  }
}

void depthwise_avx2(void *data, size_t index) {
  const DepthwiseCall *call = data;
  const Depthwise *kernel = call->kernel;
  const DepthwiseTask task = depthwise_task(call, index);
  const int64_t dilation = kernel->dilation;
  uint8_t rows[GROUP][ROWS][LANES], out[TILE][LINE];
  for (int64_t start = 0; start < call->frames; start += TILE * dilation) {
    for (int64_t first = start; first < start + dilation && first < call->frames; first++) {
      const int64_t left = (call->frames - first + dilation - 1) / dilation, count = left < TILE ? left : TILE;
      gather(call, &task, first - kernel->pad, rounded(count) + kernel->taps - 1, rows);
      for (int64_t block = 0; block * LANES < task.width; block++)
        run_block(kernel, rows[block][0], task.group * GROUP + block, count, out[0] + block * LANES);
      uint8_t *y = task.y + first * kernel->channels;
      for (int64_t row = 0; row < count; row++)
        memcpy(y + row * dilation * kernel->channels, out[row], task.width == LINE ? LINE : (size_t)task.width);
    }
  }
}
