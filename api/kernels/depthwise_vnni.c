/* Four taps per instruction. A woven register holds four frames of 16 channels, and serves four outputs each:
 * for those that begin one, two or three frames later it is the weights that are moved. */
#include <immintrin.h>
#include <string.h>

#include "depthwise.h"
#include "processor.h"

enum {
  QUAD = 4,
  TILE = 64, /* quads of outputs for which frames are woven at once: 256 frames */
  WIDE = 6,  /* quads of outputs in registers */
  STEPS = (MAX_TAPS + QUAD - 1) / QUAD + 1,
  ROWS = TILE + STEPS,
  NEXT = 256, /* cache lines of the next convolution: a panel of a pointwise one */
};

typedef struct {
  const Depthwise *kernel;
  DepthwiseTask task;
  int64_t frames, steps;
  int64_t first, count; /* frames that are computed at once, `dilation` apart */
  int64_t woven_quads;  /* of what they read */
  const char *ahead; /* memory that is asked for while frames are woven */
  int64_t lines;     /* of it, with each four frames */
  int all_end; /* in the last step; else only the later two of four outputs have a tap there */
  __mmask64 inside; /* of the line's channels */
  __m512i woven[GROUP][ROWS], outputs[GROUP][TILE], weights[STEPS][QUAD];
} Work;

VNNI INLINE __m512i line(const Work *work, int64_t frame) {
  const __m512i x = _mm512_maskz_loadu_epi8(work->inside, work->task.x + frame * work->kernel->channels);
  return work->task.mask == NULL ? x : _mm512_min_epu8(x, _mm512_set1_epi8((char)work->task.mask[frame]));
}

VNNI INLINE __m512i line_or_zero(const Work *work, int64_t frame) {
  if (frame >= 0 && frame < work->frames) return line(work, frame);
  return _mm512_set1_epi8((char)work->kernel->convolution.x_zero);
}

/* Of each sixteen channels a block gets four. */
VNNI INLINE void weave_four(Work *work, int64_t at, __m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i low_ab = _mm512_unpacklo_epi8(a, b), high_ab = _mm512_unpackhi_epi8(a, b);
  const __m512i low_cd = _mm512_unpacklo_epi8(c, d), high_cd = _mm512_unpackhi_epi8(c, d);
  work->woven[0][at] = _mm512_unpacklo_epi16(low_ab, low_cd);
  work->woven[1][at] = _mm512_unpackhi_epi16(low_ab, low_cd);
  work->woven[2][at] = _mm512_unpacklo_epi16(high_ab, high_cd);
  work->woven[3][at] = _mm512_unpackhi_epi16(high_ab, high_cd);
}

/* Up to `end`, as far as it has not been done. */
VNNI static void weave(Work *work, int64_t end) {
  const int64_t apart = work->kernel->dilation;
  int64_t first = work->first - work->kernel->pad + work->woven_quads * QUAD * apart;
  for (int64_t at = work->woven_quads; at < end; at++, first += QUAD * apart) {
    for (int64_t i = 0; i < work->lines; i++, work->ahead += LINE) _mm_prefetch(work->ahead, _MM_HINT_T1);
    const int64_t second = first + apart, third = second + apart, fourth = third + apart;
    if (first >= 0 && fourth < work->frames)
      weave_four(work, at, line(work, first), line(work, second), line(work, third), line(work, fourth));
    else
      weave_four(work, at, line_or_zero(work, first), line_or_zero(work, second), line_or_zero(work, third),
                 line_or_zero(work, fourth));
  }
  if (work->woven_quads < end) work->woven_quads = end;
}

/* A block's weights, also one, two and three taps later. */
VNNI static void move_weights(Work *work, int64_t block) {
  const Weights *weights = work->kernel->convolution.weights;
  const __m512i *from = (const __m512i *)(weights->packed + block * weights->block_bytes);
  const int64_t packed = (work->kernel->taps + QUAD - 1) / QUAD;
  __m512i before = _mm512_setzero_si512();
  for (int64_t step = 0; step < work->steps; step++) {
    const __m512i now = step < packed ? _mm512_load_si512(from + step) : _mm512_setzero_si512();
    __m512i *to = work->weights[step];
    to[0] = now;
    to[1] = _mm512_or_si512(_mm512_slli_epi32(now, 8), _mm512_srli_epi32(before, 24));
    to[2] = _mm512_or_si512(_mm512_slli_epi32(now, 16), _mm512_srli_epi32(before, 16));
    to[3] = _mm512_or_si512(_mm512_slli_epi32(now, 24), _mm512_srli_epi32(before, 8));
    before = now;
  }
}

VNNI INLINE __m512i scaled(__m512i sums, __m512 scale) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale));
}

