/* What both sets of instructions are compared with. */
#include "four_bits.h"

#include "fuzz.h"

/* The largest of a row's set. */
static float largest_of(const float *x, int64_t count) {
  float most = 0;
  for (int64_t k = 0; k < count; k++) most = fmaxf(most, fabsf(x[k]));
  return most;
}

/* One value after another, as the definition says; q (depth) and level (sets of `size`) of the row. */
static float product(const int8_t *q, const float *level, const int8_t *w, const float *scale, float bias,
                     int64_t depth, int64_t size) {
  float total = 0;
  for (int64_t set = 0; set * size < depth; set++) {
    int32_t sum = 0;
    for (int64_t k = set * size; k < depth && k < (set + 1) * size; k++) sum += q[k] * w[k];
    total += level[set] * scale[set] * (float)sum;
  }
  return total + bias;
}

static float any(void) { return (float)(rand() % 20001 - 10000) / 10000; }

static int check_four_bits(FourBitsRows *run, FourBitsRow *run_row) {
  const int64_t depth = rand() % 64 == 0 ? MAX_DEPTH_FOUR_BITS - rand() % 8 : pick(rand() % 4 ? 140 : 700);
  const int64_t channels = pick(depth > 1000 ? 20 : rand() % 8 ? 40 : 500);
  const int64_t rows = rand() % 4 ? pick(rand() % 4 ? 30 : 400) : 1 + rand() % 4;
  const int64_t size = rand() % 2 ? SET : SMALL_SET, sets = (depth + size - 1) / size;
  const int extreme = rand() % 4 == 0; /* all sums as large as they can be */
  float *x = malloc((size_t)(rows * depth) * sizeof *x), *y = malloc((size_t)(rows * channels) * sizeof *y);
  int8_t *w = malloc((size_t)(channels * depth));
  float *scale = malloc((size_t)(channels * sets) * sizeof *scale), *bias = malloc((size_t)channels * sizeof *bias);
  for (int64_t i = 0; i < rows * depth; i++) x[i] = extreme ? (i / depth % 2 ? -0.37f : 0.37f) : any();
  if (rand() % 4 == 0) memset(x, 0, (size_t)depth * sizeof *x);
  for (int64_t i = 0; i < channels * depth; i++) w[i] = (int8_t)(extreme ? (i / depth % 2 ? -8 : 7) : rand() % 16 - 8);
  for (int64_t i = 0; i < channels * sets; i++) scale[i] = any();
  for (int64_t i = 0; i < channels; i++) bias[i] = any();
  const char *kind = size == SET ? "four_bits" : "four_bits_small";
  const int64_t id = asr_keep_weights(kind, w, channels * depth, channels, depth);
  FourBits kernel = {.weights = weights_take(id), .set = size, .sets = sets, .run = run, .run_row = run_row};
  asr_let_go_of_weights(id);
  if (kernel.weights == NULL) return puts("no weights"), 1;
  const size_t lanes = (size_t)kernel.weights->blocks * LANES;
  kernel.scale = calloc(lanes * (size_t)sets, sizeof *kernel.scale);
  kernel.bias = calloc(lanes, sizeof *kernel.bias);
  for (int64_t c = 0; c < channels; c++) {
    kernel.bias[c] = bias[c];
    for (int64_t set = 0; set < sets; set++)
      kernel.scale[(c / LANES * sets + set) * LANES + c % LANES] = scale[c * sets + set];
  }
  FourBitsCall call = {.kernel = &kernel, .x = x, .y = y, .rows = rows};
  const int64_t tasks = four_bits_tasks(&call);
  for (int64_t task = 0; task < tasks; task++) four_bits_task(&call, (size_t)task);
  int wrong = 0;
  int8_t *q = malloc((size_t)depth);
  float *level = malloc((size_t)sets * sizeof *level);
  for (int64_t row = 0; row < rows; row++) {
    float inverse = 0;
    for (int64_t k = 0; k < depth; k++) {
      const float *set = x + row * depth + k / size * size;
      if (k % size == 0) {
        const float most = largest_of(set, depth - k < size ? depth - k : size);
        level[k / size] = most / 127;
        inverse = most == 0 ? 0 : 127 / most;
      }
      q[k] = (int8_t)nearbyintf(set[k % size] * inverse);
    }
    for (int64_t c = 0; c < channels; c++)
      wrong += y[row * channels + c] != product(q, level, w + c * depth, scale + c * sets, bias[c], depth, size);
  }
  if (wrong) printf("%d wrong; channels %d depth %d ", wrong, (int)channels, (int)depth);
  if (wrong) printf("rows %d sets of %d\n", (int)rows, (int)size);
  weights_give_back(kernel.weights);
  free(kernel.scale), free(kernel.bias), free(x), free(y), free(w), free(scale), free(bias), free(q), free(level);
  return wrong != 0;
}
