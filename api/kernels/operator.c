#include "operator.h"

#include <math.h>
#include <stdlib.h>

#include "processor.h"

OrtStatus *refuse(const OrtApi *api, const char *problem) {
  return ORT_CALL(api, create_status)(ORT_INVALID_ARGUMENT, problem);
}

OrtStatus *shape_of(const OrtApi *api, const OrtValue *value, int64_t shape[4], size_t *count) {
  OrtShape *info;
  TRY(ORT_CALL(api, tensor_shape)(value, &info));
  OrtStatus *status = ORT_CALL(api, dimension_count)(info, count);
  if (status == NULL && *count <= 4) status = ORT_CALL(api, dimensions)(info, shape, *count);
  ORT_CALL(api, release_shape)(info);
  return status;
}

OrtStatus *read_input(const OrtApi *api, const OrtKernelContext *context, size_t index, int64_t shape[4], size_t *count,
                      void **data) {
  const OrtValue *value;
  TRY(ORT_CALL(api, context_input)(context, index, &value));
  TRY(shape_of(api, value, shape, count));
  return ORT_CALL(api, tensor_data)((OrtValue *)value, data);
}

OrtStatus *read_constant(const OrtApi *api, const OrtKernelInfo *info, size_t index, const char *missing,
                         int64_t shape[4], size_t *count, void **data) {
  int is_constant = 0;
  const OrtValue *value;
  TRY(ORT_CALL(api, info_constant)(info, index, &is_constant, &value));
  if (!is_constant) return refuse(api, missing);
  TRY(shape_of(api, value, shape, count));
  return ORT_CALL(api, tensor_data)((OrtValue *)value, data);
}

OrtStatus *make_output(const OrtApi *api, OrtKernelContext *context, size_t index, const int64_t *shape, size_t count,
                       void **data) {
  OrtValue *value;
  TRY(ORT_CALL(api, context_output)(context, index, shape, count, &value));
  return ORT_CALL(api, tensor_data)(value, data);
}

OrtStatus *numbers(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t *out, size_t count) {
  size_t found = count;
  TRY(ORT_CALL(api, info_int64s)(info, name, out, &found));
  return found == count ? NULL : refuse(api, "an attribute is too short");
}

OrtStatus *read_frames(const OrtApi *api, const OrtKernelInfo *info, int64_t taps, int64_t *pad, int64_t *dilation) {
  int64_t pads[4], shape[2], strides[2], dilations[2];
  TRY(numbers(api, info, "pads", pads, 4));
  TRY(numbers(api, info, "kernel_shape", shape, 2));
  TRY(numbers(api, info, "strides", strides, 2));
  TRY(numbers(api, info, "dilations", dilations, 2));
  if (shape[0] != 1 || shape[1] != taps || strides[0] != 1 || strides[1] != 1 || dilations[1] < 1 ||
      dilations[1] > INT32_MAX || pads[0] != 0 || pads[2] != 0 || pads[1] < 0 || pads[1] > INT32_MAX * taps ||
      pads[3] != (taps - 1) * dilations[1] - pads[1] || pads[3] < 0)
    return refuse(api, "kernel, strides or pads are not supported");
  *pad = pads[1];
  *dilation = dilations[1];
  return NULL;
}

/* The data of an input that is part of the model. */
static OrtStatus *constant(const OrtApi *api, const OrtKernelInfo *info, size_t index, size_t expected, void **data) {
  int64_t shape[4];
  size_t count, elements = 1;
  TRY(read_constant(api, info, index, "a parameter is not constant", shape, &count, data));
  for (size_t i = 0; i < count && count <= 4; i++) elements *= (size_t)shape[i];
  return count > 4 || elements != expected ? refuse(api, "a parameter has not one value per channel") : NULL;
}

int allocate_lanes(Convolution *convolution) {
  const size_t lanes = (size_t)convolution->weights->blocks * LANES;
  convolution->bias = calloc(lanes, sizeof *convolution->bias);
  convolution->scale = calloc(lanes, sizeof *convolution->scale);
  return convolution->bias != NULL && convolution->scale != NULL;
}

void set_channel(Convolution *convolution, int64_t channel, int32_t bias, float scale) {
  const int64_t lane = weights_lane(convolution->weights, channel);
  /* Unsigned, because it may wrap around where the sums of all products would. */
  const uint32_t zeros = (uint32_t)convolution->weights->sums[lane] * (uint32_t)convolution->x_zero;
  convolution->bias[lane] = (int32_t)((uint32_t)bias - zeros);
  convolution->scale[lane] = scale;
}

