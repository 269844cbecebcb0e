// The AMX kernel: two tiles of input x two tiles of weights, so that each tile loaded is used twice.
//
// For bfloat16 the two tiles of input are 32 rows; for quantised weights they are the high and the low bytes of
// 16 rows. Depth is cut into pieces whose weights stay in the first-level cache while all rows pass by; sums of
// a piece are kept in memory until the next. Input is loaded with the hint not to displace those weights.
#include "gemm_inner.h"

namespace hearth {

#ifdef __AMX_TILE__
namespace {

constexpr int64_t K_TILES = 16;  // x a pair of tiles of weights = 32 KiB
constexpr int64_t SUMS = 4 * 256;

// sums [4][16][16]: (first input tile, first block), (first, second), (second, first), (second, second).
template <bool INT8, bool BOTH>
inline void multiply(const uint8_t* a, const uint8_t* b, int64_t num_k_tiles, bool first, void* sums,
                     const uint8_t*& next, int64_t lines) {
  uint8_t* c = (uint8_t*)sums;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (BOTH) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + TILE_BYTES, 64);
    if (BOTH) {
      _tile_loadd(2, c + 2 * TILE_BYTES, 64);
      _tile_loadd(3, c + 3 * TILE_BYTES, 64);
    }
  }
  for (int64_t k = 0; k < num_k_tiles * PAIR_BYTES; k += PAIR_BYTES) {
    _tile_stream_loadd(4, a + k, 64);
    _tile_loadd(6, b + k, 64);
    _tile_loadd(7, b + k + TILE_BYTES, 64);
    if (INT8) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (BOTH) {
      _tile_stream_loadd(5, a + k + TILE_BYTES, 64);
      if (INT8) {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      } else {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    for (int64_t i = 0; i < lines; ++i, next += 64) _mm_prefetch((const char*)next, _MM_HINT_T1);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + TILE_BYTES, 64);
  if (BOTH) {
    _tile_stored(2, c + 2 * TILE_BYTES, 64);
    _tile_stored(3, c + 3 * TILE_BYTES, 64);
  }
}

void finish_group_bf16(const GemmArgs& args, const float* sums, int64_t row, int64_t num_rows, int64_t column) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const float* c = sums + r / TILE_ROWS * 512 + r % TILE_ROWS * 16;
    finish(args, _mm512_load_ps(c), row + r, column);
    finish(args, _mm512_load_ps(c + 256), row + r, column + BLOCK);
  }
}

void finish_group_int8(const GemmArgs& args, const PackedInput& input, const int32_t* sums, int64_t r, int64_t end,
                       int64_t row, int64_t column) {
  for (; r < end; ++r, sums += 16) {
    finish_int8(args, input, _mm512_load_si512(sums), _mm512_load_si512(sums + 512), r, row, column);
    finish_int8(args, input, _mm512_load_si512(sums + 256), _mm512_load_si512(sums + 768), r, row, column + BLOCK);
  }
}

}  // namespace

void tiles_panel(const GemmArgs& args, const PackedInput& input, int64_t row, Panel panel) {
  const bool int8 = args.kind != WEIGHT_BF16;
  const int64_t group_rows = int8 ? TILE_ROWS : 2 * TILE_ROWS, num_k_tiles = input.num_k_tiles;
  const int64_t num_groups = (input.num_rows + group_rows - 1) / group_rows;
  // With one group of rows nothing is used twice, and sums stay in registers.
  const int64_t num_pieces = num_groups == 1 ? 1 : (num_k_tiles + K_TILES - 1) / K_TILES;
  const int64_t num_steps = num_groups * num_k_tiles, lines = (panel.next_bytes / 64 + num_steps - 1) / num_steps;
  float* sums = (float*)scratch(SCRATCH_C, num_groups * SUMS * 4);
  for (int64_t piece = 0; piece < num_pieces; ++piece) {
    const int64_t k = part_begin(num_k_tiles, piece, num_pieces);
    const int64_t depth = part_begin(num_k_tiles, piece + 1, num_pieces) - k;
    const uint8_t* b = panel.weight + k * PAIR_BYTES;
    for (int64_t g = 0; g < num_groups; ++g) {
      const uint8_t* a = input.pairs + (g * num_k_tiles + k) * PAIR_BYTES;
      const int64_t r = g * group_rows, num_rows = min64(group_rows, input.num_rows - r);
      float* c = sums + g * SUMS;
      if (int8)
        multiply<true, true>(a, b, depth, piece == 0, c, panel.next, lines);
      else if (num_rows > TILE_ROWS)
        multiply<false, true>(a, b, depth, piece == 0, c, panel.next, lines);
      else
        multiply<false, false>(a, b, depth, piece == 0, c, panel.next, lines);
      if (piece + 1 < num_pieces) continue;
      if (int8)
        finish_group_int8(args, input, (const int32_t*)c, r, r + num_rows, row, panel.column);
      else
        finish_group_bf16(args, c, row + r, num_rows, panel.column);
    }
  }
}
#else
void tiles_panel(const GemmArgs&, const PackedInput&, int64_t, Panel) {}
#endif

}  // namespace hearth
