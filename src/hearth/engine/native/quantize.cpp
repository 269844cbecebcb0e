// Weight-only quantisation, the same algorithm as hearth/engine/quantize.py, which explains it.
#include <cmath>

#include "common.h"

namespace hearth {
namespace {

float largest(const bf16* x, int64_t K) {
  __m512i top = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 16)
    top = max_magnitude(top, widen(_mm256_maskz_loadu_epi16(mask16(K - k), x + k)));
  return reduce_magnitude(top);
}

inline __m512 load_scaled(const bf16* x, int64_t left, __m512 inverse) {
  const __mmask16 mask = mask16(left);
  return mask ? _mm512_mul_ps(widen(_mm256_maskz_loadu_epi16(mask, x)), inverse) : _mm512_setzero_ps();
}

// A group of V vectors, in steps of its channel.
template <int V>
struct Group {
  __m512 value[V];

  __m512 nibble(int v, float mul, float add) const {
    const __m512 q = _mm512_div_ps(_mm512_sub_ps(value[v], _mm512_set1_ps(add)), _mm512_set1_ps(mul));
    const __m512 low = _mm512_max_ps(_mm512_roundscale_ps(q, 0), _mm512_setzero_ps());
    return _mm512_min_ps(low, _mm512_set1_ps(15.0f));
  }

  // The squared error with this step and offset, and in `mean` what is left over on average.
  float error(float mul, float add, float* mean) const {
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    for (int v = 0; v < V; ++v) {
      const __m512 weight = _mm512_fmadd_ps(nibble(v, mul, add), _mm512_set1_ps(mul), _mm512_set1_ps(add));
      const __m512 left = _mm512_sub_ps(value[v], weight);
      sum = _mm512_add_ps(sum, left);
      squares = _mm512_fmadd_ps(left, left, squares);
    }
    *mean = _mm512_reduce_add_ps(sum) / (V * 16);
    return _mm512_reduce_add_ps(squares);
  }

  void choose(float* best_mul, float* best_add) const {
    __m512 low = value[0], high = value[0];
    for (int v = 1; v < V; ++v) low = _mm512_min_ps(low, value[v]), high = _mm512_max_ps(high, value[v]);
    const float bottom = _mm512_reduce_min_ps(low), top = _mm512_reduce_max_ps(high);
    float best = INFINITY;
    *best_mul = 1, *best_add = 0;
    for (int shorter = 0; shorter < 4; ++shorter) {
      const float mul = std::fmin(std::fmax(std::ceil((top - bottom) / 15) - shorter, 1.0f), 17.0f);
      float add = std::nearbyint((bottom + top) / 2 - 7.5f * mul), mean;
      for (int refine = 0; refine < 3; ++refine) {
        add = std::fmin(std::fmax(add, -128.0f), 127 - 15 * mul);
        const float now = error(mul, add, &mean);
        if (now < best) best = now, *best_mul = mul, *best_add = add;
        add = std::nearbyint(add + mean);
      }
    }
  }
};

template <int V>
void quantize_row(const bf16* x, int64_t K, int64_t depth, uint8_t* nibbles, uint8_t* muls, uint8_t* adds,
                  float* scale) {
  const float top = largest(x, K);
  const __m512 inverse = _mm512_set1_ps(top > 0 ? 127 / top : 0.0f);
  *scale = top / 127;
  for (int64_t k = 0; k < depth; k += V * 16, ++muls, ++adds) {
    Group<V> group;
    for (int v = 0; v < V; ++v) group.value[v] = load_scaled(x + k + v * 16, K - k - v * 16, inverse);
    float mul, add;
    group.choose(&mul, &add);
    *muls = (uint8_t)mul;
    *adds = (uint8_t)(add + 128);
    for (int v = 0; v < V; ++v)
      _mm_storeu_si128((__m128i*)(nibbles + k + v * 16),
                       _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(group.nibble(v, mul, add))));
  }
}

}  // namespace
}  // namespace hearth

// weight [N, K] bfloat16, rows `stride` elements apart -> codes [N, K] int8, scale [N].
extern "C" void hearth_quantize_int8(const void* weight, int64_t stride, int64_t N, int64_t K, int8_t* codes,
                                     float* scale, int num_threads) {
  using namespace hearth;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t n = 0; n < N; ++n) {
    const bf16* x = (const bf16*)weight + n * stride;
    const float top = largest(x, K);
    const __m512 inverse = _mm512_set1_ps(top > 0 ? 127 / top : 0.0f);
    scale[n] = top / 127;
    for (int64_t k = 0; k < K; k += 16)
      _mm512_mask_cvtepi32_storeu_epi8(codes + n * K + k, mask16(K - k),
                                       _mm512_cvtps_epi32(load_scaled(x + k, K - k, inverse)));
  }
}

// -> nibbles [N, depth], mul and add [N, depth / group], scale [N]; depth is K rounded up to 64.
extern "C" void hearth_quantize_int4(const void* weight, int64_t stride, int64_t N, int64_t K, int group,
                                     uint8_t* nibbles, uint8_t* mul, uint8_t* add, float* scale, int num_threads) {
  using namespace hearth;
  const int64_t depth = round_up(K, 64), num_groups = depth / group;
  const auto quantize = group == 32 ? quantize_row<2> : quantize_row<4>;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t n = 0; n < N; ++n)
    quantize((const bf16*)weight + n * stride, K, depth, nibbles + n * depth, mul + n * num_groups,
             add + n * num_groups, scale + n);
}
