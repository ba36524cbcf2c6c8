/* Depthwise INT8 convolution over time, as an operator for ONNX Runtime: com.microsoft's QLinearConv with one
 * channel per group, channels last, stride 1. The same bits as ONNX Runtime's own kernel.
 *
 * x uint8 (batch, 1, frames, channels), w int8 (channels, 1, 1, taps), y like x:
 *   y[t, c] = clamp(round(scale[c] * (bias[c] + sum_k (x[t + k * dilation - pad, c] - x_zero) * w[c, k])) + y_zero)
 * With a mask, uint8 (batch, 1, frames, 1), x is min(x, mask).
 *
 * ONNX Runtime multiplies one tap at a time. The instructions for bytes add neighbouring products, so here
 * the rows of a few frames are woven together (for each channel the bytes of four frames side by side), once
 * for 16 channels and a tile of frames. Each output is then a chain of loads that are multiplied and added,
 * and frames four apart share their woven rows.
 */
#include <cpuid.h>
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include "onnxruntime_abi.h"

#define EXPORTED __attribute__((visibility("default")))

#define LANES 16                   /* channels that are worked on together, a block */
#define GROUP 4                    /* blocks per task: one cache line of every frame */
#define LINE (GROUP * LANES)
#define TILE 256                   /* frames that are woven at once: the rows stay in the first cache */
#define MAX_TAPS 128
#define ROWS (TILE + MAX_TAPS + 4) /* what a tile reads, and a last load beyond */

/* Each step loads what the one before has loaded one place further. GCC would keep it all in registers, for
 * which there are not enough; so it must not know. */
#define FORGET(pointer) __asm__("" : "+r"(pointer))

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

enum { X, X_SCALE, X_ZERO, W, W_SCALE, W_ZERO, Y_SCALE, Y_ZERO, BIAS, MASK, INPUTS };

typedef struct Kernel Kernel;

struct Kernel {
  const OrtApi *api;
  void (*tile)(const Kernel *, const uint8_t *rows, int64_t block, int64_t count, uint8_t *out);
  int64_t channels, blocks, taps, pad, dilation;
  int32_t x_zero, y_zero;
  size_t inputs;
  int has_bias;
  uint8_t *weights; /* of each block, woven as `tile` wants them: 64 bytes per QUAD or PAIR of taps */
  int64_t block_bytes;
  int32_t *bias;    /* (blocks, LANES), the input's zero point taken in */
  float *scale;     /* (blocks, LANES) */
};

/* Outputs are computed in groups; those behind the last are thrown away. */
static int64_t rounded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

/* --- the arithmetic: `count` outputs of one block from its rows (uint8 (ROWS, LANES)) ------------------- */

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define INLINE __attribute__((always_inline)) static inline

enum { QUAD = 4, WIDE = 16, NARROW = 4 };

/* `width` outputs, four frames apart, from their woven rows. `width` is a constant wherever this is inlined. */
VNNI INLINE void run_vnni(const Kernel *kernel, int64_t block, const __m512i *woven, int width, uint8_t *out) {
  const int64_t quads = (kernel->taps + QUAD - 1) / QUAD;
  const __m512i *weights = (const __m512i *)(kernel->weights + block * kernel->block_bytes);
  const __m512i bias = _mm512_loadu_si512(kernel->bias + block * LANES);
  __m512i sums[WIDE];
  UNROLL for (int i = 0; i < width; i++) sums[i] = bias;
  for (int64_t quad = 0; quad < quads; quad++) {
    const __m512i weight = _mm512_loadu_si512(weights + quad);
    const __m512i *from = woven + quad;
    FORGET(from);
    /* With the intrinsic GCC copies every sum from register to register. */
    UNROLL for (int i = 0; i < width; i++)
      __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[i]) : "v"(from[i]), "v"(weight));
  }
  const __m512 scale = _mm512_loadu_ps(kernel->scale + block * LANES);
  const __m512 least = _mm512_set1_ps((float)-kernel->y_zero), most = _mm512_set1_ps((float)(255 - kernel->y_zero));
  const __m512i zero = _mm512_set1_epi32(kernel->y_zero);
  UNROLL for (int i = 0; i < width; i++) {
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i]), scale);
    value = _mm512_min_ps(_mm512_max_ps(value, least), most);
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(value), zero);
    _mm_storeu_si128((__m128i *)(out + i * QUAD * LINE), _mm512_cvtepi32_epi8(whole));
  }
}

