#include "../../api/kernels/frames.c"

#include "fuzz.h"

/* As the definition says. */
static float signal_at(const FramesCall *call, int64_t item, int64_t t) {
  const float *waveform = call->waveform + item * call->samples;
  if (t < 0 || t >= call->samples || t >= call->lengths[item]) return 0;
  volatile float scaled = t > 0 ? waveform[t - 1] * call->preemphasis : 0;
  return waveform[t] - scaled;
}

static int check(void) {
  FramesCall call = {.samples = pick(rand() % 4 ? 100 : 5000), .hop = pick(rand() % 4 ? 40 : MAX_HOP)};
  const int64_t batch = pick(3);
  call.samples -= rand() % 8 == 0 ? call.samples : 0;
  call.preemphasis = (float)rand() / (float)RAND_MAX;
  /* Sometimes fewer blocks than there are samples for, or more. */
  call.count = call.samples / call.hop + rand() % 4;
  call.chunks = (call.count + CHUNK - 1) / CHUNK;
  const size_t size = (size_t)(batch * call.samples), blocks = (size_t)(batch * call.count * call.hop);
  float *waveform = malloc(size * sizeof *waveform);
  int64_t *lengths = malloc((size_t)batch * sizeof *lengths);
  call.even = malloc(blocks * sizeof *call.even), call.odd = malloc(blocks * sizeof *call.odd);
  for (size_t i = 0; i < size; i++) waveform[i] = (float)rand() / (float)RAND_MAX - 0.5f;
  for (int64_t i = 0; i < batch; i++)
    lengths[i] = rand() % 8 == 0 ? (rand() % 2 ? INT64_MAX : INT64_MIN) : rand() % (call.samples + 10);
  call.waveform = waveform, call.lengths = lengths;
  for (int64_t task = 0; task < batch * call.chunks; task++) run_frames(&call, (size_t)task);
  int wrong = 0;
  for (size_t i = 0; i < blocks; i++) {
    const int64_t n = (int64_t)i % call.hop, block = (int64_t)i / call.hop % call.count;
    const int64_t item = (int64_t)i / call.hop / call.count;
    const float now = signal_at(&call, item, block * call.hop + n);
    const float before = signal_at(&call, item, block * call.hop - 1 - n);
    wrong += call.even[i] != now + before || call.odd[i] != now - before;
  }
  if (wrong) printf("%d wrong; samples %d hop %d count %d\n", wrong, (int)call.samples, (int)call.hop, (int)call.count);
  free(waveform), free(lengths), free(call.even), free(call.odd);
  return wrong != 0;
}

int main(int count, char **arguments) {
  if (!is_avx2()) return puts("skipped: this processor has no AVX2"), 1;
  return fuzz(count, arguments, check);
}
