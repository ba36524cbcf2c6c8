/* What our operators have in common: how they refuse, and what they read of a quantized convolution.
 *
 * The inputs are those of com.microsoft's QLinearConv without the weights, which the attribute `weights` names:
 *   y = clamp(round(scale[c] * (bias[c] + sum_k (x_k - x_zero) * w[c, k])) + y_zero)
 */
#ifndef ASR_OPERATOR_H
#define ASR_OPERATOR_H

#include "onnxruntime_abi.h"
#include "weights.h"

enum { X, X_SCALE, X_ZERO, W_SCALE, W_ZERO, Y_SCALE, Y_ZERO, BIAS, MASK, INPUTS };

/* What every kernel begins with. */
typedef struct {
  const OrtApi *api;
  const Weights *weights;
  int32_t x_zero, y_zero;
  int32_t *bias; /* of each lane, the input's zero point taken in */
  float *scale;  /* of each lane */
  size_t inputs; /* of the node */
  int has_bias;
} Convolution;

#define TRY(expression)                \
  do {                                 \
    OrtStatus *status = (expression);  \
    if (status != NULL) return status; \
  } while (0)

OrtStatus *refuse(const OrtApi *api, const char *problem);
OrtStatus *shape_of(const OrtApi *api, const OrtValue *value, int64_t shape[4], size_t *count);

/* An input that is always there: how many dimensions it has, what they are if they are at most four, and its data. */
OrtStatus *read_input(const OrtApi *api, const OrtKernelContext *context, size_t index, int64_t shape[4], size_t *count,
                      void **data);

/* The same of an input that is part of the model; `missing` is what is said where it is not. */
OrtStatus *read_constant(const OrtApi *api, const OrtKernelInfo *info, size_t index, const char *missing,
                         int64_t shape[4], size_t *count, void **data);

/* Where to write an output of this shape. */
OrtStatus *make_output(const OrtApi *api, OrtKernelContext *context, size_t index, const int64_t *shape, size_t count,
                       void **data);

/* An attribute of exactly `count` whole numbers. */
OrtStatus *numbers(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t *out, size_t count);

/* Refuses all but kernels 1 x taps, stride 1, and pads that leave as many frames as there were. */
OrtStatus *read_frames(const OrtApi *api, const OrtKernelInfo *info, int64_t taps, int64_t *pad, int64_t *dilation);

/* A kernel of `bytes`, whose first member is its convolution: that is opened, then `prepare` does the rest. */
OrtStatus *create_kernel(size_t bytes, OrtStatus *(*prepare)(void *kernel, const OrtKernelInfo *info),
                         const OrtApi *api, const OrtKernelInfo *info, void **out);
void destroy_kernel(void *kernel);

void close_convolution(Convolution *convolution);

/* Rows per task: about as many for each, at most `most`, and whole groups of `group` but for the last. */
int64_t share_rows(int64_t rows, int64_t most, int64_t group);

/* Asks for what each task will need first, which has been pushed out of the caches since the last inference. */
void look_ahead(const Convolution *convolution);

/* A bias that is computed by the graph would be passed over. */
OrtStatus *check_bias(const Convolution *convolution, const OrtKernelContext *context);

/* Memory for bias and scale; 0 if there is none. */
int allocate_lanes(Convolution *convolution);

/* Bias and scale of a channel. */
void set_channel(Convolution *convolution, int64_t channel, int32_t bias, float scale);

extern const OrtCustomOp depthwise_operator, pointwise_operator, four_bits_operator, frames_operator, mel_operator,
    head_input_operator;

/* What the tables have in common. */
const char *on_cpu(const OrtCustomOp *op);
int input_type(const OrtCustomOp *op, size_t index);
int input_kind(const OrtCustomOp *op, size_t index);
int default_memory(const OrtCustomOp *op, size_t index);
size_t one_output(const OrtCustomOp *op);
int bytes(const OrtCustomOp *op, size_t index);
int floats(const OrtCustomOp *op, size_t index);
int required(const OrtCustomOp *op, size_t index);

#define OPERATOR                                                                                 \
  .version = ORT_ABI_VERSION, .get_provider = on_cpu, .get_input_memory = default_memory,        \
  .get_output_kind = required

#define FLOAT_OPERATOR OPERATOR, .get_input_kind = required, .get_output_type = floats

#define CONVOLUTION_OPERATOR                                                                     \
  OPERATOR, .get_input_type = input_type, .get_input_kind = input_kind, .get_output_type = bytes, \
  .get_output_count = one_output, .destroy = destroy_kernel

#endif
