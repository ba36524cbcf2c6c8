/* The instruction for bytes adds pairs of products in 16 bits. Weights of four bits leave room there for eight such
 * pairs, which are then widened at once. 3 rows by 16 channels of sums in registers.
 */
#include <assert.h>
#include <immintrin.h>
#include <string.h>

#include "four_bits.h"
#include "processor.h"

enum {
  HALF = LANES / 2, /* sums in a register */
  ROWS = 3,         /* rows of sums in registers */
  PAIRS = 8,        /* that 16 bits hold: 8 * 2 * 15 * 127 = 30,480 */
};

static_assert(FOUR_BITS_ROWS % ROWS == 0, "whole groups in a task");

/* Of a set. Its size is a constant wherever this is inlined. */
AVX2 INLINE float largest(const float *x, int size) {
  __m256 most = _mm256_setzero_ps();
  for (int i = 0; i < size; i += HALF)
    most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(x + i)));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

AVX2 INLINE __m256i eight(const float *x, __m256 inverse) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse));
}

AVX2 INLINE int32_t sum(__m256i values) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

AVX2 INLINE void to_bytes(const float *x, int64_t rows, int64_t depth, int size, Bytes to) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* packing mixes halves */
  const __m256i ones = _mm256_set1_epi8(1), words = _mm256_set1_epi16(1);
  for (int64_t row = 0; row < rows; row++, x += depth)
    for (int64_t k = 0; k < depth; k += size, to.values += size) {
      float padded[SET] = {0};
      const float *set = x + k;
      if (depth - k < size) set = memcpy(padded, set, (size_t)(depth - k) * sizeof *set);
      const float most = largest(set, size);
      const __m256 inverse = _mm256_set1_ps(most == 0 ? 0 : 127 / most);
      __m256i sums = _mm256_setzero_si256();
      for (int i = 0; i < size; i += 4 * HALF) {
        const __m256i left = _mm256_packs_epi32(eight(set + i, inverse), eight(set + i + HALF, inverse));
        const __m256i right = _mm256_packs_epi32(eight(set + i + 2 * HALF, inverse), eight(set + i + 3 * HALF, inverse));
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(left, right), order);
        _mm256_storeu_si256((__m256i *)(to.values + i), bytes);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, bytes), words));
      }
      *to.levels++ = most / 127;
      *to.middles++ = -MIDDLE * sum(sums);
    }
}

AVX2 void four_bits_bytes(const FourBits *kernel, const float *x, int64_t rows, Bytes to) {
  if (kernel->set == SET)
    to_bytes(x, rows, kernel->weights->depth, SET, to);
  else
    to_bytes(x, rows, kernel->weights->depth, SMALL_SET, to);
}

AVX2 void four_bits_unpack(const uint8_t *packed, int64_t bytes, uint8_t *to) {
  const __m256i lower = _mm256_set1_epi8(15);
  for (int64_t i = 0; i < bytes; i += QUAD * LANES, to += 2 * QUAD * LANES)
    for (int half = 0; half < QUAD * LANES; half += QUAD * HALF) {
      const __m256i both = _mm256_load_si256((const __m256i *)(packed + i + half));
      const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), lower);
      _mm256_store_si256((__m256i *)(to + half), _mm256_and_si256(both, lower));
      _mm256_store_si256((__m256i *)(to + QUAD * LANES + half), upper);
    }
}

AVX2 INLINE __m256i four(const int8_t *x) {
  int32_t bytes;
  memcpy(&bytes, x, QUAD);
  return _mm256_set1_epi32(bytes);
}

