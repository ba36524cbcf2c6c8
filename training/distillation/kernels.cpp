// Channels-last training kernels for depthwise convolutions on CPUs with AVX512-BF16.
//
// Activations are bfloat16 (batch, frames, channels), channels a multiple of 32; sums are float32. The vendor
// libraries run the pointwise convolutions (plain matrix products in this layout); what they are slow at, the
// depthwise convolutions with their gradients and the normalisation, is here.
#include <immintrin.h>
#include <torch/extension.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t kLanes = 32;  // channels per task: one 512-bit load of bfloat16
constexpr int64_t kTile = 8;    // output frames (or taps) kept in registers

inline void load32(const uint16_t* source, __m512& low, __m512& high) {
  const __m512i raw = _mm512_loadu_si512(source);
  low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(raw)), 16));
  high = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(raw, 1)), 16));
}

inline void store32(uint16_t* target, __m512 low, __m512 high) {
  _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

inline uint16_t* raw(const at::Tensor& tensor) { return reinterpret_cast<uint16_t*>(tensor.data_ptr<at::BFloat16>()); }

void check(const at::Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.is_contiguous(), "expected contiguous bfloat16");
  TORCH_CHECK(x.size(-1) % kLanes == 0, "channels must be a multiple of 32");
}

// Copies 32 channels of one utterance into float32 with zero rows on both sides.
void gather(const uint16_t* x, int64_t frames, int64_t channels, int64_t left, int64_t right, float* buffer) {
  std::fill(buffer, buffer + left * kLanes, 0.f);
  for (int64_t t = 0; t < frames; ++t) {
    __m512 low, high;
    load32(x + t * channels, low, high);
    _mm512_storeu_ps(buffer + (left + t) * kLanes, low);
    _mm512_storeu_ps(buffer + (left + t) * kLanes + 16, high);
  }
  std::fill(buffer + (left + frames) * kLanes, buffer + (left + frames + right) * kLanes, 0.f);
}

}  // namespace

// y[b,t,c] = sum_k w[k,c] * x[b, t + k - pad, c]; x (B,T,C), w (K,C) float32, stride 1.
at::Tensor depthwise(const at::Tensor& x, const at::Tensor& w, int64_t pad) {
  check(x);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), K = w.size(0);
  at::Tensor y = at::empty_like(x);
  const int64_t blocks = C / kLanes;
  const int64_t tiled = (T + kTile - 1) / kTile * kTile;
  const float* weights = w.data_ptr<float>();
  at::parallel_for(0, B * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> taps((K + 2 * (kTile - 1)) * kLanes), buffer((tiled + K + kTile) * kLanes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks, c = task % blocks * kLanes;
      std::fill(taps.begin(), taps.end(), 0.f);
      for (int64_t k = 0; k < K; ++k)
        std::copy_n(weights + k * C + c, kLanes, taps.data() + (k + kTile - 1) * kLanes);
      gather(raw(x) + b * T * C + c, T, C, pad, tiled + K + kTile - pad - T, buffer.data());
      uint16_t* out = raw(y) + b * T * C + c;
      for (int64_t t0 = 0; t0 < T; t0 += kTile) {
        __m512 low[kTile], high[kTile];
        for (int j = 0; j < kTile; ++j) low[j] = high[j] = _mm512_setzero_ps();
        const float* in = buffer.data() + t0 * kLanes;
        for (int64_t p = 0; p < K + kTile - 1; ++p) {
          const __m512 x0 = _mm512_loadu_ps(in + p * kLanes), x1 = _mm512_loadu_ps(in + p * kLanes + 16);
          const float* tap = taps.data() + (p + kTile - 1) * kLanes;
#pragma GCC unroll 8
          for (int j = 0; j < kTile; ++j) {
            low[j] = _mm512_fmadd_ps(x0, _mm512_loadu_ps(tap - j * kLanes), low[j]);
            high[j] = _mm512_fmadd_ps(x1, _mm512_loadu_ps(tap - j * kLanes + 16), high[j]);
          }
        }
        for (int j = 0; j < kTile && t0 + j < T; ++j) store32(out + (t0 + j) * C, low[j], high[j]);
      }
    }
  });
  return y;
}

