/* 12 rows by 32 channels of sums in registers; one instruction adds four products to each of 16 sums. */
#include <immintrin.h>
#include <string.h>

#include "pointwise.h"
#include "processor.h"

enum {
  QUAD = 4,          /* products that one instruction adds */
  PANEL = PANEL_BLOCKS * LANES, /* channels */
  ROWS = 12,         /* rows of sums in registers */
  CHUNK = 21 * ROWS, /* rows per task at most, so that x stays in the second cache */
  LINE = 64,         /* bytes of a cache line, and products of a row between two that ask for weights */
};

static int64_t panels_of(const Pointwise *kernel) { return (kernel->channels + PANEL - 1) / PANEL; }

/* Weights that come from far away and will be wanted soon. */
typedef struct {
  const char *at;
  int64_t lines; /* with each LINE products of a row: few at a time, for the processor only waits for so many */
} Ahead;

VNNI INLINE void ask(Ahead *ahead) {
  for (int64_t line = 0; line < ahead->lines; line++, ahead->at += LINE) _mm_prefetch(ahead->at, _MM_HINT_T1);
}

VNNI INLINE __m512i scaled(__m512i sums, __m512 scale) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale));
}

VNNI INLINE __m512i four(const uint8_t *x) {
  int32_t bytes;
  memcpy(&bytes, x, QUAD);
  return _mm512_set1_epi32(bytes);
}

/* `rows` rows of a panel's sums as bytes to y (rows, stride), but for those from `end` on. `rows` and `woven` are
 * constants wherever this is inlined. */
VNNI INLINE void run(const Pointwise *kernel, int64_t panel, const uint8_t *x, int rows, int woven, int64_t end,
                     uint8_t *y, int64_t stride, Ahead *ahead) {
  const Convolution *convolution = &kernel->convolution;
  const Weights *weights = convolution->weights;
  const __m512i *w = (const __m512i *)(weights->packed + panel * 2 * weights->block_bytes);
  const int32_t *bias = convolution->bias + panel * PANEL;
  const int64_t depth = kernel->depth, whole = depth / QUAD * QUAD;
  __m512i sums[ROWS][2];
  UNROLL for (int row = 0; row < rows; row++)
    UNROLL for (int half = 0; half < 2; half++) sums[row][half] = _mm512_loadu_si512(bias + half * LANES);
  /* Four addresses and three offsets, because there are no registers for an address per row. */
  const uint8_t *from[ROWS / 3] = {x, x + 3 * depth, x + 6 * depth, x + 9 * depth};
  const uint8_t *four_rows[ROWS / QUAD] = {x, x + 4 * depth, x + 8 * depth};
  for (int64_t k = 0; k < whole; k += QUAD, w += 2) {
    if (k % LINE == 0) ask(ahead);
    const __m512i left = _mm512_load_si512(w), right = _mm512_load_si512(w + 1);
    UNROLL for (int row = 0; row < rows; row++) {
      const uint8_t *apart = from[row / 3] + row % 3 * depth + k;
      const uint8_t *together = four_rows[row / QUAD] + row % QUAD * QUAD + k * QUAD;
      const __m512i bytes = four(woven ? together : apart);
      ADD_PRODUCTS(sums[row][0], bytes, left);
      ADD_PRODUCTS(sums[row][1], bytes, right);
    }
  }
  if (whole < depth) {
    UNROLL for (int row = 0; row < rows; row++) {
      uint8_t rest[QUAD] = {0};
      memcpy(rest, x + row * depth + whole, (size_t)(depth - whole));
      const __m512i bytes = four(rest);
      ADD_PRODUCTS(sums[row][0], bytes, _mm512_load_si512(w));
      ADD_PRODUCTS(sums[row][1], bytes, _mm512_load_si512(w + 1));
    }
  }
  const float *scales = convolution->scale + panel * PANEL;
  const __m512 left = _mm512_loadu_ps(scales), right = _mm512_loadu_ps(scales + LANES);
  const __m512i zero = _mm512_set1_epi16((short)convolution->y_zero);
  /* Packing mixes left and right and two rows by fours. */
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  UNROLL for (int row = 0; row < rows; row += 2) {
    const int other = row + 1 < rows ? row + 1 : row;
    const __m512i one = _mm512_packs_epi32(scaled(sums[row][0], left), scaled(sums[row][1], right));
    const __m512i two = _mm512_packs_epi32(scaled(sums[other][0], left), scaled(sums[other][1], right));
    const __m512i bytes = _mm512_packus_epi16(_mm512_adds_epi16(one, zero), _mm512_adds_epi16(two, zero));
    const __m512i lines = _mm512_permutexvar_epi32(order, bytes);
    if (row < end) _mm256_storeu_si256((__m256i *)(y + row * stride), _mm512_castsi512_si256(lines));
    if (row < other && other < end)
      _mm256_storeu_si256((__m256i *)(y + other * stride), _mm512_extracti64x4_epi64(lines, 1));
  }
}