static OrtStatus *open_convolution(Convolution *convolution, const OrtKernelInfo *info) {
  const OrtApi *api = convolution->api;
  int64_t id;
  TRY(numbers(api, info, "weights", &id, 1));
  convolution->weights = weights_take(id);
  if (convolution->weights == NULL) return refuse(api, "there are no weights of this number");
  const size_t channels = (size_t)convolution->weights->channels;
  float *x_scale, *y_scale, *w_scale;
  uint8_t *x_zero, *y_zero;
  int8_t *w_zero;
  int32_t *bias = NULL;
  TRY(constant(api, info, X_SCALE, 1, (void **)&x_scale));
  TRY(constant(api, info, X_ZERO, 1, (void **)&x_zero));
  TRY(constant(api, info, W_SCALE, channels, (void **)&w_scale));
  TRY(constant(api, info, W_ZERO, channels, (void **)&w_zero));
  TRY(constant(api, info, Y_SCALE, 1, (void **)&y_scale));
  TRY(constant(api, info, Y_ZERO, 1, (void **)&y_zero));
  TRY(ORT_CALL(api, info_input_count)(info, &convolution->inputs));
  if (convolution->inputs > BIAS) {
    const OrtValue *value;
    TRY(ORT_CALL(api, info_constant)(info, BIAS, &convolution->has_bias, &value));
    if (convolution->has_bias) TRY(constant(api, info, BIAS, channels, (void **)&bias));
  }
  convolution->x_zero = *x_zero;
  convolution->y_zero = *y_zero;
  if (!allocate_lanes(convolution)) return ORT_CALL(api, create_status)(ORT_FAIL, "out of memory");
  for (size_t channel = 0; channel < channels; channel++) {
    if (w_zero[channel] != 0) return refuse(api, "weights with a zero point");
    const float scale = *x_scale * w_scale[channel] / *y_scale;
    /* Below one no sum leaves the whole numbers of 32 bits, so that nothing has to be cut before it is rounded. */
    if (!(fabsf(scale) < 1)) return refuse(api, "a scale of one or more");
    set_channel(convolution, (int64_t)channel, bias == NULL ? 0 : bias[channel], scale);
  }
  return NULL;
}

int64_t share_rows(int64_t rows, int64_t most, int64_t group) {
  const int64_t tasks = (rows + most - 1) / most, even = (rows + tasks - 1) / tasks;
  return (even + group - 1) / group * group;
}

void look_ahead(const Convolution *convolution) {
  for (int64_t lane = 0; lane < convolution->weights->blocks * LANES; lane += LANES) {
    __builtin_prefetch(convolution->bias + lane);
    __builtin_prefetch(convolution->scale + lane);
  }
}

OrtStatus *check_bias(const Convolution *convolution, const OrtKernelContext *context) {
  const OrtApi *api = convolution->api;
  const OrtValue *bias = NULL;
  if (convolution->inputs > BIAS) TRY(ORT_CALL(api, context_input)(context, BIAS, &bias));
  return bias != NULL && !convolution->has_bias ? refuse(api, "the bias is not constant") : NULL;
}

void close_convolution(Convolution *convolution) {
  weights_give_back(convolution->weights);
  free(convolution->bias);
  free(convolution->scale);
}

void destroy_kernel(void *kernel) {
  if (kernel == NULL) return;
  close_convolution(kernel);
  free(kernel);
}

OrtStatus *create_kernel(size_t bytes, OrtStatus *(*prepare)(void *kernel, const OrtKernelInfo *info),
                         const OrtApi *api, const OrtKernelInfo *info, void **out) {
  Convolution *convolution = calloc(1, bytes);
  if (convolution == NULL) return ORT_CALL(api, create_status)(ORT_FAIL, "out of memory");
  convolution->api = api;
  OrtStatus *status = open_convolution(convolution, info);
  if (status == NULL) status = prepare(convolution, info);
  if (status != NULL)
    destroy_kernel(convolution);
  else
    *out = convolution;
  return status;
}

const char *on_cpu(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }
size_t one_output(const OrtCustomOp *op) { return (void)op, 1; }
int bytes(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_UINT8; }
int floats(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_FLOAT; }
int required(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_REQUIRED; }
int input_kind(const OrtCustomOp *op, size_t index) { return (void)op, index >= BIAS ? ORT_OPTIONAL : ORT_REQUIRED; }
int default_memory(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, 0; }
int input_type(const OrtCustomOp *op, size_t index) {
  static const int types[INPUTS] = {ORT_UINT8, ORT_FLOAT, ORT_UINT8, ORT_FLOAT, ORT_INT8,
                                    ORT_FLOAT, ORT_UINT8, ORT_INT32, ORT_UINT8};
  return (void)op, types[index];
}

/* Called by ONNX Runtime when the library is given to a session. The domain lives as long as the process. */
EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  static OrtCustomOpDomain *domain = NULL;
  const OrtApi *api = base->get_api(17);
  if (api == NULL) return NULL; /* older than the table that is used here: the session will name the operator */
  if (domain == NULL) {
    OrtCustomOpDomain *fresh;
    TRY(ORT_CALL(api, create_domain)("asr", &fresh));
    const OrtCustomOp *operators[] = {&depthwise_operator, &pointwise_operator, &four_bits_operator,
                                      &frames_operator,    &mel_operator,       &head_input_operator};
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++)
      TRY(ORT_CALL(api, domain_add)(fresh, operators[i]));
    domain = fresh;
  }
  return ORT_CALL(api, add_domain)(options, domain);
}