// Gradient of depthwise in its weights: dw[k,c] = sum_{b,t} g[b,t,c] * x[b, t + k - pad, c].
at::Tensor depthwise_weight_gradient(const at::Tensor& x, const at::Tensor& g, int64_t K, int64_t pad) {
  check(x);
  check(g);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  at::Tensor dw = at::zeros({K, C}, x.options().dtype(at::kFloat));
  const int64_t tiled = (K + kTile - 1) / kTile * kTile;
  at::parallel_for(0, C / kLanes, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> in((T + tiled) * kLanes), grad(T * kLanes), sums(tiled * kLanes);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t c = block * kLanes;
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t b = 0; b < B; ++b) {
        gather(raw(x) + b * T * C + c, T, C, pad, tiled - pad, in.data());
        gather(raw(g) + b * T * C + c, T, C, 0, 0, grad.data());
        for (int64_t k0 = 0; k0 < K; k0 += kTile) {
          __m512 low[kTile], high[kTile];
          for (int j = 0; j < kTile; ++j) {
            low[j] = _mm512_loadu_ps(sums.data() + (k0 + j) * kLanes);
            high[j] = _mm512_loadu_ps(sums.data() + (k0 + j) * kLanes + 16);
          }
          for (int64_t t = 0; t < T; ++t) {
            const __m512 g0 = _mm512_loadu_ps(grad.data() + t * kLanes);
            const __m512 g1 = _mm512_loadu_ps(grad.data() + t * kLanes + 16);
            const float* row = in.data() + (t + k0) * kLanes;
#pragma GCC unroll 8
            for (int j = 0; j < kTile; ++j) {
              low[j] = _mm512_fmadd_ps(g0, _mm512_loadu_ps(row + j * kLanes), low[j]);
              high[j] = _mm512_fmadd_ps(g1, _mm512_loadu_ps(row + j * kLanes + 16), high[j]);
            }
          }
          for (int j = 0; j < kTile; ++j) {
            _mm512_storeu_ps(sums.data() + (k0 + j) * kLanes, low[j]);
            _mm512_storeu_ps(sums.data() + (k0 + j) * kLanes + 16, high[j]);
          }
        }
      }
      for (int64_t k = 0; k < K; ++k)
        std::copy_n(sums.data() + k * kLanes, kLanes, dw.data_ptr<float>() + k * C + c);
    }
  });
  return dw;
}

// y[b,t,f,c] = sum_{i,j} w[3*i+j,c] * x[b, 2*t+i-1, 2*f+j-1, c]; x (B,T,F,C), w (9,C) float32: a 3 x 3
// convolution of stride 2 over time and features, each padded by one.
at::Tensor strided_depthwise(const at::Tensor& x, const at::Tensor& w) {
  check(x);
  const int64_t B = x.size(0), T = x.size(1), F = x.size(2), C = x.size(3);
  const int64_t rows = (T - 1) / 2 + 1, columns = (F - 1) / 2 + 1;
  at::Tensor y = at::empty({B, rows, columns, C}, x.options());
  const float* weights = w.data_ptr<float>();
  at::parallel_for(0, B * rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / rows, t = row % rows;
      for (int64_t f = 0; f < columns; ++f) {
        uint16_t* out = raw(y) + (row * columns + f) * C;
        for (int64_t c = 0; c < C; c += kLanes) {
          __m512 low = _mm512_setzero_ps(), high = low;
          for (int64_t i = std::max<int64_t>(0, 1 - 2 * t); i < std::min<int64_t>(3, T + 1 - 2 * t); ++i)
            for (int64_t j = std::max<int64_t>(0, 1 - 2 * f); j < std::min<int64_t>(3, F + 1 - 2 * f); ++j) {
              __m512 x0, x1;
              load32(raw(x) + ((b * T + 2 * t + i - 1) * F + 2 * f + j - 1) * C + c, x0, x1);
              const float* tap = weights + (3 * i + j) * C + c;
              low = _mm512_fmadd_ps(x0, _mm512_loadu_ps(tap), low);
              high = _mm512_fmadd_ps(x1, _mm512_loadu_ps(tap + 16), high);
            }
          store32(out + c, low, high);
        }
      }
    }
  });
  return y;
}

// Gradients of strided_depthwise in x (as x) and in w (as w).
std::vector<at::Tensor> strided_depthwise_gradients(const at::Tensor& g, const at::Tensor& x, const at::Tensor& w) {
  check(x);
  check(g);
  const int64_t B = x.size(0), T = x.size(1), F = x.size(2), C = x.size(3), rows = g.size(1), columns = g.size(2);
  at::Tensor dx = at::empty_like(x), dw = at::zeros({9, C}, w.options());
  const float* weights = w.data_ptr<float>();
  at::parallel_for(0, C / kLanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t c = block * kLanes;
      __m512 sums[18];
      for (auto& value : sums) value = _mm512_setzero_ps();
      for (int64_t place = 0; place < B * T * F; ++place) {
        const int64_t f = place % F, t = place / F % T, b = place / (F * T);
        __m512 low = _mm512_setzero_ps(), high = low, x0, x1;
        load32(raw(x) + place * C + c, x0, x1);
        for (int64_t i = (t + 1) % 2; i < 3; i += 2) {
          const int64_t row = (t + 1 - i) / 2;
          if (row < 0 || row >= rows) continue;
          for (int64_t j = (f + 1) % 2; j < 3; j += 2) {
            const int64_t column = (f + 1 - j) / 2;
            if (column < 0 || column >= columns) continue;
            __m512 g0, g1;
            load32(raw(g) + ((b * rows + row) * columns + column) * C + c, g0, g1);
            const int64_t k = 3 * i + j;
            low = _mm512_fmadd_ps(g0, _mm512_loadu_ps(weights + k * C + c), low);
            high = _mm512_fmadd_ps(g1, _mm512_loadu_ps(weights + k * C + c + 16), high);
            sums[2 * k] = _mm512_fmadd_ps(g0, x0, sums[2 * k]);
            sums[2 * k + 1] = _mm512_fmadd_ps(g1, x1, sums[2 * k + 1]);
          }
        }
        store32(raw(dx) + place * C + c, low, high);
      }
      for (int64_t k = 0; k < 9; ++k) {
        _mm512_storeu_ps(dw.data_ptr<float>() + k * C + c, sums[2 * k]);
        _mm512_storeu_ps(dw.data_ptr<float>() + k * C + c + 16, sums[2 * k + 1]);
      }
    }
  });
  return {dx, dw};
}