/* 64 bytes hold four frames of 16 channels; woven they hold 16 channels of four frames. */
VNNI static void tile_vnni(const Kernel *kernel, const uint8_t *rows, int64_t block, int64_t count, uint8_t *out) {
  const int64_t outputs = rounded(count) / QUAD, wovens = outputs + (kernel->taps + QUAD - 1) / QUAD - 1;
  const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i woven[QUAD][(TILE + MAX_TAPS) / QUAD];
  for (int64_t row = 0; row < wovens * QUAD; row++) {
    const __m512i four = _mm512_permutexvar_epi32(quarters, _mm512_loadu_si512(rows + row * LANES));
    woven[row % QUAD][row / QUAD] = _mm512_shuffle_epi8(four, bytes);
  }
  for (int phase = 0; phase < QUAD; phase++) {
    int64_t at = 0;
    for (; at + WIDE <= outputs; at += WIDE)
      run_vnni(kernel, block, woven[phase] + at, WIDE, out + (at * QUAD + phase) * LINE);
    for (; at < outputs; at += NARROW)
      run_vnni(kernel, block, woven[phase] + at, NARROW, out + (at * QUAD + phase) * LINE);
  }
}

/* Without VNNI bytes widen to 16 bits, and pairs of frames are multiplied and added, 8 channels at a time. */
#define AVX2 __attribute__((target("avx2")))

enum { PAIR = 2, HALF = 8, SHORT = 8 };

/* SHORT outputs, two frames apart, of half a block. */
AVX2 INLINE void run_avx2(const Kernel *kernel, int64_t block, int half, const __m256i *woven, uint8_t *out) {
  const int64_t pairs = (kernel->taps + PAIR - 1) / PAIR;
  const __m256i *weights = (const __m256i *)(kernel->weights + block * kernel->block_bytes) + half;
  const __m256i bias = _mm256_loadu_si256((const __m256i *)(kernel->bias + block * LANES + half * HALF));
  __m256i sums[SHORT];
  UNROLL for (int i = 0; i < SHORT; i++) sums[i] = bias;
  for (int64_t pair = 0; pair < pairs; pair++) {
    const __m256i weight = _mm256_loadu_si256(weights + pair * (LANES / HALF));
    const __m256i *from = woven + pair;
    FORGET(from);
    UNROLL for (int i = 0; i < SHORT; i++) sums[i] =
        _mm256_add_epi32(sums[i], _mm256_madd_epi16(from[i], weight));
  }
  const __m256 scale = _mm256_loadu_ps(kernel->scale + block * LANES + half * HALF);
  const __m256 least = _mm256_set1_ps((float)-kernel->y_zero), most = _mm256_set1_ps((float)(255 - kernel->y_zero));
  const __m256i zero = _mm256_set1_epi32(kernel->y_zero);
  UNROLL for (int i = 0; i < SHORT; i++) {
    __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i]), scale);
    value = _mm256_min_ps(_mm256_max_ps(value, least), most);
    const __m256i whole = _mm256_add_epi32(_mm256_cvtps_epi32(value), zero);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i *)(out + i * PAIR * LINE), _mm_packus_epi16(words, words));
  }
}

AVX2 static void tile_avx2(const Kernel *kernel, const uint8_t *rows, int64_t block, int64_t count, uint8_t *out) {
  const int64_t outputs = rounded(count) / PAIR, wovens = outputs + (kernel->taps + PAIR - 1) / PAIR - 1;
  __m256i woven[LANES / HALF][PAIR][(TILE + MAX_TAPS) / PAIR];
  for (int64_t row = 0; row < wovens * PAIR; row++) {
    const __m128i first = _mm_loadu_si128((const __m128i *)(rows + row * LANES));
    const __m128i second = _mm_loadu_si128((const __m128i *)(rows + (row + 1) * LANES));
    woven[0][row % PAIR][row / PAIR] = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(first, second));
    woven[1][row % PAIR][row / PAIR] = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(first, second));
  }
  for (int half = 0; half < LANES / HALF; half++)
    for (int phase = 0; phase < PAIR; phase++)
      for (int64_t at = 0; at < outputs; at += SHORT)
        run_avx2(kernel, block, half, woven[half][phase] + at, out + (at * PAIR + phase) * LINE + half * HALF);
}

