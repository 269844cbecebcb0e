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

// Finishes the sums of one group of rows, a few vectors at a time between the steps of the next group: they would
// wait for the stores of the tile registers, and those for the last product, with nothing else to do.
struct Finisher {
  const GemmArgs& args;
  const PackedInput& input;
  int64_t row, column;
  bool around;
  const float* sums = nullptr;
  int64_t r = 0, end = 0;  // rows of the input

  void begin(const float* of, int64_t from, int64_t to) { sums = of, r = from, end = to; }

  template <bool INT8>
  void some(int64_t num_rows) {
    for (const int64_t stop = min64(end, r + num_rows); r < stop; ++r) {
      if (INT8) {
        const int32_t* c = (const int32_t*)sums + r % TILE_ROWS * 16;
        const auto load = [c](int64_t tile) { return _mm512_load_si512(c + tile * 256); };
        finish_panel(args, to_float(args, input, load(0), load(2), r, column),
                     to_float(args, input, load(1), load(3), r, column + BLOCK), row + r, column, around);
      } else {
        const float* c = sums + r % (2 * TILE_ROWS) / TILE_ROWS * 512 + r % TILE_ROWS * 16;
        finish_panel(args, _mm512_load_ps(c), _mm512_load_ps(c + 256), row + r, column, around);
      }
    }
  }
};

// sums [4][16][16]: (first input tile, first block), (first, second), (second, first), (second, second).
template <bool INT8, bool BOTH>
inline void multiply(const uint8_t* a, const uint8_t* b, int64_t num_k_tiles, bool first, float* sums,
                     const uint8_t*& next, int64_t lines, Finisher& finisher) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (BOTH) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    if (BOTH) {
      _tile_loadd(2, sums + 512, 64);
      _tile_loadd(3, sums + 768, 64);
    }
  }
  const int64_t rows_a_step = (finisher.end - finisher.r + num_k_tiles - 1) / num_k_tiles;
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
    // Weights that are used once: a tile is loaded faster from the first-level cache.
    if (lines > PAIR_BYTES / 64 / 2)
      for (int64_t i = 0; i < PAIR_BYTES / 64; ++i)
        _mm_prefetch((const char*)b + k + 2 * PAIR_BYTES + i * 64, _MM_HINT_T0);
    for (int64_t i = 0; i < lines; ++i, next += 64) _mm_prefetch((const char*)next, _MM_HINT_T1);
    finisher.some<INT8>(rows_a_step);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if (BOTH) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
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
  Finisher finisher{args, input, row, panel.column, writes_around(args, panel.column)};
  for (int64_t piece = 0; piece < num_pieces; ++piece) {
    const int64_t k = part_begin(num_k_tiles, piece, num_pieces);
    const int64_t depth = part_begin(num_k_tiles, piece + 1, num_pieces) - k;
    const uint8_t* b = panel.weight + k * PAIR_BYTES;
    for (int64_t g = 0; g < num_groups; ++g) {
      const uint8_t* a = input.pairs + (g * num_k_tiles + k) * PAIR_BYTES;
      const int64_t r = g * group_rows, end = min64(r + group_rows, input.num_rows);
      float* c = sums + g * SUMS;
      if (int8)
        multiply<true, true>(a, b, depth, piece == 0, c, panel.next, lines, finisher);
      else if (end - r > TILE_ROWS)
        multiply<false, true>(a, b, depth, piece == 0, c, panel.next, lines, finisher);
      else
        multiply<false, false>(a, b, depth, piece == 0, c, panel.next, lines, finisher);
      if (piece + 1 == num_pieces) finisher.begin(c, r, end);
    }
  }
  if (int8)
    finisher.some<true>(group_rows);
  else
    finisher.some<false>(group_rows);
  if (finisher.around) _mm_sfence();
}
#else
void tiles_panel(const GemmArgs&, const PackedInput&, int64_t, Panel) {}
#endif

}  // namespace hearth
