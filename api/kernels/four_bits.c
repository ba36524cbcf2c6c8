#include "four_bits.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "processor.h"

enum { VALUES, SCALES, OFFSETS, FOUR_BITS_INPUTS };

enum {
  ROOM = 1 << 17, /* bytes of x per task, which stay in the second cache */
  PANELS = 24,    /* blocks of channels per task: x becomes bytes once for all of them */
  FEW = 3,        /* rows that are done one by one */
};

static_assert(ROOM / MAX_DEPTH_FOUR_BITS >= FOUR_BITS_ROWS, "the rows of a group of the deepest");

static int64_t groups_of(const FourBits *kernel) { return (kernel->weights->blocks + PANELS - 1) / PANELS; }

void four_bits_task(void *data, size_t task) {
  const FourBitsCall *call = data;
  const FourBits *kernel = call->kernel;
  const Weights *weights = kernel->weights;
  const int64_t first = (int64_t)task % groups_of(kernel) * PANELS, sets = kernel->sets;
  const int64_t depth = sets * kernel->set;
  const int64_t last = first + PANELS < weights->blocks ? first + PANELS : weights->blocks;
  const int64_t start = (int64_t)task / groups_of(kernel) * call->chunk;
  const int64_t rows = call->rows - start < call->chunk ? call->rows - start : call->chunk;
  int8_t values[ROOM] __attribute__((aligned(64)));
  uint8_t w[MAX_DEPTH_FOUR_BITS * LANES] __attribute__((aligned(64)));
  float levels[ROOM / SMALL_SET];
  int32_t middles[ROOM / SMALL_SET];
  four_bits_bytes(kernel, call->x + start * weights->depth, rows, (Bytes){values, levels, middles});
  for (int64_t block = first; block < last; block++) {
    const uint8_t *packed = weights->packed + block * weights->block_bytes;
    const int64_t width = weights->channels - block * LANES;
    if (rows > FEW) four_bits_unpack(packed, weights->block_bytes, w);
    for (int64_t row = 0, done = 1; row < rows; row += done) {
      const Bytes x = {values + row * depth, levels + row * sets, middles + row * sets};
      float *y = call->y + (start + row) * weights->channels + block * LANES;
      float out[FOUR_BITS_ROWS][LANES];
      float *to = width < LANES ? out[0] : y;
      if (rows > FEW)
        done = kernel->run(kernel, block, w, &x, rows - row, to, width < LANES ? LANES : weights->channels);
      else
        kernel->run_row(kernel, block, packed, &x, to);
      if (width >= LANES) continue;
      for (int64_t i = 0; i < done; i++) memcpy(y + i * weights->channels, out[i], (size_t)width * sizeof *y);
    }
  }
}

int64_t four_bits_tasks(FourBitsCall *call) {
  const FourBits *kernel = call->kernel;
  const int64_t most = ROOM / (kernel->sets * kernel->set) / FOUR_BITS_ROWS * FOUR_BITS_ROWS;
  call->chunk = share_rows(call->rows, most, FOUR_BITS_ROWS);
  return (call->rows + call->chunk - 1) / call->chunk * groups_of(kernel);
}

static void destroy(void *data) {
  FourBits *kernel = data;
  if (kernel == NULL) return;
  weights_give_back(kernel->weights);
  free(kernel->scale);
  free(kernel->bias);
  free(kernel);
}

static OrtStatus *prepare(FourBits *kernel, const OrtKernelInfo *info) {
  const OrtApi *api = kernel->api;
  int64_t id, shape[4];
  size_t count;
  float *scale, *bias = NULL;
  TRY(numbers(api, info, "weights", &id, 1));
  kernel->weights = weights_take(id);
  if (kernel->weights == NULL) return refuse(api, "there are no weights of this number");
  kernel->set = set_of(kernel->weights->layout);
  if (kernel->set == 0) return refuse(api, "four bits: the weights are a convolution's");
  const int64_t channels = kernel->weights->channels, blocks = kernel->weights->blocks;
  kernel->sets = (kernel->weights->depth + kernel->set - 1) / kernel->set;
  TRY(read_constant(api, info, SCALES, "the scales are not constant", shape, &count, (void **)&scale));
  if (count != 2 || shape[0] != channels || shape[1] != kernel->sets)
    return refuse(api, "four bits: the scales are not (channels, sets)");
  size_t inputs;
  TRY(ORT_CALL(api, info_input_count)(info, &inputs));
  if (inputs > OFFSETS) {
    TRY(read_constant(api, info, OFFSETS, "the bias is not constant", shape, &count, (void **)&bias));
    if (count != 1 || shape[0] != channels) return refuse(api, "four bits: the bias is not (channels)");
  }
  kernel->scale = calloc((size_t)(blocks * kernel->sets * LANES), sizeof *kernel->scale);
  kernel->bias = calloc((size_t)(blocks * LANES), sizeof *kernel->bias);
  if (kernel->scale == NULL || kernel->bias == NULL) return ORT_CALL(api, create_status)(ORT_FAIL, "out of memory");
  for (int64_t channel = 0; channel < channels; channel++) {
    const int64_t block = channel / LANES, lane = channel % LANES;
    for (int64_t set = 0; set < kernel->sets; set++)
      kernel->scale[(block * kernel->sets + set) * LANES + lane] = scale[channel * kernel->sets + set];
    if (bias != NULL) kernel->bias[channel] = bias[channel];
  }
  kernel->run = is_vnni() ? four_bits_vnni : four_bits_avx2;
  kernel->run_row = is_vnni() ? four_bits_row_vnni : four_bits_row_avx2;
  return NULL;
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  FourBits *kernel = calloc(1, sizeof *kernel);
  if (kernel == NULL) return ORT_CALL(api, create_status)(ORT_FAIL, "out of memory");
  kernel->api = api;
  OrtStatus *status = prepare(kernel, info);
  if (status != NULL)
    destroy(kernel);
  else
    *out = kernel;
  return status;
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
  const FourBits *kernel = data;
  const OrtApi *api = kernel->api;
  int64_t shape[4];
  size_t count;
  FourBitsCall call = {.kernel = kernel, .rows = 1};
  TRY(read_input(api, context, VALUES, shape, &count, (void **)&call.x));
  if (count < 1 || count > 4 || shape[count - 1] != kernel->weights->depth)
    return refuse(api, "four bits: x is not (..., depth)");
  for (size_t i = 0; i + 1 < count; i++) call.rows *= shape[i];
  shape[count - 1] = kernel->weights->channels;
  TRY(make_output(api, context, 0, shape, count, (void **)&call.y));
  if (call.rows == 0) return NULL;
  return ORT_CALL(api, parallel_for)(context, four_bits_task, (size_t)four_bits_tasks(&call), 0, &call);
}

static const char *name(const OrtCustomOp *op) { return (void)op, "FourBitsProduct"; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, FOUR_BITS_INPUTS; }
static int kind(const OrtCustomOp *op, size_t index) {
  return (void)op, index == OFFSETS ? ORT_OPTIONAL : ORT_REQUIRED;
}

const OrtCustomOp four_bits_operator = {
    OPERATOR,
    .get_name = name,
    .get_input_type = floats,
    .get_input_kind = kind,
    .get_input_count = input_count,
    .get_output_type = floats,
    .get_output_count = one_output,
    .create_kernel_v2 = create,
    .compute_v2 = compute,
    .destroy = destroy,
};