/* --- one call ------------------------------------------------------------------------------------------- */

typedef struct {
  const Kernel *kernel;
  const uint8_t *x, *mask;
  uint8_t *y;
  int64_t frames, groups;
} Call;

/* `count` frames of a group's channels, `dilation` apart, from `first` on; `x_zero` outside of the clip. */
static void gather(const Call *call, const uint8_t *x, const uint8_t *mask, int64_t width, int64_t first,
                   int64_t count, uint8_t rows[GROUP][ROWS][LANES]) {
  const Kernel *kernel = call->kernel;
  for (int64_t row = 0; row < count; row++) {
    const int64_t frame = first + row * kernel->dilation;
    const int inside = frame >= 0 && frame < call->frames;
    const __m128i most = _mm_set1_epi8(inside && mask != NULL ? (char)mask[frame] : (char)255);
    uint8_t line[LINE];
    const uint8_t *from = line;
    if (!inside)
      memset(line, kernel->x_zero, LINE);
    else if (width == LINE)
      from = x + frame * kernel->channels;
    else
      memcpy(line, x + frame * kernel->channels, (size_t)width);
    for (int block = 0; block < GROUP; block++) {
      const __m128i bytes = _mm_loadu_si128((const __m128i *)(from + block * LANES));
      _mm_storeu_si128((__m128i *)rows[block][row], _mm_min_epu8(bytes, most));
    }
  }
}

/* Frames that are `dilation` apart are a convolution of their own. */
static void run_group(void *data, size_t index) {
  const Call *call = data;
  const Kernel *kernel = call->kernel;
  const int64_t item = (int64_t)index / call->groups, group = (int64_t)index % call->groups;
  const int64_t channel = group * LINE, dilation = kernel->dilation;
  const int64_t width = kernel->channels - channel < LINE ? kernel->channels - channel : LINE;
  const int64_t clip = item * call->frames * kernel->channels + channel;
  const uint8_t *mask = call->mask == NULL ? NULL : call->mask + item * call->frames;
  uint8_t rows[GROUP][ROWS][LANES], out[TILE][LINE];
  for (int64_t start = 0; start < call->frames; start += TILE * dilation) {
    for (int64_t first = start; first < start + dilation && first < call->frames; first++) {
      const int64_t left = (call->frames - first + dilation - 1) / dilation, count = left < TILE ? left : TILE;
      const int64_t needed = rounded(count) + kernel->taps - 1;
      gather(call, call->x + clip, mask, width, first - kernel->pad, needed, rows);
      for (int64_t block = 0; block * LANES < width; block++)
        kernel->tile(kernel, rows[block][0], group * GROUP + block, count, out[0] + block * LANES);
      uint8_t *y = call->y + clip + first * kernel->channels;
      for (int64_t row = 0; row < count; row++)
        memcpy(y + row * dilation * kernel->channels, out[row], width == LINE ? LINE : (size_t)width);
    }
  }
}

#define TRY(expression)                    \
  do {                                     \
    OrtStatus *status = (expression);      \
    if (status != NULL) return status;     \
  } while (0)

static OrtStatus *refuse(const OrtApi *api, const char *problem) {
  return ORT_CALL(api, create_status)(ORT_INVALID_ARGUMENT, problem);
}