/* As many rows as are left before `end`, or as are done in one go: how many. */
VNNI static int64_t run_rows(const Pointwise *kernel, int64_t panel, const uint8_t *x, int64_t end, uint8_t *y,
                             int64_t stride, Ahead *ahead) {
  const int64_t some = kernel->woven ? (end + QUAD - 1) / QUAD * QUAD : end >= 8 ? 8 : end >= 4 ? 4 : 1;
  const int64_t rows = end >= ROWS ? ROWS : some;
  if (kernel->woven) {
    if (rows == ROWS)
      run(kernel, panel, x, ROWS, 1, end, y, stride, ahead);
    else if (rows == 8)
      run(kernel, panel, x, 8, 1, end, y, stride, ahead);
    else
      run(kernel, panel, x, 4, 1, end, y, stride, ahead);
  } else if (rows == ROWS) {
    run(kernel, panel, x, ROWS, 0, ROWS, y, stride, ahead);
  } else if (rows == 8) {
    run(kernel, panel, x, 8, 0, 8, y, stride, ahead);
  } else if (rows == 4) {
    run(kernel, panel, x, 4, 0, 4, y, stride, ahead);
  } else {
    run(kernel, panel, x, 1, 0, 1, y, stride, ahead);
  }
  return rows < end ? rows : end;
}

VNNI void pointwise_vnni(void *data, size_t task) {
  const PointwiseCall *call = data;
  const Pointwise *kernel = call->kernel;
  const Weights *weights = kernel->convolution.weights;
  const int64_t panels = panels_of(kernel), panel = (int64_t)task % panels, part = (int64_t)task / panels;
  const int64_t item = part / call->chunks, start = part % call->chunks * call->chunk;
  const int64_t end = start + call->chunk < call->rows ? start + call->chunk : call->rows;
  const int64_t width = kernel->channels - panel * PANEL, bytes = 2 * weights->block_bytes;
  /* The next panel, and behind the last one the weights of the next layer. */
  const int64_t times = call->chunk / ROWS * ((kernel->depth + LINE - 1) / LINE);
  Ahead ahead = {
      .at = (const char *)weights->packed + (panel + 1) * bytes,
      .lines = (bytes / LINE + times - 1) / times,
  };
  for (int64_t row = start, rows; row < end; row += rows) {
    const uint8_t *x = call->x + item * call->item_bytes + row * kernel->depth;
    uint8_t *y = call->y + (item * call->rows + row) * kernel->channels + panel * PANEL;
    if (width >= PANEL) {
      rows = run_rows(kernel, panel, x, end - row, y, kernel->channels, &ahead);
    } else {
      uint8_t out[ROWS][PANEL];
      rows = run_rows(kernel, panel, x, end - row, out[0], PANEL, &ahead);
      for (int64_t i = 0; i < rows; i++) memcpy(y + i * kernel->channels, out[i], (size_t)width);
    }
  }
}

int64_t pointwise_vnni_tasks(PointwiseCall *call, int64_t items) {
  call->chunk = share_rows(call->rows, CHUNK, ROWS);
  call->chunks = (call->rows + call->chunk - 1) / call->chunk;
  return items * call->chunks * panels_of(call->kernel);
}
