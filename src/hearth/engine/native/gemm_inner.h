// What the files gemm*.cpp share and nobody else needs.
#pragma once

#include "gemm.h"

namespace hearth {

constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 1024, PAIR_BYTES = 2 * TILE_BYTES;
constexpr int64_t BLOCK = 16, PANEL = 32;  // columns

// Ask for weights that are read from memory soon: into the second-level cache, which can wait for three times as
// many lines as the first, and from there into the first. Where a line takes long to use, as in int4, the
// hardware's own prefetching falls behind: 21 GB/s without this, 22 with one level, 28 with both.
inline void prefetch(const uint8_t* at) {
  _mm_prefetch((const char*)at + 8192, _MM_HINT_T1);
  _mm_prefetch((const char*)at + 1024, _MM_HINT_T0);
}

// Input rows as the tile kernels read them: a pair of tiles [K/32 or K/64][2][16 rows][64 bytes] per row group.
// bfloat16: a row group is 32 rows, 16 in each tile of the pair. Quantised: 16 rows, the high bytes in the
// first tile and the low bytes in the second.
struct PackedInput {
  const uint8_t* pairs;
  int64_t num_rows;  // real ones; the rest of the last group is padding
  int64_t num_k_tiles;
  const float* step;        // quantised: [num_rows]
  const int32_t* sum_high;  // quantised: 128 * the sum of a row's high (low) bytes
  const int32_t* sum_low;
};

void pack_input_bf16(const GemmArgs& args, int64_t row, int64_t num_rows, PackedInput* input);
void pack_input_int8(const GemmArgs& args, int64_t row, int64_t num_rows, PackedInput* input);

// At most GEMV_ROWS rows x columns [column, end_column), at memory speed.
constexpr int64_t GEMV_ROWS = 4;
void gemv_bf16(const GemmArgs& args, int64_t column, int64_t end_column);
void gemv_int8(const GemmArgs& args, int64_t column, int64_t end_column);

// One panel of weights, and the weights that will be used after it, which a kernel may fetch meanwhile.
struct Panel {
  const uint8_t* weight;  // tiles [num_k_tiles][2][1 KiB]
  int64_t column;
  const uint8_t* next;
  int64_t next_bytes;
};

// All rows of `input`, which are rows row... of out, x one panel.
void tiles_panel(const GemmArgs& args, const PackedInput& input, int64_t row, Panel panel);
void vectors_bf16(const GemmArgs& args, const PackedInput& input, int64_t row, Panel panel);
void vectors_int8(const GemmArgs& args, const PackedInput& input, int64_t row, Panel panel);

// The INT8 tiles of an INT4 panel.
void unpack_int4(const GemmArgs& args, int64_t column, uint8_t* panel);

// Put 16 columns of one row into out, with bias and rounding.
inline void finish(const GemmArgs& args, __m512 value, int64_t row, int64_t column) {
  const __mmask16 mask = mask16(args.N - column);
  if (args.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, args.bias + column));
  if (args.flags & GEMM_OUT_F32) {
    float* out = (float*)args.out + row * args.out_stride + column;
    if (args.flags & GEMM_ACCUMULATE) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, out));
    _mm512_mask_storeu_ps(out, mask, value);
  } else {
    bf16* out = (bf16*)args.out + row * args.out_stride + column;
    if (args.flags & GEMM_ACCUMULATE) value = _mm512_add_ps(value, widen(_mm256_maskz_loadu_epi16(mask, out)));
    _mm256_mask_storeu_epi16(out, mask, narrow(value));
  }
}

// Whether 32 columns from `column` of a row are a line of the cache, to be written around it: a large result does
// not stay in the cache anyway, and fetching every line before it is overwritten cost a third of the time.
inline bool writes_around(const GemmArgs& args, int64_t column) {
  constexpr int64_t LARGE = 1 << 21;
  const bool lines = ((uintptr_t)args.out | (uintptr_t)args.out_stride * 2) % 64 == 0;
  return args.flags == 0 && lines && column + PANEL <= args.N && args.M * args.N * 2 >= LARGE;
}

// Both blocks of a panel, for the tile kernels; the caller of many ends with a fence if they write around.
inline void finish_panel(const GemmArgs& args, __m512 left, __m512 right, int64_t row, int64_t column, bool around) {
  if (!around) {
    finish(args, left, row, column);
    finish(args, right, row, column + BLOCK);
    return;
  }
  if (args.bias) {
    left = _mm512_add_ps(left, _mm512_loadu_ps(args.bias + column));
    right = _mm512_add_ps(right, _mm512_loadu_ps(args.bias + column + BLOCK));
  }
  void* out = (bf16*)args.out + row * args.out_stride + column;
  _mm512_stream_si512((__m512i*)out, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}

// The weighted sum from exact sums of quantised input; r counts the rows of `input`.
inline __m512 to_float(const GemmArgs& args, const PackedInput& input, __m512i high, __m512i low, int64_t r,
                       int64_t column) {
  high = _mm512_sub_epi32(high, _mm512_set1_epi32(input.sum_high[r]));
  low = _mm512_sub_epi32(low, _mm512_set1_epi32(input.sum_low[r]));
  const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(low));
  return _mm512_mul_ps(
      sum, _mm512_mul_ps(_mm512_loadu_ps(args.scale + column), _mm512_set1_ps(input.step[r])));
}

}  // namespace hearth
