#include "pointwise.h"

static OrtStatus *compute(void *data, OrtKernelContext *context) {
  const Pointwise *kernel = data;
  const OrtApi *api = kernel->convolution.api;
  int64_t shape[4];
  size_t count;
  PointwiseCall call = {.kernel = kernel};
  look_ahead(&kernel->convolution);
  TRY(read_input(api, context, X, shape, &count, (void **)&call.x));
  if (count < 1 || count > 4 || shape[count - 1] != kernel->depth)
    return refuse(api, "pointwise: x is not (..., frames, depth)");
  int64_t items = 1;
  if (kernel->woven) {
    if (count != 4 || shape[1] != 1 || shape[2] < WOVEN_MORE)
      return refuse(api, "pointwise: x is not (batch, 1, frames, depth)");
    items = shape[0];
    call.item_bytes = shape[2] * kernel->depth;
    call.rows = shape[2] -= WOVEN_MORE;
  } else {
    call.rows = 1;
    for (size_t i = 0; i + 1 < count; i++) call.rows *= shape[i];
  }
  TRY(check_bias(&kernel->convolution, context));
  shape[count - 1] = kernel->channels;
  TRY(make_output(api, context, 0, shape, count, (void **)&call.y));
  if (call.rows == 0 || items == 0) return NULL;
  return ORT_CALL(api, parallel_for)(context, kernel->run, (size_t)kernel->share_out(&call, items), 0, &call);
}

static OrtStatus *prepare(void *data, const OrtKernelInfo *info) {
  Pointwise *kernel = data;
  const OrtApi *api = kernel->convolution.api;
  const Weights *weights = kernel->convolution.weights;
  kernel->woven = weights->layout == POINTWISE_WOVEN;
  if (weights->layout != POINTWISE_VNNI && weights->layout != POINTWISE_AVX2 && !kernel->woven)
    return refuse(api, "pointwise: the weights are a depthwise convolution's");
  const int avx2 = weights->layout == POINTWISE_AVX2;
  kernel->share_out = avx2 ? pointwise_avx2_tasks : pointwise_vnni_tasks;
  kernel->run = avx2 ? pointwise_avx2 : pointwise_vnni;
  kernel->depth = kernel->woven ? whole_lines(weights->depth) : weights->depth;
  kernel->channels = weights->channels;
  int64_t pad, dilation;
  return read_frames(api, info, 1, &pad, &dilation);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  return create_kernel(sizeof(Pointwise), prepare, api, info, out);
}

static const char *name(const OrtCustomOp *op) { return (void)op, "PointwiseQLinearConv"; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, MASK; }

const OrtCustomOp pointwise_operator = {
    CONVOLUTION_OPERATOR,
    .get_name = name,
    .get_input_count = input_count,
    .create_kernel_v2 = create,
    .compute_v2 = compute,
};
