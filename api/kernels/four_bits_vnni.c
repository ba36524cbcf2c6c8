/* 12 rows by 16 channels of sums in registers; one instruction adds four products to each. */
#include <immintrin.h>
#include <string.h>

#include "four_bits.h"
#include "processor.h"

enum { ROWS = FOUR_BITS_ROWS };

VNNI INLINE __m512i four(const int8_t *x) {
  int32_t bytes;
  memcpy(&bytes, x, QUAD);
  return _mm512_set1_epi32(bytes);
}

/* `rows` rows of a block to y (rows, stride), in sets of `size`. Both are constants wherever this is inlined. */
VNNI INLINE void run(const FourBits *kernel, int64_t block, const uint8_t *w, const Bytes *x, int rows, int size,
                     float *y, int64_t stride) {
  const int64_t sets = kernel->sets, depth = sets * size;
  const float *scale = kernel->scale + block * sets * LANES;
  /* Four addresses and three offsets, because there are no registers for an address per row. */
  const int8_t *from[ROWS / 3] = {x->values, x->values + 3 * depth, x->values + 6 * depth, x->values + 9 * depth};
  __m512 totals[ROWS];
  UNROLL for (int row = 0; row < rows; row++) totals[row] = _mm512_setzero_ps();
  for (int64_t set = 0; set < sets; set++, scale += LANES) {
    __m512i sums[ROWS];
    UNROLL for (int row = 0; row < rows; row++) sums[row] = _mm512_set1_epi32(x->middles[row * sets + set]);
    for (int64_t k = set * size; k < (set + 1) * size; k += QUAD, w += QUAD * LANES) {
      const __m512i weights = _mm512_load_si512(w);
      UNROLL for (int row = 0; row < rows; row++) {
        const __m512i values = four(from[row / 3] + row % 3 * depth + k);
        ADD_PRODUCTS(sums[row], weights, values);
      }
    }
    UNROLL for (int row = 0; row < rows; row++) {
      const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(x->levels[row * sets + set]), _mm512_loadu_ps(scale));
      totals[row] = _mm512_add_ps(totals[row], _mm512_mul_ps(factor, _mm512_cvtepi32_ps(sums[row])));
    }
  }
  const __m512 bias = _mm512_loadu_ps(kernel->bias + block * LANES);
  UNROLL for (int row = 0; row < rows; row++) _mm512_storeu_ps(y + row * stride, _mm512_add_ps(totals[row], bias));
}

VNNI INLINE int64_t run_some(const FourBits *kernel, int64_t block, const uint8_t *w, const Bytes *x, int64_t end,
                             int size, float *y, int64_t stride) {
  const int64_t rows = end >= ROWS ? ROWS : end >= 4 ? 4 : 1;
  if (rows == ROWS)
    run(kernel, block, w, x, ROWS, size, y, stride);
  else if (rows == 4)
    run(kernel, block, w, x, 4, size, y, stride);
  else
    run(kernel, block, w, x, 1, size, y, stride);
  return rows;
}

VNNI int64_t four_bits_vnni(const FourBits *kernel, int64_t block, const uint8_t *w, const Bytes *x, int64_t end,
                            float *y, int64_t stride) {
  if (kernel->set == SET) return run_some(kernel, block, w, x, end, SET, y, stride);
  return run_some(kernel, block, w, x, end, SMALL_SET, y, stride);
}

VNNI INLINE void run_row(const FourBits *kernel, int64_t block, const uint8_t *packed, const Bytes *x, int size,
                         float *y) {
  const __m512i lower = _mm512_set1_epi8(15);
  const float *scale = kernel->scale + block * kernel->sets * LANES;
  const int8_t *values = x->values;
  __m512 total = _mm512_setzero_ps();
  for (int64_t set = 0; set < kernel->sets; set++, scale += LANES) {
    /* Four, because the next product for a sum has to wait for the one before. */
    __m512i sums[4] = {_mm512_set1_epi32(x->middles[set])};
    for (int k = 0; k < size; k += 4 * QUAD, values += 4 * QUAD, packed += 2 * QUAD * LANES) {
      const __m512i one = _mm512_load_si512(packed), two = _mm512_load_si512(packed + QUAD * LANES);
      ADD_PRODUCTS(sums[0], _mm512_and_si512(one, lower), four(values));
      ADD_PRODUCTS(sums[1], _mm512_and_si512(_mm512_srli_epi16(one, 4), lower), four(values + QUAD));
      ADD_PRODUCTS(sums[2], _mm512_and_si512(two, lower), four(values + 2 * QUAD));
      ADD_PRODUCTS(sums[3], _mm512_and_si512(_mm512_srli_epi16(two, 4), lower), four(values + 3 * QUAD));
    }
    const __m512i left = _mm512_add_epi32(sums[0], sums[1]), right = _mm512_add_epi32(sums[2], sums[3]);
    const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(x->levels[set]), _mm512_loadu_ps(scale));
    total = _mm512_add_ps(total, _mm512_mul_ps(factor, _mm512_cvtepi32_ps(_mm512_add_epi32(left, right))));
  }
  _mm512_storeu_ps(y, _mm512_add_ps(total, _mm512_loadu_ps(kernel->bias + block * LANES)));
}

VNNI void four_bits_row_vnni(const FourBits *kernel, int64_t block, const uint8_t *packed, const Bytes *x, float *y) {
  if (kernel->set == SET)
    run_row(kernel, block, packed, x, SET, y);
  else
    run_row(kernel, block, packed, x, SMALL_SET, y);
}
