/* Without VNNI bytes widen to 16 bits: one instruction multiplies pairs and adds them in 32 bits, which no sum of
 * products of bytes overflows. 6 rows by 16 channels of sums in registers. (The instruction for bytes adds pairs in 16
 * bits, which two large products overflow, and has to be widened afterwards: no faster for all that.)
 */
#include <assert.h>
#include <immintrin.h>
#include <string.h>

#include "pointwise.h"
#include "processor.h"

enum {
  PAIR = 2,       /* products that one instruction adds */
  HALF = LANES / 2, /* sums in a register */
  ROWS = 6,       /* rows of sums in registers */
  PANELS = 8,     /* blocks of channels per task: x is widened once for all of them */
  ROOM = 1 << 15, /* values of x per task: 64 KB, which stay in the second cache */
};

static_assert(ROOM / (MAX_DEPTH_AVX2 + 1) >= ROWS, "the rows of a group of the deepest");

static int64_t blocks_of(const Pointwise *kernel) { return (kernel->channels + LANES - 1) / LANES; }

static int64_t groups_of(const Pointwise *kernel) { return (blocks_of(kernel) + PANELS - 1) / PANELS; }

static int64_t even(int64_t depth) { return (depth + 1) / PAIR * PAIR; }

/* Bytes as 16 bits, and one more zero where the depth is odd. */
AVX2 static void widen(const uint8_t *x, int64_t rows, int64_t depth, uint16_t *wide) {
  for (int64_t row = 0; row < rows; row++, x += depth, wide += even(depth)) {
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
      const __m256i values = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(x + k)));
      _mm256_storeu_si256((__m256i *)(wide + k), values);
    }
    for (; k < depth; k++) wide[k] = x[k];
    if (depth % PAIR) wide[depth] = 0;
  }
}

AVX2 INLINE __m256i pair(const uint16_t *x) {
  int32_t values;
  memcpy(&values, x, sizeof values);
  return _mm256_set1_epi32(values);
}

AVX2 INLINE __m128i as_words(__m256i sums, __m256 scale) {
  const __m256i values = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(sums), scale));
  return _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
}

/* `rows` rows of a block's sums as bytes to y (rows, stride). `rows` is a constant wherever this is inlined. */
AVX2 INLINE void run(const Convolution *convolution, int64_t block, const uint16_t *x, int64_t depth, int rows, uint8_t *y,
                     int64_t stride) {
  const __m128i *w = (const __m128i *)(convolution->weights->packed + block * convolution->weights->block_bytes);
  const __m256i *bias = (const __m256i *)(convolution->bias + block * LANES);
  __m256i sums[ROWS][2];
  UNROLL for (int row = 0; row < rows; row++)
    UNROLL for (int half = 0; half < 2; half++) sums[row][half] = _mm256_loadu_si256(bias + half);
  /* Two addresses and three offsets, because there are few registers for addresses. */
  const uint16_t *from[] = {x, x + 3 * depth};
  for (int64_t k = 0; k < depth; k += PAIR, w += 2) {
    const __m256i left = _mm256_cvtepi8_epi16(_mm_load_si128(w)), right = _mm256_cvtepi8_epi16(_mm_load_si128(w + 1));
    UNROLL for (int row = 0; row < rows; row++) {
      const __m256i values = pair(from[row / 3] + row % 3 * depth + k);
      sums[row][0] = _mm256_add_epi32(sums[row][0], _mm256_madd_epi16(values, left));
      sums[row][1] = _mm256_add_epi32(sums[row][1], _mm256_madd_epi16(values, right));
    }
  }
  const __m256 left = _mm256_loadu_ps(convolution->scale + block * LANES);
  const __m256 right = _mm256_loadu_ps(convolution->scale + block * LANES + HALF);
  const __m128i zero = _mm_set1_epi16((short)convolution->y_zero);
  UNROLL for (int row = 0; row < rows; row++) {
    const __m128i low = _mm_adds_epi16(as_words(sums[row][0], left), zero);
    const __m128i high = _mm_adds_epi16(as_words(sums[row][1], right), zero);
    _mm_storeu_si128((__m128i *)(y + row * stride), _mm_packus_epi16(low, high));
  }
}

/* As many rows as are left before `end`, or as are done in one go: how many. */
AVX2 static int64_t run_rows(const Convolution *convolution, int64_t block, const uint16_t *x, int64_t depth,
                             int64_t end, uint8_t *y, int64_t stride) {
  const int64_t rows = end >= ROWS ? ROWS : end >= 3 ? 3 : 1;
  if (rows == ROWS)
    run(convolution, block, x, depth, ROWS, y, stride);
  else if (rows == 3)
    run(convolution, block, x, depth, 3, y, stride);
  else
    run(convolution, block, x, depth, 1, y, stride);
  return rows;
}

AVX2 void pointwise_avx2(void *data, size_t task) {
  const PointwiseCall *call = data;
  const Pointwise *kernel = call->kernel;
  const int64_t blocks = blocks_of(kernel), groups = groups_of(kernel);
  const int64_t first = (int64_t)task % groups * PANELS, last = first + PANELS < blocks ? first + PANELS : blocks;
  const int64_t start = (int64_t)task / groups * call->chunk, depth = even(kernel->depth);
  const int64_t rows = call->rows - start < call->chunk ? call->rows - start : call->chunk;
  uint16_t wide[ROOM] __attribute__((aligned(64)));
  widen(call->x + start * kernel->depth, rows, kernel->depth, wide);
  for (int64_t block = first; block < last; block++) {
    const int64_t width = kernel->channels - block * LANES;
    for (int64_t row = 0, done; row < rows; row += done) {
      uint8_t *y = call->y + (start + row) * kernel->channels + block * LANES;
      const uint16_t *x = wide + row * depth;
      if (width >= LANES) {
        done = run_rows(&kernel->convolution, block, x, depth, rows - row, y, kernel->channels);
      } else {
        uint8_t out[ROWS][LANES];
        done = run_rows(&kernel->convolution, block, x, depth, rows - row, out[0], LANES);
        for (int64_t i = 0; i < done; i++) memcpy(y + i * kernel->channels, out[i], (size_t)width);
      }
    }
  }
}

int64_t pointwise_avx2_tasks(PointwiseCall *call, int64_t items) {
  call->chunk = share_rows(call->rows, ROOM / even(call->kernel->depth) / ROWS * ROWS, ROWS);
  call->chunks = (call->rows + call->chunk - 1) / call->chunk;
  return items * call->chunks * groups_of(call->kernel);
}