static OrtStatus *shape_of(const OrtApi *api, const OrtValue *value, int64_t shape[4], size_t *count) {
  OrtShape *info;
  TRY(ORT_CALL(api, tensor_shape)(value, &info));
  OrtStatus *status = ORT_CALL(api, dimension_count)(info, count);
  if (status == NULL && *count <= 4) status = ORT_CALL(api, dimensions)(info, shape, *count);
  ORT_CALL(api, release_shape)(info);
  return status;
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
  const Kernel *kernel = data;
  const OrtApi *api = kernel->api;
  const OrtValue *x;
  OrtValue *y;
  int64_t shape[4];
  size_t count;
  Call call = {.kernel = kernel, .groups = (kernel->blocks + GROUP - 1) / GROUP};
  TRY(ORT_CALL(api, context_input)(context, X, &x));
  TRY(shape_of(api, x, shape, &count));
  if (count != 4 || shape[1] != 1 || shape[3] != kernel->channels)
    return refuse(api, "depthwise: x is not (batch, 1, frames, channels)");
  call.frames = shape[2];
  const OrtValue *bias = NULL, *mask = NULL;
  if (kernel->inputs > BIAS) TRY(ORT_CALL(api, context_input)(context, BIAS, &bias));
  if (kernel->inputs > MASK) TRY(ORT_CALL(api, context_input)(context, MASK, &mask));
  if (bias != NULL && !kernel->has_bias)
    return refuse(api, "depthwise: the bias is not constant");
  if (mask != NULL) {
    int64_t masked[4];
    TRY(shape_of(api, mask, masked, &count));
    if (count != 4 || masked[0] != shape[0] || masked[1] != 1 || masked[2] != shape[2] || masked[3] != 1)
      return refuse(api, "depthwise: the mask is not (batch, 1, frames, 1)");
    TRY(ORT_CALL(api, tensor_data)((OrtValue *)mask, (void **)&call.mask));
  }
  TRY(ORT_CALL(api, context_output)(context, 0, shape, 4, &y));
  TRY(ORT_CALL(api, tensor_data)((OrtValue *)x, (void **)&call.x));
  TRY(ORT_CALL(api, tensor_data)(y, (void **)&call.y));
  const size_t tasks = (size_t)(shape[0] * call.groups);
  if (tasks == 0 || call.frames == 0) return NULL;
  return ORT_CALL(api, parallel_for)(context, run_group, tasks, 0, &call);
}

/* --- what ONNX Runtime asks ----------------------------------------------------------------------------- */

static void destroy(void *data) {
  Kernel *kernel = data;
  if (kernel == NULL) return;
  free(kernel->weights);
  free(kernel->bias);
  free(kernel->scale);
  free(kernel);
}

/* The data of an input that is part of the model. */
static OrtStatus *constant(const OrtApi *api, const OrtKernelInfo *info, size_t index, size_t expected, void **data) {
  int is_constant = 0;
  const OrtValue *value;
  int64_t shape[4];
  size_t count, elements = 1;
  TRY(ORT_CALL(api, info_constant)(info, index, &is_constant, &value));
  if (!is_constant) return refuse(api, "depthwise: a parameter is not constant");
  TRY(shape_of(api, value, shape, &count));
  for (size_t i = 0; i < count && count <= 4; i++) elements *= (size_t)shape[i];
  if (count > 4 || elements != expected)
    return refuse(api, "depthwise: a parameter has not one value per channel");
  return ORT_CALL(api, tensor_data)((OrtValue *)value, data);
}

static int avx2_only = 0;