/* `width` quads of outputs of one block. `width` is a constant wherever this is inlined. */
VNNI INLINE void run(const Work *work, int64_t block, const __m512i *woven, int width, __m512i *out,
                     int64_t apart) {
  const Convolution *convolution = &work->kernel->convolution;
  const __m512i bias = _mm512_loadu_si512(convolution->bias + block * LANES);
  __m512i sums[WIDE][QUAD];
  UNROLL for (int i = 0; i < width; i++)
    UNROLL for (int late = 0; late < QUAD; late++) sums[i][late] = bias;
  const int64_t steps = work->steps - 1;
  for (int64_t step = 0; step < steps; step++) {
    const __m512i *weights = work->weights[step], *from = woven + step;
    /* The next step reads all but one of these again. GCC would keep them, for which there are no registers. */
    FORGET(from);
    UNROLL for (int i = 0; i < width; i++)
      UNROLL for (int late = 0; late < QUAD; late++) ADD_PRODUCTS(sums[i][late], from[i], weights[late]);
  }
  const __m512i *weights = work->weights[steps], *from = woven + steps;
  if (work->all_end)
    UNROLL for (int i = 0; i < width; i++)
      UNROLL for (int late = 0; late < QUAD / 2; late++) ADD_PRODUCTS(sums[i][late], from[i], weights[late]);
  UNROLL for (int i = 0; i < width; i++)
    UNROLL for (int late = QUAD / 2; late < QUAD; late++) ADD_PRODUCTS(sums[i][late], from[i], weights[late]);
  const __m512 scale = _mm512_loadu_ps(convolution->scale + block * LANES);
  const __m512i zero = _mm512_set1_epi16((short)convolution->y_zero);
  UNROLL for (int i = 0; i < width; i++) {
    const __m512i early = _mm512_packs_epi32(scaled(sums[i][0], scale), scaled(sums[i][1], scale));
    const __m512i late = _mm512_packs_epi32(scaled(sums[i][2], scale), scaled(sums[i][3], scale));
    out[i * apart] = _mm512_packus_epi16(_mm512_adds_epi16(early, zero), _mm512_adds_epi16(late, zero));
  }
}

/* Outputs of all blocks back to lines of 64 channels. */
VNNI INLINE void unweave(const Work *work, int64_t at, int64_t width) {
  const int64_t apart = work->kernel->dilation;
  for (const int64_t end = at + width; at < end; at++) {
    const __m512i a = work->outputs[0][at], b = work->outputs[1][at];
    const __m512i c = work->outputs[2][at], d = work->outputs[3][at];
    const __m512i low_ab = _mm512_unpacklo_epi32(a, b), high_ab = _mm512_unpackhi_epi32(a, b);
    const __m512i low_cd = _mm512_unpacklo_epi32(c, d), high_cd = _mm512_unpackhi_epi32(c, d);
    const __m512i lines[QUAD] = {
        _mm512_unpacklo_epi64(low_ab, low_cd),
        _mm512_unpackhi_epi64(low_ab, low_cd),
        _mm512_unpacklo_epi64(high_ab, high_cd),
        _mm512_unpackhi_epi64(high_ab, high_cd),
    };
    UNROLL for (int i = 0; i < QUAD; i++) {
      if (at * QUAD + i >= work->count) break;
      uint8_t *y = work->task.y + (work->first + (at * QUAD + i) * apart) * work->kernel->channels;
      if (work->task.width == LINE)
        _mm512_storeu_si512(y, lines[i]);
      else
        memcpy(y, &lines[i], (size_t)work->task.width);
    }
  }
}

/* `width` quads of outputs of a block, from `at` on. What they need is woven before the first block, and what they
 * give taken apart behind the last: a little at a time, so that the processor has products to add while it waits. */
VNNI INLINE void run_quads(Work *work, int block, int64_t at, int width) {
  if (block == 0) weave(work, at + width + work->steps - 1);
  const int64_t index = work->task.group * GROUP + block;
  if (work->kernel->woven) {
    const int64_t blocks = work->kernel->convolution.weights->blocks;
    __m512i *y = (__m512i *)work->task.y + (work->first / QUAD + at) * blocks + index;
    run(work, index, work->woven[block] + at, width, y, blocks);
    return;
  }
  run(work, index, work->woven[block] + at, width, work->outputs[block] + at, 1);
  if (block == GROUP - 1) unweave(work, at, width);
}

VNNI static void run_block(Work *work, int block) {
  const int64_t quads = (work->count + QUAD - 1) / QUAD;
  int64_t at = 0;
  for (; at + WIDE <= quads; at += WIDE) run_quads(work, block, at, WIDE);
  if (at + 3 <= quads) run_quads(work, block, at, 3), at += 3;
  for (; at < quads; at++) run_quads(work, block, at, 1);
}

/* The weights of the groups that follow, and of the convolution that follows them in memory, come from far away.
 * All tasks ask for as much, so that the last ones have gone well beyond their own. */
static void set_ahead(Work *work, int64_t groups) {
  const Weights *weights = work->kernel->convolution.weights;
  const int64_t group = GROUP * weights->block_bytes / LINE;
  const int64_t share = ((groups - 1) * group + NEXT + groups - 1) / groups;
  const int64_t quads = (work->frames + QUAD - 1) / QUAD + work->steps - 1;
  work->ahead = (const char *)weights->packed + (group + work->task.group * share) * LINE;
  work->lines = (share + quads - 1) / quads;
}

VNNI void depthwise_vnni(void *data, size_t task) {
  const DepthwiseCall *call = data;
  const Depthwise *kernel = call->kernel;
  Work work;
  work.kernel = kernel;
  work.task = depthwise_task(call, task);
  work.frames = call->frames;
  work.steps = (kernel->taps + QUAD - 1 + QUAD - 1) / QUAD;
  work.all_end = (kernel->taps + 1 + QUAD - 1) / QUAD == work.steps;
  work.inside = work.task.width == LINE ? ~(__mmask64)0 : ((__mmask64)1 << work.task.width) - 1;
  set_ahead(&work, call->groups);
  const int64_t dilation = kernel->dilation;
  for (int64_t start = 0; start < call->frames; start += TILE * QUAD * dilation) {
    for (int64_t first = start; first < start + dilation && first < call->frames; first++) {
      const int64_t left = (call->frames - first + dilation - 1) / dilation;
      work.first = first;
      work.count = left < TILE * QUAD ? left : TILE * QUAD;
      work.woven_quads = 0;
      for (int block = 0; block < GROUP; block++) {
        /* Lanes behind the last channel give zeros. */
        move_weights(&work, work.task.group * GROUP + block);
        run_block(&work, block);
      }
    }
  }
}
