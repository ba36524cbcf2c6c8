/* Power spectra through mel filters: y = (real * real + imaginary * imaginary) times filters.
 *
 * real, imaginary float (batch, frames, bins), filters float (bins, features), y float (batch, frames, features).
 *
 * A filter has weights for a few neighbouring bins. ONNX Runtime multiplies by all the zeros around them, too, which
 * changes no sum (unless a power is infinite): of each sixteen filters only the bins from their first to their last
 * are gone through here, in the same order, with the same rounding.
 */
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include "operator.h"
#include "processor.h"

enum {
  ROWS = 8,           /* frames of sums in registers */
  CHUNK = 8 * ROWS,   /* frames per task */
  MAX_BINS = 256,     /* of more than that ONNX Runtime adds up the parts one by one. As in ends.py */
  MAX_FEATURES = 256, /* as in ends.py */
};

typedef struct {
  const OrtApi *api;
  int64_t bins, features;
  struct {
    int64_t first, end;
  } bands[MAX_FEATURES / LANES]; /* bins that matter to these filters */
  float *filters; /* (bins, features) */
} Mel;

typedef struct {
  const Mel *kernel;
  const float *real, *imaginary;
  float *y;
  int64_t frames;
} MelCall;

VNNI static void powers(const float *real, const float *imaginary, int64_t bins, float *power) {
  for (int64_t bin = 0; bin < bins; bin += LANES) {
    const __m512 a = _mm512_loadu_ps(real + bin), b = _mm512_loadu_ps(imaginary + bin);
    _mm512_storeu_ps(power + bin, _mm512_add_ps(_mm512_mul_ps(a, a), _mm512_mul_ps(b, b)));
  }
}

VNNI static void run_mel(void *data, size_t task) {
  const MelCall *call = data;
  const Mel *kernel = call->kernel;
  const int64_t start = (int64_t)task * CHUNK, end = start + CHUNK < call->frames ? start + CHUNK : call->frames;
  float power[ROWS][MAX_BINS];
  for (int64_t frame = start; frame < end; frame += ROWS) {
    const int64_t rows = end - frame < ROWS ? end - frame : ROWS;
    for (int64_t row = 0; row < ROWS; row++) {
      const int64_t at = (frame + (row < rows ? row : 0)) * kernel->bins;
      powers(call->real + at, call->imaginary + at, kernel->bins, power[row]);
    }
    for (int64_t lane = 0; lane < kernel->features; lane += LANES) {
      __m512 sums[ROWS];
      UNROLL for (int row = 0; row < ROWS; row++) sums[row] = _mm512_setzero_ps();
      for (int64_t bin = kernel->bands[lane / LANES].first; bin < kernel->bands[lane / LANES].end; bin++) {
        const __m512 weights = _mm512_loadu_ps(kernel->filters + bin * kernel->features + lane);
        UNROLL for (int row = 0; row < ROWS; row++)
          sums[row] = _mm512_fmadd_ps(_mm512_set1_ps(power[row][bin]), weights, sums[row]);
      }
      float *y = call->y + frame * kernel->features + lane;
      UNROLL for (int row = 0; row < ROWS; row++)
        if (row < rows) _mm512_storeu_ps(y + row * kernel->features, sums[row]);
    }
  }
}

static void find_bands(Mel *kernel) {
  for (int64_t lane = 0; lane < kernel->features; lane += LANES) {
    int64_t first = kernel->bins, end = 0;
    for (int64_t bin = 0; bin < kernel->bins; bin++)
      for (int64_t i = lane; i < lane + LANES; i++)
        if (kernel->filters[bin * kernel->features + i] != 0) first = bin < first ? bin : first, end = bin + 1;
    kernel->bands[lane / LANES].first = first;
    kernel->bands[lane / LANES].end = end;
  }
}

enum { REAL, IMAGINARY, FILTERS, MEL_INPUTS };

static OrtStatus *compute(void *data, OrtKernelContext *context) {
  const Mel *kernel = data;
  const OrtApi *api = kernel->api;
  int64_t shapes[FILTERS][4];
  void *values[FILTERS];
  for (size_t i = 0; i < FILTERS; i++) {
    size_t count;
    TRY(read_input(api, context, i, shapes[i], &count, &values[i]));
    if (count != 3 || shapes[i][2] != kernel->bins) return refuse(api, "mel: not (batch, frames, bins)");
  }
  const int64_t shape[3] = {shapes[REAL][0], shapes[REAL][1], kernel->features};
  if (shapes[IMAGINARY][0] != shape[0] || shapes[IMAGINARY][1] != shape[1])
    return refuse(api, "mel: real and imaginary parts of different shapes");
  MelCall call = {.kernel = kernel, .real = values[REAL], .imaginary = values[IMAGINARY]};
  TRY(make_output(api, context, 0, shape, 3, (void **)&call.y));
  call.frames = shape[0] * shape[1];
  if (call.frames == 0) return NULL;
  return ORT_CALL(api, parallel_for)(context, run_mel, (size_t)((call.frames + CHUNK - 1) / CHUNK), 0, &call);
}

static void destroy(void *kernel) {
  free(((Mel *)kernel)->filters);
  free(kernel);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  int64_t shape[4];
  size_t count;
  void *values;
  if (!is_vnni()) return refuse(api, "mel: not for this processor");
  TRY(read_constant(api, info, FILTERS, "mel: the filters are not constant", shape, &count, &values));
  if (count != 2 || shape[0] < 1 || shape[0] > MAX_BINS || shape[0] % LANES != 0 || shape[1] < 1 ||
      shape[1] > MAX_FEATURES || shape[1] % LANES != 0)
    return refuse(api, "mel: the filters are not sixteens of bins by sixteens of features");
  const size_t bytes = (size_t)(shape[0] * shape[1]) * sizeof(float);
  Mel *kernel = calloc(1, sizeof *kernel);
  if (kernel != NULL) kernel->filters = malloc(bytes);
  if (kernel == NULL || kernel->filters == NULL) {
    free(kernel);
    return ORT_CALL(api, create_status)(ORT_FAIL, "out of memory");
  }
  kernel->api = api;
  kernel->bins = shape[0];
  kernel->features = shape[1];
  memcpy(kernel->filters, values, bytes);
  find_bands(kernel);
  *out = kernel;
  return NULL;
}

static const char *name(const OrtCustomOp *op) { return (void)op, "Mel"; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, MEL_INPUTS; }

const OrtCustomOp mel_operator = {
    FLOAT_OPERATOR,
    .get_name = name,
    .get_input_type = floats,
    .get_input_count = input_count,
    .get_output_count = one_output,
    .create_kernel_v2 = create,
    .compute_v2 = compute,
    .destroy = destroy,
};
