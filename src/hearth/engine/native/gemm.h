// Linear layers: out[M, N] = x[M, K] weight[N, K]^T + bias, weights packed once at load.
//
// Packed layouts. N is padded to 32 with zero columns. A block is 16 columns n; blocks follow one another, so
// that a range of columns is one contiguous range of memory, read front to back.
//   BF16: per block, K padded to 32: [K/32] tiles of [16 pairs of k][16 n][2 k] bfloat16 (1 KiB), which is one
//         B operand of tdpbf16ps, and row by row the operand of vdpbf16ps.
//   INT8: per block, K padded to 64: [K/64] tiles of [16 quads of k][16 n][4 k] unsigned bytes (1 KiB), which
//         hold w + 128, |w| <= 127, with weight = w * scale[n]; the B operand of tdpbsud and vpdpbusd.
//   INT4: the same tiles, but in 512 bytes: byte (n, k) of the first 8 rows of quads is the low nibble, of the
//         last 8 rows the high nibble. A nibble q of group g stands for the INT8 byte q * mul[g, n] +
//         add[g, n]; so a group's scale and zero point are multiples of the channel's step, and unpacking to
//         the INT8 tile is exact. Groups of 64 k (a tile) or of 32 (each of its halves): after the tiles of a
//         block come its [K/group] rows of [16 n] mul bytes and [16 n] add bytes.
//
// INT8 and INT4 quantise the input per row, symmetric, to 15 bits, x = step * (128 * high + low), and sum
// exactly in int32: weight-only quantisation, for the error of the input is far below bfloat16's.
#pragma once

#include "common.h"

namespace hearth {

enum WeightKind { WEIGHT_BF16 = 0, WEIGHT_INT8 = 1, WEIGHT_INT4 = 2 };
enum GemmFlags {
  GEMM_ACCUMULATE = 1,  // out += ... instead of out = ..., with one rounding
  GEMM_OUT_F32 = 2,     // out is float32, else bfloat16
};

struct GemmArgs {
  const bf16* x;        // [M, K], rows x_stride elements apart
  int64_t x_stride;
  const void* weight;   // packed, aligned to 64 bytes
  const float* scale;   // [N rounded up to 32]; INT8 and INT4 only
  const float* bias;    // [N] or null
  void* out;            // [M, N], rows out_stride elements apart; not overlapping x
  int64_t out_stride;
  int64_t M, N, K;
  int32_t kind;         // WeightKind
  int32_t group;        // INT4: 32 or 64
  int32_t flags;
};

// The share of one thread. The caller holds a TileGuard on this thread. Shares are disjoint in `out`, and
// whatever they write no other share reads, so no barrier is needed inside.
void gemm_part(const GemmArgs& args, int part, int num_parts);

// The whole product on num_threads threads; for callers outside a parallel region.
void gemm(const GemmArgs& args, int num_threads);

size_t packed_bytes(int kind, int64_t N, int64_t K, int group);

// -- inside gemm*.cpp ------------------------------------------------------------------------------------
constexpr int64_t TILE_ROWS = 16, PANEL = 32;  // columns that a kernel computes together: two blocks
constexpr int64_t TILE_BYTES = 1024;

// Inputs of a share in the form that kernels read: for each 16 rows (zero-padded) its tiles of 16 x 64 bytes,
// [tiles of rows][tiles of k][16][64 bytes]. Quantised inputs have a tile of high and a tile of low bytes.
struct PackedInput {
  const uint8_t* tiles;
  int64_t num_rows;       // real ones
  int64_t num_k_tiles;
  const float* step;      // quantised: [rows padded to 16]
  const int32_t* sum_high;  // quantised: 128 * the sum of a row's high (low) bytes
  const int32_t* sum_low;
};

// Add the bias to c [num_rows][PANEL] and put it into out from (row, column) on.
void finish_rows(const GemmArgs& args, const float* c, int64_t row, int64_t num_rows, int64_t column);

// A panel kernel computes all rows of `input` x PANEL columns, and meanwhile fetches the `next_bytes` at `next`,
// which it will be called with after that.
void pack_input_bf16(const GemmArgs& args, int64_t row, int64_t num_rows, PackedInput* input);
void panel_bf16(const GemmArgs& args, const PackedInput& input, int64_t row, int64_t column, const uint8_t* panel,
                const uint8_t* next, int64_t next_bytes);
void gemv_bf16(const GemmArgs& args, int64_t column, int64_t end_column);

void pack_input_int8(const GemmArgs& args, int64_t row, int64_t num_rows, PackedInput* input);
void panel_int8(const GemmArgs& args, const PackedInput& input, int64_t row, int64_t column, const uint8_t* panel,
                const uint8_t* next, int64_t next_bytes);
void gemv_int8(const GemmArgs& args, int64_t column, int64_t end_column);
void unpack_int4(const GemmArgs& args, int64_t column, uint8_t* panel);

}  // namespace hearth
