/* Bytes of a pointwise convolution as the floats that ONNX Runtime's convolution of the head wants to read.
 *
 * x uint8 (batch, 1, frames, channels) -> y float (batch, channels, 1, frames), but in the order of its blocked
 * convolutions (NCHWc): for each 16 channels, frame by frame. y = (x - x_zero) * x_scale.
 *
 * ONNX Runtime does it in three passes: a transpose, the floats, and the blocks.
 */
#include <immintrin.h>
#include <stdlib.h>

#include "operator.h"
#include "processor.h"

typedef struct {
  const uint8_t *x;
  float *y;
  int64_t frames, channels;
  int32_t zero;
  float scale;
} HeadInputCall;

/* Sixty-four channels of an item, a cache line of every frame, or the sixteens that are left. */
VNNI static void run_head_input(void *data, size_t task) {
  const HeadInputCall *call = data;
  const int64_t blocks = call->channels / LANES, groups = (blocks + GROUP - 1) / GROUP;
  const int64_t item = (int64_t)task / groups, first = (int64_t)task % groups * GROUP;
  const int64_t end = first + GROUP < blocks ? first + GROUP : blocks;
  const uint8_t *x = call->x + item * call->frames * call->channels;
  float *y = call->y + item * call->frames * call->channels;
  const __m512i zero = _mm512_set1_epi32(call->zero);
  const __m512 scale = _mm512_set1_ps(call->scale);
  for (int64_t frame = 0; frame < call->frames; frame++)
    for (int64_t block = first; block < end; block++) {
      const __m128i bytes = _mm_loadu_si128((const __m128i *)(x + frame * call->channels + block * LANES));
      const __m512i differences = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), zero);
      const __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(differences), scale);
      _mm512_storeu_ps(y + (block * call->frames + frame) * LANES, values);
    }
}

enum { HEAD_INPUTS = X_ZERO + 1 };

static OrtStatus *compute(void *data, OrtKernelContext *context) {
  const OrtApi *api = data;
  int64_t shapes[HEAD_INPUTS][4];
  size_t counts[HEAD_INPUTS];
  void *values[HEAD_INPUTS];
  for (size_t i = 0; i < HEAD_INPUTS; i++) TRY(read_input(api, context, i, shapes[i], &counts[i], &values[i]));
  if (counts[X] != 4 || shapes[X][1] != 1 || shapes[X][3] % LANES != 0 || counts[X_SCALE] != 0 || counts[X_ZERO] != 0)
    return refuse(api, "head input: x is not (batch, 1, frames, sixteens of channels) with one scale");
  HeadInputCall call = {.x = values[X], .frames = shapes[X][2], .channels = shapes[X][3]};
  call.scale = *(float *)values[X_SCALE];
  call.zero = *(uint8_t *)values[X_ZERO];
  const int64_t shape[4] = {shapes[X][0], call.channels, 1, call.frames};
  TRY(make_output(api, context, 0, shape, 4, (void **)&call.y));
  const int64_t groups = (call.channels / LANES + GROUP - 1) / GROUP, tasks = shape[0] * groups;
  if (tasks == 0 || call.frames == 0) return NULL;
  return ORT_CALL(api, parallel_for)(context, run_head_input, (size_t)tasks, 0, &call);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op, (void)info;
  if (!is_vnni()) return refuse(api, "head input: this processor has no blocks of sixteen");
  *out = (void *)api;
  return NULL;
}

static void destroy(void *kernel) { (void)kernel; }
static const char *name(const OrtCustomOp *op) { return (void)op, "HeadInput"; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, HEAD_INPUTS; }

const OrtCustomOp head_input_operator = {
    FLOAT_OPERATOR,
    .get_name = name,
    .get_input_type = input_type,
    .get_input_count = input_count,
    .get_output_count = one_output,
    .create_kernel_v2 = create,
    .compute_v2 = compute,
    .destroy = destroy,
};