// Per-channel sum and sum of squares over the valid rows of z (B,T,C): float32 (2, C).
at::Tensor moments(const at::Tensor& z, const at::Tensor& lengths) {
  check(z);
  const int64_t B = z.size(0), T = z.size(1), C = z.size(2);
  at::Tensor out = at::empty({2, C}, z.options().dtype(at::kFloat));
  const int64_t* valid = lengths.data_ptr<int64_t>();
  float* sums = out.data_ptr<float>();
  at::parallel_for(0, C / kLanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t c = block * kLanes;
      __m512 s0 = _mm512_setzero_ps(), s1 = s0, q0 = s0, q1 = s0;
      for (int64_t b = 0; b < B; ++b) {
        const uint16_t* row = raw(z) + b * T * C + c;
        for (int64_t t = 0; t < valid[b]; ++t, row += C) {
          __m512 a, d;
          load32(row, a, d);
          s0 = _mm512_add_ps(s0, a);
          s1 = _mm512_add_ps(s1, d);
          q0 = _mm512_fmadd_ps(a, a, q0);
          q1 = _mm512_fmadd_ps(d, d, q1);
        }
      }
      _mm512_storeu_ps(sums + c, s0);
      _mm512_storeu_ps(sums + c + 16, s1);
      _mm512_storeu_ps(sums + C + c, q0);
      _mm512_storeu_ps(sums + C + c + 16, q1);
    }
  });
  return out;
}

// y = relu(a*z + shift [+ a2*r]) on valid rows, 0 on padded ones; a, a2, shift float32 (C,).
at::Tensor affine_relu(const at::Tensor& z, const at::Tensor& a, const at::Tensor& shift,
                       const c10::optional<at::Tensor>& r, const c10::optional<at::Tensor>& a2,
                       const at::Tensor& lengths, bool relu) {
  check(z);
  const int64_t B = z.size(0), T = z.size(1), C = z.size(2);
  at::Tensor y = at::empty_like(z);
  const int64_t* valid = lengths.data_ptr<int64_t>();
  const float *scale = a.data_ptr<float>(), *bias = shift.data_ptr<float>();
  const float* scale2 = r ? a2->data_ptr<float>() : nullptr;
  const uint16_t* second = r ? raw(*r) : nullptr;
  const __m512 floor = _mm512_set1_ps(relu ? 0.f : -INFINITY);
  at::parallel_for(0, B * T, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint16_t* out = raw(y) + row * C;
      if (row % T >= valid[row / T]) {
        std::fill(out, out + C, 0);
        continue;
      }
      for (int64_t c = 0; c < C; c += kLanes) {
        __m512 v0, v1;
        load32(raw(z) + row * C + c, v0, v1);
        v0 = _mm512_fmadd_ps(v0, _mm512_loadu_ps(scale + c), _mm512_loadu_ps(bias + c));
        v1 = _mm512_fmadd_ps(v1, _mm512_loadu_ps(scale + c + 16), _mm512_loadu_ps(bias + c + 16));
        if (second) {
          __m512 r0, r1;
          load32(second + row * C + c, r0, r1);
          v0 = _mm512_fmadd_ps(r0, _mm512_loadu_ps(scale2 + c), v0);
          v1 = _mm512_fmadd_ps(r1, _mm512_loadu_ps(scale2 + c + 16), v1);
        }
        store32(out + c, _mm512_max_ps(v0, floor), _mm512_max_ps(v1, floor));
      }
    }
  });
  return y;
}

