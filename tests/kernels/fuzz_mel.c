#include "../../api/kernels/mel.c"

#include "fuzz.h"

static float any(void) { return (float)rand() / (float)RAND_MAX - 0.5f; }

/* Filters of zeros but for a few neighbouring bins each, as mel filters are. */
static void fill_filters(Mel *k) {
  memset(k->filters, 0, (size_t)(k->bins * k->features) * sizeof *k->filters);
  for (int64_t feature = 0; feature < k->features; feature++) {
    const int64_t first = rand() % k->bins, width = rand() % 20;
    for (int64_t bin = first; bin < first + width && bin < k->bins; bin++)
      k->filters[bin * k->features + feature] = rand() % 8 == 0 ? 0 : any();
  }
}

static int check(void) {
  Mel k = {.bins = LANES * pick(rand() % 4 ? 4 : MAX_BINS / LANES), .features = LANES * pick(rand() % 4 ? 3 : 16)};
  MelCall call = {.kernel = &k, .frames = pick(rand() % 4 ? 30 : 150)};
  const size_t size = (size_t)(call.frames * k.bins);
  float *real = malloc(size * sizeof *real), *imaginary = malloc(size * sizeof *imaginary);
  k.filters = malloc((size_t)(k.bins * k.features) * sizeof *k.filters);
  call.y = malloc((size_t)(call.frames * k.features) * sizeof *call.y);
  for (size_t i = 0; i < size; i++) real[i] = any(), imaginary[i] = any();
  fill_filters(&k);
  find_bands(&k);
  call.real = real, call.imaginary = imaginary;
  for (int64_t task = 0; task < (call.frames + CHUNK - 1) / CHUNK; task++) run_mel(&call, (size_t)task);
  int wrong = 0;
  for (int64_t frame = 0; frame < call.frames; frame++)
    for (int64_t feature = 0; feature < k.features; feature++) {
      float sum = 0;
      for (int64_t bin = 0; bin < k.bins; bin++) {
        const float a = real[frame * k.bins + bin], b = imaginary[frame * k.bins + bin];
        sum = fmaf(a * a + b * b, k.filters[bin * k.features + feature], sum);
      }
      wrong += call.y[frame * k.features + feature] != sum;
    }
  if (wrong) printf("%d wrong; bins %d features %d frames %d\n", wrong, (int)k.bins, (int)k.features, (int)call.frames);
  free(real), free(imaginary), free(k.filters), free(call.y);
  return wrong != 0;
}

int main(int count, char **arguments) {
  if (!is_vnni()) return puts("skipped: this processor has no VNNI"), 1;
  return fuzz(count, arguments, check);
}
