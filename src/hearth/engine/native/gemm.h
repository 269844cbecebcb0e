// Linear layers: out[M, N] = x[M, K] weight[N, K]^T + bias, weights packed once at load.
//
// Packed layouts. N is padded to 32; 32 columns are a panel of two blocks of 16, and panels follow one another,
// so that a range of columns is one contiguous range of memory, read front to back.
//   BF16: per panel, K padded to 32 with zeros: [K/32][2 blocks] tiles of [16 pairs of k][16 n][2 k] bfloat16
//         (1 KiB), which is the B operand of tdpbf16ps, and row by row the operand of vdpbf16ps.
//   INT8: per panel, K padded to 64: [K/64][2 blocks] tiles of [16 quads of k][16 n][4 k] unsigned bytes
//         (1 KiB), which hold w + 128, |w| <= 127, with weight = w * scale[n]; the B operand of tdpbsud and
//         vpdpbusd.
//   INT4: the same tiles in 512 bytes: byte (n, k) of the first 8 rows of quads is the low nibble, of the last 8
//         rows the high nibble. A nibble q of group g stands for the INT8 byte q * mul[g, n] + add[g, n]: a
//         group's step and zero point are multiples of its channel's step, so unpacking to INT8 tiles is exact
//         and has no floating point. Groups of 64 k (a tile) or 32 (each of its halves): after the tiles of a
//         panel come, for each tile, its group or two of [16 n] mul bytes and [16 n] add bytes.
//
// INT8 and INT4 quantise the input per row, symmetric, to 15 bits, x = step * (128 * high + low), and sum
// exactly in int32 (K < 65536): weight-only quantisation, for the error of the input is below bfloat16's.
#pragma once

#include "common.h"

namespace hearth {

enum WeightKind { WEIGHT_BF16 = 0, WEIGHT_INT8 = 1, WEIGHT_INT4 = 2 };
enum GemmFlags {
  GEMM_ACCUMULATE = 1,  // out += ... instead of out = ..., with one rounding
  GEMM_OUT_F32 = 2,     // out is float32, else bfloat16
};

struct GemmArgs {
  const bf16* x;  // [M, K], rows x_stride elements apart
  int64_t x_stride;
  const void* weight;  // packed, aligned to 64 bytes
  const float* scale;  // [N rounded up to 32]; INT8 and INT4 only
  const float* bias;   // [N] or null
  void* out;           // [M, N], rows out_stride elements apart; not overlapping x
  int64_t out_stride;
  int64_t M, N, K;
  int32_t kind;   // WeightKind
  int32_t group;  // INT4: 32 or 64
  int32_t flags;
};

// The share of one thread. The caller holds a TileGuard on this thread. Shares are disjoint in `out`, and
// whatever they write no other share reads, so no barrier is needed inside.
void gemm_part(const GemmArgs& args, int part, int num_parts);

// The whole product on num_threads threads; for callers outside a parallel region.
void gemm(const GemmArgs& args, int num_threads);

size_t packed_bytes(int kind, int64_t N, int64_t K, int group);

}  // namespace hearth
