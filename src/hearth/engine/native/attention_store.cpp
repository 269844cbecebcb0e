// Writing keys and values into the pool, as bfloat16 or as int8 with a scale; and the entrances from C.
#include <omp.h>

#include <cmath>
#include <cstring>

#include "attention.h"

namespace hearth {
namespace {

// bfloat16 to int8, symmetric, one scale for the row; returns the scale. n is a multiple of 32.
float quantise(const bf16* x, int8_t* out, int n) {
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < n; i += 16) most = max_magnitude(most, widen(_mm256_loadu_si256((const __m256i*)(x + i))));
  const float largest = reduce_magnitude(most), scale = largest / 127.0f;
  const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
  for (int i = 0; i < n; i += 16) {
    const __m512 v = _mm512_mul_ps(widen(_mm256_loadu_si256((const __m256i*)(x + i))), inverse);
    _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  // A row with NaN or infinity stays one that is no number, so that the engine can see it.
  return std::isfinite(largest) ? scale : largest;
}

// T is the type of a stored number, Pair that of two.
template <typename T, typename Pair>
void put_key(const T* x, T* block, int place, int D, int S) {
  for (int d = 0; d < D; d += 2) {
    Pair both;
    std::memcpy(&both, x + d, sizeof both);
    std::memcpy(block + (int64_t)d * S + 2 * place, &both, sizeof both);
  }
}

// The other token of the pair keeps what it has.
void put_value(const bf16* x, bf16* block, int place, int E) {
  bf16* row = block + (int64_t)(place / 2) * 2 * E;
  const __m128i shift = _mm_cvtsi32_si128(place % 2 * 16);
  const __mmask32 mine = place % 2 ? 0xAAAAAAAA : 0x55555555;
  for (int e = 0; e < E; e += 16) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + e)));
    _mm512_mask_storeu_epi16(row + 2 * e, mine, _mm512_sll_epi32(wide, shift));
  }
}

void put_value(const int8_t* x, int8_t* block, int place, int E) {
  int8_t* row = block + (int64_t)(place / 2) * 2 * E;
  const __m128i shift = _mm_cvtsi32_si128(place % 2 * 8);
  const __mmask64 mine = place % 2 ? 0xAAAAAAAAAAAAAAAA : 0x5555555555555555;
  for (int e = 0; e < E; e += 32) {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(x + e)));
    _mm512_mask_storeu_epi8(row + 2 * e, mine, _mm512_sll_epi16(wide, shift));
  }
}

void write_token(const AttentionArgs& args, int t, int head, int8_t* bytes) {
  const int S = args.block_size, D = args.key_dim, E = args.value_dim;
  const int64_t slot = args.slots[t], page = slot / S;
  const int place = (int)(slot - page * S);
  const int64_t at = (page * args.num_kv_heads + head) * S;
  const bf16* key = args.key + t * args.key_stride + head * args.key_head_stride;
  const bf16* value = args.value + t * args.value_stride + head * args.value_head_stride;
  if (!args.key_scales) {
    put_key<bf16, uint32_t>(key, (bf16*)args.keys + at * D, place, D, S);
    put_value(value, (bf16*)args.values + at * E, place, E);
    return;
  }
  args.key_scales[at + place] = quantise(key, bytes, D);
  put_key<int8_t, uint16_t>(bytes, (int8_t*)args.keys + at * D, place, D, S);
  args.value_scales[at + place] = quantise(value, bytes, E);
  put_value(bytes, (int8_t*)args.values + at * E, place, E);
}

}  // namespace

void write_kv_part(const AttentionArgs& args, int part, int num_parts) {
  if (part == 0) std::memset(args.workspace, 0, attention_counter_bytes(args));
  auto* bytes = (int8_t*)scratch(SCRATCH_ATTENTION, max64(args.key_dim, args.value_dim));
  const int first = (int)part_begin(args.num_tokens, part, num_parts);
  const int end = (int)part_begin(args.num_tokens, part + 1, num_parts);
  constexpr int RUN = 32;  // tokens of a head written together, while their block is in the first cache
  for (int t = first; t < end; t += RUN)
    for (int h = 0; h < args.num_kv_heads; h++)
      for (int u = t; u < min64(t + RUN, end); u++) write_token(args, u, h, bytes);
}

}  // namespace hearth

extern "C" {

size_t hearth_attention_workspace(const hearth::AttentionArgs* args) { return hearth::attention_workspace_bytes(*args); }

// Store and attend on num_threads threads.
void hearth_attention(const hearth::AttentionArgs* args, int num_threads) {
#pragma omp parallel num_threads(num_threads)
  {
    const int part = omp_get_thread_num(), num_parts = omp_get_num_threads();
    const hearth::TileGuard tiles;
    hearth::write_kv_part(*args, part, num_parts);
#pragma omp barrier
    hearth::attend_part(*args, part, num_parts);
  }
}
}