/* By hand, because __builtin_cpu_supports always says no in what zig links (compiler_rt of zig 0.17). */
static int has(unsigned saved, unsigned wanted_ebx, unsigned wanted_ecx) {
  unsigned eax, ebx, ecx, edx;
  /* XCR0: the registers that the operating system saves, without which the instructions must not be used. */
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return 0;
  __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  if ((eax & saved) != saved || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
  return (ebx & wanted_ebx) == wanted_ebx && (ecx & wanted_ecx) == wanted_ecx;
}

enum { SAVES_YMM = 0x06, SAVES_ZMM = 0xe6 };

static int is_avx2(void) { return has(SAVES_YMM, bit_AVX2, 0); }

static int is_vnni(void) {
  return has(SAVES_ZMM, bit_AVX2 | bit_AVX512F | bit_AVX512BW | bit_AVX512VL, bit_AVX512VNNI);
}

static int allocate(Kernel *kernel) {
  const size_t lanes = (size_t)kernel->blocks * LANES;
  const int64_t together = kernel->tile == tile_vnni ? QUAD : PAIR;
  kernel->block_bytes = (kernel->taps + together - 1) / together * 64;
  kernel->weights = calloc((size_t)kernel->blocks, (size_t)kernel->block_bytes);
  kernel->bias = calloc(lanes, sizeof *kernel->bias);
  kernel->scale = calloc(lanes, sizeof *kernel->scale);
  return kernel->weights != NULL && kernel->bias != NULL && kernel->scale != NULL;
}

/* w (channels, taps), bias (channels) or NULL. */
static void pack(Kernel *kernel, const int8_t *w, const int32_t *bias) {
  const size_t taps = (size_t)kernel->taps;
  for (size_t channel = 0; channel < (size_t)kernel->channels; channel++) {
    uint8_t *block = kernel->weights + channel / LANES * (size_t)kernel->block_bytes;
    const size_t lane = channel % LANES;
    int32_t sum = 0;
    for (size_t tap = 0; tap < taps; tap++) {
      const int8_t weight = w[channel * taps + tap];
      sum += weight;
      if (kernel->tile == tile_vnni)
        ((int8_t *)block)[(tap / 4 * LANES + lane) * 4 + tap % 4] = weight;
      else
        ((int16_t *)block)[(tap / 2 * LANES + lane) * 2 + tap % 2] = weight;
    }
    /* Unsigned, because it may wrap around where the sums of all products would. */
    const uint32_t own = bias == NULL ? 0 : (uint32_t)bias[channel];
    kernel->bias[channel] = (int32_t)(own - (uint32_t)(sum * kernel->x_zero));
  }
}

/* An attribute of exactly `count` whole numbers. */
static OrtStatus *numbers(const OrtApi *api, const OrtKernelInfo *info, const char *name, int64_t *out, size_t count) {
  size_t found = count;
  TRY(ORT_CALL(api, info_int64s)(info, name, out, &found));
  return found == count ? NULL : refuse(api, "depthwise: an attribute is too short");
}

static OrtStatus *prepare(Kernel *kernel, const OrtKernelInfo *info) {
  const OrtApi *api = kernel->api;
  int64_t pads[4], taps[2], strides[2], dilations[2];
  TRY(numbers(api, info, "pads", pads, 4));
  TRY(numbers(api, info, "kernel_shape", taps, 2));
  TRY(numbers(api, info, "strides", strides, 2));
  TRY(numbers(api, info, "dilations", dilations, 2));
  kernel->taps = taps[1];
  kernel->pad = pads[1];
  kernel->dilation = dilations[1];
  if (taps[0] != 1 || taps[1] < 1 || taps[1] > MAX_TAPS || strides[0] != 1 || strides[1] != 1 ||
      dilations[1] < 1 || dilations[1] > INT32_MAX || pads[0] != 0 || pads[2] != 0 || pads[1] < 0 ||
      pads[3] < 0 || pads[1] + pads[3] != (taps[1] - 1) * dilations[1])
    return refuse(api, "depthwise: kernel, strides or pads are not supported");
  const OrtValue *weights;
  int is_constant = 0;
  int64_t shape[4];
  size_t count;
  TRY(ORT_CALL(api, info_constant)(info, W, &is_constant, &weights));
  if (!is_constant) return refuse(api, "depthwise: w is not constant");
  TRY(shape_of(api, weights, shape, &count));
  if (count != 4 || shape[1] != 1 || shape[2] != 1 || shape[3] != kernel->taps)
    return refuse(api, "depthwise: w is not (channels, 1, 1, taps)");
  kernel->channels = shape[0];
  kernel->blocks = (kernel->channels + LANES - 1) / LANES;
  const size_t channels = (size_t)kernel->channels;
  float *x_scale, *y_scale, *w_scale;
  uint8_t *x_zero, *y_zero;
  int8_t *w, *w_zero;
  int32_t *bias = NULL;
  TRY(constant(api, info, X_SCALE, 1, (void **)&x_scale));
  TRY(constant(api, info, X_ZERO, 1, (void **)&x_zero));
  TRY(ORT_CALL(api, tensor_data)((OrtValue *)weights, (void **)&w));
  TRY(constant(api, info, W_SCALE, channels, (void **)&w_scale));
  TRY(constant(api, info, W_ZERO, channels, (void **)&w_zero));
  TRY(constant(api, info, Y_SCALE, 1, (void **)&y_scale));
  TRY(constant(api, info, Y_ZERO, 1, (void **)&y_zero));
  TRY(ORT_CALL(api, info_input_count)(info, &kernel->inputs));
  if (kernel->inputs > BIAS) {
    const OrtValue *value;
    TRY(ORT_CALL(api, info_constant)(info, BIAS, &kernel->has_bias, &value));
    if (kernel->has_bias) TRY(constant(api, info, BIAS, channels, (void **)&bias));
  }
  kernel->x_zero = *x_zero;
  kernel->y_zero = *y_zero;
  if (!allocate(kernel)) return ORT_CALL(api, create_status)(ORT_FAIL, "depthwise: out of memory");
  for (size_t channel = 0; channel < channels; channel++) {
    if (w_zero[channel] != 0)
      return refuse(api, "depthwise: weights with a zero point");
    kernel->scale[channel] = *x_scale * w_scale[channel] / *y_scale;
  }
  pack(kernel, w, bias);
  return NULL;
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  Kernel *kernel = calloc(1, sizeof *kernel);
  if (kernel == NULL) return ORT_CALL(api, create_status)(ORT_FAIL, "depthwise: out of memory");
  kernel->api = api;
  kernel->tile = is_vnni() && !avx2_only ? tile_vnni : tile_avx2;
  OrtStatus *status = prepare(kernel, info);
  if (status != NULL)
    destroy(kernel);
  else
    *out = kernel;
  return status;
}

static const char *name(const OrtCustomOp *op) { return (void)op, "DepthwiseQLinearConv"; }
static const char *provider(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, INPUTS; }
static size_t output_count(const OrtCustomOp *op) { return (void)op, 1; }
static int output_type(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_UINT8; }
static int required(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_REQUIRED; }
static int input_kind(const OrtCustomOp *op, size_t index) { return (void)op, index >= BIAS ? ORT_OPTIONAL : ORT_REQUIRED; }
static int default_memory(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, 0; }
static int input_type(const OrtCustomOp *op, size_t index) {
  static const int types[INPUTS] = {ORT_UINT8, ORT_FLOAT, ORT_UINT8, ORT_INT8, ORT_FLOAT,
                                    ORT_INT8,  ORT_FLOAT, ORT_UINT8, ORT_INT32, ORT_UINT8};
  return (void)op, types[index];
}

static const OrtCustomOp depthwise = {
    .version = ORT_ABI_VERSION,
    .get_name = name,
    .get_provider = provider,
    .get_input_type = input_type,
    .get_input_count = input_count,
    .get_output_type = output_type,
    .get_output_count = output_count,
    .destroy = destroy,
    .get_input_kind = input_kind,
    .get_output_kind = required,
    .get_input_memory = default_memory,
    .create_kernel_v2 = create,
    .compute_v2 = compute,
};

/* What the operator runs on: "vnni", "avx2", or "" on processors where it would not run. */
EXPORTED const char *asr_instructions(void) {
  if (is_vnni() && !avx2_only) return "vnni";
  return is_avx2() ? "avx2" : "";
}

/* For tests and benchmarks: sessions that open from now on do not use VNNI. */
EXPORTED void asr_avx2_only(int value) { avx2_only = value; }

/* Called by ONNX Runtime when the library is given to a session. The domain lives as long as the process. */
EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  static OrtCustomOpDomain *domain = NULL;
  const OrtApi *api = base->get_api(17);
  if (api == NULL) return NULL; /* older than the table that is used here: the session will name the operator */
  if (domain == NULL) {
    OrtCustomOpDomain *fresh;
    TRY(ORT_CALL(api, create_domain)("asr", &fresh));
    TRY(ORT_CALL(api, domain_add)(fresh, &depthwise));
    domain = fresh;
  }
  return ORT_CALL(api, add_domain)(options, domain);
}
