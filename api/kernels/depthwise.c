#include "depthwise.h"

DepthwiseTask depthwise_task(const DepthwiseCall *call, size_t task) {
  const int64_t item = (int64_t)task / call->groups, group = (int64_t)task % call->groups;
  const int64_t channels = call->kernel->channels, left = channels - group * LINE;
  const int64_t start = item * call->frames * channels + group * LINE;
  const int64_t woven = item * (call->frames + WOVEN_MORE) * whole_lines(channels);
  return (DepthwiseTask){
      .x = call->x + start,
      .mask = call->mask == NULL ? NULL : call->mask + item * call->frames,
      .y = call->y + (call->kernel->woven ? woven : start),
      .group = group,
      .width = left < LINE ? left : LINE,
  };
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
  const Depthwise *kernel = data;
  const OrtApi *api = kernel->convolution.api;
  int64_t shape[4];
  size_t count;
  DepthwiseCall call = {.kernel = kernel, .groups = (kernel->channels + LINE - 1) / LINE};
  look_ahead(&kernel->convolution);
  TRY(read_input(api, context, X, shape, &count, (void **)&call.x));
  if (count != 4 || shape[1] != 1 || shape[3] != kernel->channels)
    return refuse(api, "depthwise: x is not (batch, 1, frames, channels)");
  call.frames = shape[2];
  TRY(check_bias(&kernel->convolution, context));
  const OrtValue *mask = NULL;
  if (kernel->convolution.inputs > MASK) TRY(ORT_CALL(api, context_input)(context, MASK, &mask));
  if (mask != NULL) {
    int64_t masked[4];
    TRY(shape_of(api, mask, masked, &count));
    if (count != 4 || masked[0] != shape[0] || masked[1] != 1 || masked[2] != shape[2] || masked[3] != 1)
      return refuse(api, "depthwise: the mask is not (batch, 1, frames, 1)");
    TRY(ORT_CALL(api, tensor_data)((OrtValue *)mask, (void **)&call.mask));
  }
  if (kernel->woven) shape[2] += WOVEN_MORE, shape[3] = whole_lines(shape[3]);
  TRY(make_output(api, context, 0, shape, 4, (void **)&call.y));
  const size_t tasks = (size_t)(shape[0] * call.groups);
  if (tasks == 0 || call.frames == 0) return NULL;
  return ORT_CALL(api, parallel_for)(context, kernel->run, tasks, 0, &call);
}

static OrtStatus *prepare(void *data, const OrtKernelInfo *info) {
  Depthwise *kernel = data;
  const OrtApi *api = kernel->convolution.api;
  const Weights *weights = kernel->convolution.weights;
  if (weights->layout != DEPTHWISE_VNNI && weights->layout != DEPTHWISE_AVX2)
    return refuse(api, "depthwise: the weights are a pointwise convolution's");
  kernel->run = weights->layout == DEPTHWISE_VNNI ? depthwise_vnni : depthwise_avx2;
  kernel->channels = weights->channels;
  kernel->taps = weights->depth;
  TRY(read_frames(api, info, kernel->taps, &kernel->pad, &kernel->dilation));
  TRY(numbers(api, info, "woven", &kernel->woven, 1));
  if (kernel->woven && (kernel->dilation != 1 || weights->layout != DEPTHWISE_VNNI))
    return refuse(api, "depthwise: this one leaves nothing woven");
  return NULL;
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  return create_kernel(sizeof(Depthwise), prepare, api, info, out);
}

static const char *name(const OrtCustomOp *op) { return (void)op, "DepthwiseQLinearConv"; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, INPUTS; }

const OrtCustomOp depthwise_operator = {
    CONVOLUTION_OPERATOR,
    .get_name = name,
    .get_input_count = input_count,
    .create_kernel_v2 = create,
    .compute_v2 = compute,
};