// With g = dy where y > 0: per-channel sums of g, g*z (and g*r): float32 (2 or 3, C).
at::Tensor gradient_sums(const at::Tensor& dy, const at::Tensor& y, const at::Tensor& z,
                         const c10::optional<at::Tensor>& r, const at::Tensor& lengths) {
  check(dy);
  const int64_t B = z.size(0), T = z.size(1), C = z.size(2);
  at::Tensor out = at::empty({r ? 3 : 2, C}, z.options().dtype(at::kFloat));
  const int64_t* valid = lengths.data_ptr<int64_t>();
  const uint16_t* second = r ? raw(*r) : nullptr;
  float* sums = out.data_ptr<float>();
  at::parallel_for(0, C / kLanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t c = block * kLanes;
      __m512 acc[6];
      for (auto& value : acc) value = _mm512_setzero_ps();
      for (int64_t b = 0; b < B; ++b) {
        for (int64_t t = 0; t < valid[b]; ++t) {
          const int64_t at = (b * T + t) * C + c;
          __m512 g0, g1, y0, y1, z0, z1;
          load32(raw(dy) + at, g0, g1);
          load32(raw(y) + at, y0, y1);
          load32(raw(z) + at, z0, z1);
          g0 = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y0, _mm512_setzero_ps(), _CMP_GT_OQ), g0);
          g1 = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y1, _mm512_setzero_ps(), _CMP_GT_OQ), g1);
          acc[0] = _mm512_add_ps(acc[0], g0);
          acc[1] = _mm512_add_ps(acc[1], g1);
          acc[2] = _mm512_fmadd_ps(g0, z0, acc[2]);
          acc[3] = _mm512_fmadd_ps(g1, z1, acc[3]);
          if (second) {
            __m512 r0, r1;
            load32(second + at, r0, r1);
            acc[4] = _mm512_fmadd_ps(g0, r0, acc[4]);
            acc[5] = _mm512_fmadd_ps(g1, r1, acc[5]);
          }
        }
      }
      for (int64_t i = 0; i < (second ? 3 : 2); ++i) {
        _mm512_storeu_ps(sums + i * C + c, acc[2 * i]);
        _mm512_storeu_ps(sums + i * C + c + 16, acc[2 * i + 1]);
      }
    }
  });
  return out;
}

// With g = dy where y > 0: dz = p*g + q*z + s on valid rows, 0 on padded ones; the same for r when given.
std::vector<at::Tensor> gradient_apply(const at::Tensor& dy, const at::Tensor& y, const at::Tensor& z,
                                       const at::Tensor& coefficients, const c10::optional<at::Tensor>& r,
                                       const c10::optional<at::Tensor>& coefficients2, const at::Tensor& lengths) {
  check(dy);
  const int64_t B = z.size(0), T = z.size(1), C = z.size(2);
  std::vector<at::Tensor> outputs{at::empty_like(z)};
  if (r) outputs.push_back(at::empty_like(z));
  const int64_t* valid = lengths.data_ptr<int64_t>();
  const uint16_t* sources[2] = {raw(z), r ? raw(*r) : nullptr};
  const float* factors[2] = {coefficients.data_ptr<float>(), r ? coefficients2->data_ptr<float>() : nullptr};
  at::parallel_for(0, B * T, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bool padded = row % T >= valid[row / T];
      for (size_t i = 0; i < outputs.size(); ++i) {
        uint16_t* out = raw(outputs[i]) + row * C;
        if (padded) {
          std::fill(out, out + C, 0);
          continue;
        }
        const float* p = factors[i];
        for (int64_t c = 0; c < C; c += kLanes) {
          __m512 g0, g1, y0, y1, z0, z1;
          load32(raw(dy) + row * C + c, g0, g1);
          load32(raw(y) + row * C + c, y0, y1);
          load32(sources[i] + row * C + c, z0, z1);
          g0 = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y0, _mm512_setzero_ps(), _CMP_GT_OQ), g0);
          g1 = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y1, _mm512_setzero_ps(), _CMP_GT_OQ), g1);
          z0 = _mm512_fmadd_ps(z0, _mm512_loadu_ps(p + C + c), _mm512_loadu_ps(p + 2 * C + c));
          z1 = _mm512_fmadd_ps(z1, _mm512_loadu_ps(p + C + c + 16), _mm512_loadu_ps(p + 2 * C + c + 16));
          store32(out + c, _mm512_fmadd_ps(g0, _mm512_loadu_ps(p + c), z0),
                  _mm512_fmadd_ps(g1, _mm512_loadu_ps(p + c + 16), z1));
        }
      }
    }
  });
  return outputs;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.def("depthwise", &depthwise, release());
  module.def("depthwise_weight_gradient", &depthwise_weight_gradient, release());
  module.def("strided_depthwise", &strided_depthwise, release());
  module.def("strided_depthwise_gradients", &strided_depthwise_gradients, release());
  module.def("moments", &moments, release());
  module.def("affine_relu", &affine_relu, release());
  module.def("gradient_sums", &gradient_sums, release());
  module.def("gradient_apply", &gradient_apply, release());
}
