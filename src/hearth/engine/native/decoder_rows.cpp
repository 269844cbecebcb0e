// Row-wise parts of a decoder layer. All arithmetic is float32, rounded once at the end of each part.
#include "decoder.h"

namespace hearth {
namespace {

inline __m512 load(const bf16* x, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, x)); }
inline void store(bf16* out, __mmask16 mask, __m512 x) { _mm256_mask_storeu_epi16(out, mask, narrow(x)); }

// e^x within 2 ulp for x in [-87, 88], clamped outside (Cephes expf).
inline __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.f)), _mm512_set1_ps(88.f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 sigmoid(__m512 x) {
  __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// erf by Abramowitz and Stegun 7.1.26, within 1.5e-7.
inline __m512 error_function(__m512 x) {
  __m512 one = _mm512_set1_ps(1.f), a = _mm512_abs_ps(x);
  __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(a, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_mul_ps(_mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f)), t);
  __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(a, a)));
  __m512 y = _mm512_fnmadd_ps(p, e, one);
  __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_sub_ps(y, negative, _mm512_setzero_ps(), y);
}

// NaN stays NaN: of a maximum with NaN the processor takes the second operand.
inline __m512 activate(int activation, __m512 x) {
  __m512 zero = _mm512_setzero_ps(), half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  switch (activation) {
    case ACT_SILU:
      return _mm512_mul_ps(x, sigmoid(x));
    case ACT_GELU_TANH: {  // 0.5 x (1 + tanh u) = x sigmoid(2 u)
      __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
      __m512 u = _mm512_mul_ps(_mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x), _mm512_set1_ps(1.595769122f));
      return _mm512_mul_ps(x, sigmoid(u));
    }
    case ACT_GELU:
      return _mm512_fmadd_ps(half, error_function(_mm512_mul_ps(x, _mm512_set1_ps(0.707106781f))), half);
    case ACT_RELU2: {
      __m512 y = _mm512_max_ps(zero, x);
      return _mm512_mul_ps(y, y);
    }
    default:
      return _mm512_max_ps(zero, x);
  }
}

}  // namespace

void norm_row(const Norm& norm, const bf16* x, bf16* out, int64_t dim) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < dim; i += 16) {
    __m512 v = load(x + i, mask16(dim - i));
    sum = _mm512_add_ps(sum, v);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  float mean = 0.f, variance;
  if (norm.kind == NORM_LAYER) {
    mean = _mm512_reduce_add_ps(sum) / dim;
    __m512 m = _mm512_set1_ps(mean);
    squares = _mm512_setzero_ps();  // again, about the mean: no cancellation
    for (int64_t i = 0; i < dim; i += 16) {
      __mmask16 mask = mask16(dim - i);
      __m512 v = _mm512_maskz_sub_ps(mask, load(x + i, mask), m);
      squares = _mm512_fmadd_ps(v, v, squares);
    }
  }
  variance = _mm512_reduce_add_ps(squares) / dim;
  __m512 inverse = _mm512_set1_ps(1.f / __builtin_sqrtf(variance + norm.eps)), m = _mm512_set1_ps(mean);
  for (int64_t i = 0; i < dim; i += 16) {
    __mmask16 mask = mask16(dim - i);
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(load(x + i, mask), m), inverse);
    if (norm.kind == NORM_RMS) v = widen(narrow(v));
    v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, norm.weight + i));
    if (norm.bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, norm.bias + i));
    store(out + i, mask, v);
  }
}

void add_row(bf16* out, const bf16* x, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 16) {
    __mmask16 mask = mask16(dim - i);
    store(out + i, mask, _mm512_add_ps(load(out + i, mask), load(x + i, mask)));
  }
}

void activate_row(int activation, const bf16* gate, const bf16* up, bf16* out, int64_t dim) {
  for (int64_t i = 0; i < dim; i += 16) {
    __mmask16 mask = mask16(dim - i);
    __m512 v = activate(activation, load(gate + i, mask));
    if (up) v = _mm512_mul_ps(v, load(up + i, mask));
    store(out + i, mask, v);
  }
}

void rotate_head(bf16* head, const float* cos, const float* sin, int64_t rotary_dim) {
  int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    __mmask16 mask = mask16(half - i);
    __m512 a = load(head + i, mask), b = load(head + half + i, mask);
    __m512 c = _mm512_maskz_loadu_ps(mask, cos + i), s = _mm512_maskz_loadu_ps(mask, sin + i);
    store(head + i, mask, _mm512_fnmadd_ps(b, s, _mm512_mul_ps(a, c)));
    store(head + half + i, mask, _mm512_fmadd_ps(a, s, _mm512_mul_ps(b, c)));
  }
}

}  // namespace hearth
