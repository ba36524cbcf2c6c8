/* Many weights at once, kept, taken and let go of in any order and by two threads; sizes that lie. */
#include "../../api/kernels/weights.c"

#include "fuzz.h"

enum { KEPT = 40 };

static int same(const Weights *weights, const int8_t *w) {
  for (int64_t channel = 0; channel < weights->channels; channel++) {
    int32_t sum = 0;
    for (int64_t i = 0; i < weights->depth; i++) sum += w[channel * weights->depth + i];
    if (weights->sums[weights_lane(weights, channel)] != sum) return 0;
  }
  /* However they are packed: each byte value is there as often, but for zeros. */
  int64_t counts[256] = {0};
  const int64_t wide = weights->layout == DEPTHWISE_AVX2 ? 2 : 1;
  const int four_bits = set_of(weights->layout) > 0, added = four_bits ? MIDDLE : 0;
  for (int64_t i = 0; i < weights->channels * weights->depth; i++) counts[(uint8_t)(w[i] + added)]++;
  for (int64_t i = 0; i < weights->blocks * weights->block_bytes; i += wide) {
    const uint8_t byte = weights->packed[i];
    if (four_bits)
      counts[byte & 15]--, counts[byte >> 4]--;
    else
      counts[byte]--;
  }
  for (int i = 1; i < 256; i++)
    if (counts[i] != 0) return 0;
  return (uintptr_t)weights->packed % LINE_BYTES == 0;
}

static void *keep_some(void *data) {
  unsigned seed = *(unsigned *)data;
  int64_t ids[KEPT] = {0};
  int8_t *given[KEPT] = {NULL};
  const Weights *taken[KEPT] = {NULL};
  for (int step = 0; step < 100; step++) {
    const int at = rand_r(&seed) % KEPT;
    if (ids[at] == 0) {
      const int depthwise = rand_r(&seed) % 3 == 0, four_bits = !depthwise && rand_r(&seed) % 3 == 0;
      const int64_t channels = 1 + rand_r(&seed) % 100;
      const int most = depthwise ? MAX_TAPS : rand_r(&seed) % 50 ? 300 : is_vnni() && !four_bits ? 60000 : MAX_DEPTH_AVX2;
      const int64_t depth = 1 + rand_r(&seed) % most;
      given[at] = malloc((size_t)(channels * depth));
      for (int64_t i = 0; i < channels * depth; i++)
        given[at][i] = (int8_t)(four_bits ? rand_r(&seed) % 16 - 8 : rand_r(&seed));
      const char *kind = depthwise                             ? "depthwise"
                         : four_bits                           ? rand_r(&seed) % 2 ? "four_bits" : "four_bits_small"
                         : !is_vnni() || rand_r(&seed) % 2 ? "pointwise"
                                                               : "woven";
      ids[at] = asr_keep_weights(kind, given[at], channels * depth, channels, depth);
      taken[at] = weights_take(ids[at]);
      if (ids[at] == 0 || taken[at] == NULL) return "not kept";
      asr_let_go_of_weights(ids[at]);
    } else {
      if (!same(taken[at], given[at])) return "other weights";
      weights_give_back(taken[at]);
      free(given[at]), given[at] = NULL;
      ids[at] = 0;
    }
  }
  for (int at = 0; at < KEPT; at++) {
    if (ids[at] == 0) continue;
    if (!same(taken[at], given[at])) return "other weights";
    weights_give_back(taken[at]);
    free(given[at]);
    if (weights_take(ids[at]) != NULL) return "there after they went";
  }
  return NULL;
}

static int refused(void) {
  const int8_t w[12] = {0};
  const int64_t most = INT64_MAX;
  const int64_t lies[][3] = {
      {12, 3, 5},   {12, 4, 2},   {12, -3, -4},   {12, 0, 12}, {0, 0, 0},       {12, 12, 0},
      {12, -1, 1},  {most, 1, 1}, {12, most, most}, {-12, 3, 4}, {12, 1, most}, {12, 65537, 1},
      {0, INT64_C(1) << 32, INT64_C(1) << 32},
  };
  for (size_t i = 0; i < sizeof lies / sizeof *lies; i++)
    for (int kind = 0; kind < 5; kind++)
      if (asr_keep_weights((const char *[]){"depthwise", "pointwise", "woven", "four_bits", "four_bits_small"}[kind], w,
                           lies[i][0], lies[i][1], lies[i][2]) != 0)
        return 0;
  asr_let_go_of_weights(0), asr_let_go_of_weights(-1), asr_let_go_of_weights(most);
  return asr_keep_weights("dense", w, 12, 3, 4) == 0 && weights_take(0) == NULL && weights_take(most) == NULL;
}

static int check(void) {
  pthread_t threads[2];
  unsigned seeds[2] = {(unsigned)rand(), (unsigned)rand()};
  for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, keep_some, &seeds[i]);
  int wrong = !refused();
  for (int i = 0; i < 2; i++) {
    void *problem;
    pthread_join(threads[i], &problem);
    if (problem != NULL) wrong = 1, puts(problem);
  }
  if (filling != NULL && filling->tenants == 0) wrong = 1, puts("an empty chunk");
  return wrong;
}

int main(int count, char **arguments) {
  if (!is_avx2()) return puts("skipped: this processor has no AVX2"), 1;
  return fuzz(count, arguments, check);
}