/* `rows` rows of a block to y (rows, stride), in sets of `size`. Both are constants wherever this is inlined. */
AVX2 INLINE void run(const FourBits *kernel, int64_t block, const uint8_t *w, const Bytes *x, int rows, int size,
                     float *y, int64_t stride) {
  const int64_t sets = kernel->sets;
  const float *scale = kernel->scale + block * sets * LANES;
  const __m256i ones = _mm256_set1_epi16(1);
  float totals[ROWS][LANES] __attribute__((aligned(32))) = {0};
  for (int64_t set = 0; set < sets; set++, scale += LANES) {
    __m256i sums[ROWS][2];
    UNROLL for (int row = 0; row < rows; row++)
      UNROLL for (int half = 0; half < 2; half++) sums[row][half] = _mm256_set1_epi32(x->middles[row * sets + set]);
    for (int64_t k = set * size; k < (set + 1) * size; k += QUAD * PAIRS) {
      __m256i pairs[ROWS][2];
      UNROLL for (int pair = 0; pair < PAIRS; pair++, w += QUAD * LANES) {
        const __m256i left = _mm256_load_si256((const __m256i *)w), right = _mm256_load_si256((const __m256i *)w + 1);
        UNROLL for (int row = 0; row < rows; row++) {
          const __m256i values = four(x->values + row * sets * size + k + pair * QUAD);
          const __m256i one = _mm256_maddubs_epi16(left, values), two = _mm256_maddubs_epi16(right, values);
          pairs[row][0] = pair == 0 ? one : _mm256_add_epi16(pairs[row][0], one);
          pairs[row][1] = pair == 0 ? two : _mm256_add_epi16(pairs[row][1], two);
          KEEP(pairs[row][0]);
          KEEP(pairs[row][1]);
        }
      }
      UNROLL for (int row = 0; row < rows; row++)
        UNROLL for (int half = 0; half < 2; half++)
          sums[row][half] = _mm256_add_epi32(sums[row][half], _mm256_madd_epi16(pairs[row][half], ones));
    }
    UNROLL for (int row = 0; row < rows; row++)
      UNROLL for (int half = 0; half < 2; half++) {
        float *total = totals[row] + half * HALF;
        const __m256 level = _mm256_set1_ps(x->levels[row * sets + set]);
        const __m256 factor = _mm256_mul_ps(level, _mm256_loadu_ps(scale + half * HALF));
        const __m256 more = _mm256_mul_ps(factor, _mm256_cvtepi32_ps(sums[row][half]));
        _mm256_store_ps(total, _mm256_add_ps(_mm256_load_ps(total), more));
      }
  }
  UNROLL for (int row = 0; row < rows; row++)
    UNROLL for (int half = 0; half < LANES; half += HALF) {
      const __m256 bias = _mm256_loadu_ps(kernel->bias + block * LANES + half);
      _mm256_storeu_ps(y + row * stride + half, _mm256_add_ps(_mm256_load_ps(totals[row] + half), bias));
    }
}

AVX2 INLINE int64_t run_some(const FourBits *kernel, int64_t block, const uint8_t *w, const Bytes *x, int64_t end,
                             int size, float *y, int64_t stride) {
  if (end >= ROWS)
    run(kernel, block, w, x, ROWS, size, y, stride);
  else
    run(kernel, block, w, x, 1, size, y, stride);
  return end >= ROWS ? ROWS : 1;
}

AVX2 int64_t four_bits_avx2(const FourBits *kernel, int64_t block, const uint8_t *w, const Bytes *x, int64_t end,
                            float *y, int64_t stride) {
  if (kernel->set == SET) return run_some(kernel, block, w, x, end, SET, y, stride);
  return run_some(kernel, block, w, x, end, SMALL_SET, y, stride);
}

AVX2 INLINE void run_row(const FourBits *kernel, int64_t block, const uint8_t *packed, const Bytes *x, int size,
                         float *y) {
  const __m256i lower = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const float *scale = kernel->scale + block * kernel->sets * LANES;
  const int8_t *values = x->values;
  __m256 totals[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t set = 0; set < kernel->sets; set++, scale += LANES) {
    __m256i sums[2] = {_mm256_set1_epi32(x->middles[set]), _mm256_set1_epi32(x->middles[set])};
    for (int k = 0; k < size; k += QUAD * PAIRS) {
      __m256i pairs[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      UNROLL for (int pair = 0; pair < PAIRS; pair += 2, values += 2 * QUAD, packed += QUAD * LANES) {
        const __m256i one = four(values), two = four(values + QUAD);
        UNROLL for (int half = 0; half < 2; half++) {
          const __m256i both = _mm256_load_si256((const __m256i *)packed + half);
          const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), lower);
          pairs[half] = _mm256_add_epi16(pairs[half], _mm256_maddubs_epi16(_mm256_and_si256(both, lower), one));
          pairs[half] = _mm256_add_epi16(pairs[half], _mm256_maddubs_epi16(upper, two));
        }
      }
      UNROLL for (int half = 0; half < 2; half++)
        sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(pairs[half], ones));
    }
    const __m256 level = _mm256_set1_ps(x->levels[set]);
    UNROLL for (int half = 0; half < 2; half++) {
      const __m256 factor = _mm256_mul_ps(level, _mm256_loadu_ps(scale + half * HALF));
      totals[half] = _mm256_add_ps(totals[half], _mm256_mul_ps(factor, _mm256_cvtepi32_ps(sums[half])));
    }
  }
  UNROLL for (int half = 0; half < 2; half++) {
    const __m256 bias = _mm256_loadu_ps(kernel->bias + block * LANES + half * HALF);
    _mm256_storeu_ps(y + half * HALF, _mm256_add_ps(totals[half], bias));
  }
}

AVX2 void four_bits_row_avx2(const FourBits *kernel, int64_t block, const uint8_t *packed, const Bytes *x, float *y) {
  if (kernel->set == SET)
    run_row(kernel, block, packed, x, SET, y);
  else
    run_row(kernel, block, packed, x, SMALL_SET, y);
}
