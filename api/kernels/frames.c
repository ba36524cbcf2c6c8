/* What a log-mel front end multiplies by its bases: the blocks of a waveform, and the block before each turned round.
 *
 * waveform float (batch, samples), lengths int64 (batch), preemphasis float, count int64 (1): blocks of `hop` samples;
 * even and odd float (batch, count, hop):
 *   signal[t]  = waveform[t] - preemphasis * waveform[t - 1] where 0 <= t < length, else 0
 *   even[b, n] = signal[b * hop + n] + signal[b * hop - 1 - n], odd[b, n] = signal[b * hop + n] - signal[b * hop - 1 - n]
 *
 * ONNX Runtime takes a pass over all samples for each of about twenty nodes.
 */
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include "operator.h"
#include "processor.h"

enum {
  EIGHT = 8,      /* values in a register */
  CHUNK = 64,     /* blocks per task */
  MAX_HOP = 1024, /* as in ends.py */
};

typedef struct {
  const OrtApi *api;
  int64_t hop;
} Frames;

typedef struct {
  const float *waveform;
  const int64_t *lengths;
  float preemphasis;
  float *even, *odd;
  int64_t samples, count, hop, chunks;
} FramesCall;

/* A block of an item's signal; `own` are its samples. */
AVX2 static void emphasise(const FramesCall *call, const float *waveform, int64_t own, int64_t block, float *signal) {
  const int64_t start = block * call->hop;
  memset(signal, 0, (size_t)call->hop * sizeof *signal);
  if (start < 0 || start >= own) return;
  const int64_t end = own - start < call->hop ? own - start : call->hop;
  const float *now = waveform + start;
  const __m256 factor = _mm256_set1_ps(call->preemphasis);
  int64_t n = 0;
  if (start == 0) signal[0] = now[0], n = 1;
  for (; n + EIGHT <= end; n += EIGHT) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(now + n - 1), factor);
    _mm256_storeu_ps(signal + n, _mm256_sub_ps(_mm256_loadu_ps(now + n), scaled));
  }
  for (; n < end; n++) signal[n] = now[n] - now[n - 1] * call->preemphasis;
}

AVX2 static void run_frames(void *data, size_t task) {
  const FramesCall *call = data;
  const int64_t item = (int64_t)task / call->chunks, hop = call->hop;
  const float *waveform = call->waveform + item * call->samples;
  const int64_t length = call->lengths[item], own = length < call->samples ? length : call->samples;
  const int64_t first = (int64_t)task % call->chunks * CHUNK;
  const int64_t end = first + CHUNK < call->count ? first + CHUNK : call->count;
  const __m256i backwards = _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  float signals[2][MAX_HOP];
  emphasise(call, waveform, own, first - 1, signals[(first + 1) % 2]);
  for (int64_t block = first; block < end; block++) {
    float *after = signals[block % 2];
    const float *last = signals[(block + 1) % 2] + hop - 1;
    emphasise(call, waveform, own, block, after);
    float *even = call->even + (item * call->count + block) * hop;
    float *odd = call->odd + (item * call->count + block) * hop;
    int64_t n = 0;
    for (; n + EIGHT <= hop; n += EIGHT) {
      const __m256 before = _mm256_permutevar8x32_ps(_mm256_loadu_ps(last - n - (EIGHT - 1)), backwards);
      const __m256 now = _mm256_loadu_ps(after + n);
      _mm256_storeu_ps(even + n, _mm256_add_ps(now, before));
      _mm256_storeu_ps(odd + n, _mm256_sub_ps(now, before));
    }
    for (; n < hop; n++) {
      even[n] = after[n] + last[-n];
      odd[n] = after[n] - last[-n];
    }
  }
}

enum { WAVEFORM, LENGTHS, PREEMPHASIS, COUNT, FRAMES_INPUTS };

static OrtStatus *compute(void *data, OrtKernelContext *context) {
  const Frames *kernel = data;
  const OrtApi *api = kernel->api;
  int64_t shapes[FRAMES_INPUTS][4];
  size_t counts[FRAMES_INPUTS];
  void *values[FRAMES_INPUTS];
  for (size_t i = 0; i < FRAMES_INPUTS; i++) TRY(read_input(api, context, i, shapes[i], &counts[i], &values[i]));
  if (counts[WAVEFORM] != 2 || counts[LENGTHS] != 1 || shapes[LENGTHS][0] != shapes[WAVEFORM][0] ||
      counts[PREEMPHASIS] != 0 || counts[COUNT] != 1 || shapes[COUNT][0] != 1)
    return refuse(api, "frames: not (batch, samples), (batch), a number and (1)");
  FramesCall call = {.waveform = values[WAVEFORM], .lengths = values[LENGTHS], .samples = shapes[WAVEFORM][1]};
  call.preemphasis = *(float *)values[PREEMPHASIS];
  call.count = *(int64_t *)values[COUNT];
  call.hop = kernel->hop;
  if (call.count < 0 || call.count > INT32_MAX) return refuse(api, "frames: too many blocks");
  const int64_t batch = shapes[WAVEFORM][0], shape[3] = {batch, call.count, call.hop};
  TRY(make_output(api, context, 0, shape, 3, (void **)&call.even));
  TRY(make_output(api, context, 1, shape, 3, (void **)&call.odd));
  call.chunks = (call.count + CHUNK - 1) / CHUNK;
  if (batch * call.chunks == 0) return NULL;
  return ORT_CALL(api, parallel_for)(context, run_frames, (size_t)(batch * call.chunks), 0, &call);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  int64_t hop;
  TRY(numbers(api, info, "hop", &hop, 1));
  if (hop < 1 || hop > MAX_HOP) return refuse(api, "frames: no such hop");
  Frames *kernel = malloc(sizeof *kernel);
  if (kernel == NULL) return ORT_CALL(api, create_status)(ORT_FAIL, "out of memory");
  *kernel = (Frames){.api = api, .hop = hop};
  *out = kernel;
  return NULL;
}

static const char *name(const OrtCustomOp *op) { return (void)op, "Frames"; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, FRAMES_INPUTS; }
static size_t output_count(const OrtCustomOp *op) { return (void)op, 2; }
static int type(const OrtCustomOp *op, size_t index) {
  return (void)op, index == WAVEFORM || index == PREEMPHASIS ? ORT_FLOAT : ORT_INT64;
}

const OrtCustomOp frames_operator = {
    FLOAT_OPERATOR,
    .get_name = name,
    .get_input_type = type,
    .get_input_count = input_count,
    .get_output_count = output_count,
    .create_kernel_v2 = create,
    .compute_v2 = compute,
    .destroy = free,
};
