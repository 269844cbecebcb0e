// int8 and int4 weights: the input in 15 bits as two bytes, exact sums in int32, one scale at the end.
#include <cmath>
#include <cstring>

#include "gemm.h"

namespace hearth {

namespace {

constexpr int64_t PREFETCH_AHEAD = 4096;  // bytes
constexpr int64_t INPUT_TILE = 2 * TILE_BYTES;  // a tile of high bytes and one of low bytes
constexpr float LARGEST = 127 * 128;  // of a quantised input: high and low then both fit a signed byte

// One row: into row `r` of tiles of 64 k each.
void quantise_row(const bf16* x, int64_t K, int64_t num_k_tiles, uint8_t* to, float* step, int32_t* sum_high,
                  int32_t* sum_low) {
  const __m512 no_sign = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FFFFFFF));
  __m512 top = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t k = 0; k < K; k += 16) {
    const __m512 value = _mm512_and_ps(widen(_mm256_maskz_loadu_epi16(mask16(K - k), x + k)), no_sign);
    nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    top = _mm512_max_ps(top, value);
  }
  const float largest = nan ? NAN : _mm512_reduce_max_ps(top);
  const __m512 inverse = _mm512_set1_ps(largest > 0 ? LARGEST / largest : 0.0f);
  __m512i highs = _mm512_setzero_si512(), lows = highs;
  for (int64_t t = 0; t < num_k_tiles; ++t, to += INPUT_TILE)
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t k = t * 64 + i * 16;
      const __m512 value = widen(_mm256_maskz_loadu_epi16(mask16(K - k), x + k));
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
      const __m512i low = _mm512_sub_epi32(q, _mm512_slli_epi32(high, 7));
      highs = _mm512_add_epi32(highs, high);
      lows = _mm512_add_epi32(lows, low);
      _mm_store_si128((__m128i*)(to + i * 16), _mm512_cvtepi32_epi8(high));
      _mm_store_si128((__m128i*)(to + TILE_BYTES + i * 16), _mm512_cvtepi32_epi8(low));
    }
  *step = largest / LARGEST;
  *sum_high = 128 * _mm512_reduce_add_epi32(highs);
  *sum_low = 128 * _mm512_reduce_add_epi32(lows);
}

// From exact sums to floats: c[i] of the 16 columns from `column` for row r of the packed input.
inline __m512 to_float(const GemmArgs& args, const PackedInput& input, int64_t r, int64_t column, __m512i high,
                       __m512i low) {
  high = _mm512_sub_epi32(high, _mm512_set1_epi32(input.sum_high[r]));
  low = _mm512_sub_epi32(low, _mm512_set1_epi32(input.sum_low[r]));
  const __m512 sum =
      _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(128.0f), _mm512_cvtepi32_ps(low));
  return _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_loadu_ps(args.scale + column)), _mm512_set1_ps(input.step[r]));
}

// The bytes of a group of int4 weights: byte = nibble * mul + add, per column.
struct Group {
  __m512i mul, add;
  explicit Group(const uint8_t* p) {
    const __m512i low_byte = _mm512_set1_epi32(0x80008000);     // byte 0 of each column into both 16-bit lanes
    const __m512i all_bytes = _mm512_setzero_si512();           // byte 0 of each column into all four
    const __m512i lane = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0);
    const __m512i muls = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)p));
    const __m512i adds = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)(p + 16)));
    mul = _mm512_shuffle_epi8(muls, _mm512_or_si512(lane, low_byte));
    add = _mm512_shuffle_epi8(adds, _mm512_or_si512(lane, all_bytes));
  }
  // Each nibble stands in a byte of its own; products stay below 256, so two bytes multiply as one 16-bit lane.
  __m512i bytes(__m512i nibbles) const { return _mm512_add_epi8(_mm512_mullo_epi16(nibbles, mul), add); }
};

inline __m512i low_nibbles(__m512i v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline __m512i high_nibbles(__m512i v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }

int64_t block_bytes(const GemmArgs& args) { return packed_bytes(args.kind, PANEL, args.K, args.group) / 2; }

// Adds the products of one row of a weight tile (16 columns x 4 k) with R rows of input.
template <int R>
inline void multiply(const uint8_t* a, __m512i w, __m512i (&high)[R][2], __m512i (&low)[R][2], int chain) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m512i x_high = _mm512_set1_epi32(*(const int32_t*)(a + r * 64));
    const __m512i x_low = _mm512_set1_epi32(*(const int32_t*)(a + TILE_BYTES + r * 64));
    high[r][chain] = _mm512_dpbusd_epi32(high[r][chain], w, x_high);
    low[r][chain] = _mm512_dpbusd_epi32(low[r][chain], w, x_low);
  }
}

template <int R>
void gemv(const GemmArgs& args, const PackedInput& input, int64_t column, int64_t end_column) {
  alignas(64) float c[R * PANEL];
  const int64_t stride = block_bytes(args), num_k_tiles = input.num_k_tiles;
  const uint8_t* w = (const uint8_t*)args.weight + column / 16 * stride;
  for (; column < end_column; column += PANEL) {
    for (int block = 0; block < 2; ++block, w += stride) {
      __m512i high[R][2], low[R][2];
      for (int r = 0; r < R; ++r) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
      const uint8_t* a = input.tiles;
      if (args.kind == WEIGHT_INT8) {
        for (int64_t k = 0; k < num_k_tiles; ++k, a += INPUT_TILE)
#pragma GCC unroll 16
          for (int q = 0; q < 16; ++q) {
            const uint8_t* row = w + k * TILE_BYTES + q * 64;
            _mm_prefetch((const char*)row + PREFETCH_AHEAD, _MM_HINT_T0);
            multiply<R>(a + q * 4, _mm512_load_si512(row), high, low, q % 2);
          }
      } else {
        const uint8_t* groups = w + num_k_tiles * TILE_BYTES / 2;
        const int64_t second = args.group == 32 ? 32 : 0;
        for (int64_t k = 0; k < num_k_tiles; ++k, a += INPUT_TILE, groups += 32 + second) {
          const Group first_half(groups), second_half(groups + second);
#pragma GCC unroll 8
          for (int q = 0; q < 8; ++q) {
            const uint8_t* row = w + k * TILE_BYTES / 2 + q * 64;
            _mm_prefetch((const char*)row + PREFETCH_AHEAD, _MM_HINT_T0);
            const __m512i v = _mm512_load_si512(row);
            multiply<R>(a + q * 4, first_half.bytes(low_nibbles(v)), high, low, 0);
            multiply<R>(a + q * 4 + 32, second_half.bytes(high_nibbles(v)), high, low, 1);
          }
        }
      }
      for (int r = 0; r < R; ++r)
        _mm512_store_ps(c + r * PANEL + block * 16,
                        to_float(args, input, r, column + block * 16, _mm512_add_epi32(high[r][0], high[r][1]),
                                 _mm512_add_epi32(low[r][0], low[r][1])));
    }
    finish_rows(args, c, 0, R, column);
  }
}

// 16 rows (one tile of high bytes, one of low) x two blocks of columns: sums [2][16][PANEL], high then low.
#ifdef __AMX_TILE__
inline void tiles_int8(const uint8_t* a, const uint8_t* b, int64_t num_k_tiles, const uint8_t*& next, int lines,
                       int32_t* sums) {
  const uint8_t* b1 = b + num_k_tiles * TILE_BYTES;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < num_k_tiles; ++k, a += INPUT_TILE, b += TILE_BYTES, b1 += TILE_BYTES) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b1, 64);
    _tile_loadd(5, a + TILE_BYTES, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
    for (int i = 0; i < lines; ++i, next += 64) _mm_prefetch((const char*)next, _MM_HINT_T1);
  }
  _tile_stored(0, sums, PANEL * 4);
  _tile_stored(1, sums + 16, PANEL * 4);
  _tile_stored(2, sums + TILE_ROWS * PANEL, PANEL * 4);
  _tile_stored(3, sums + TILE_ROWS * PANEL + 16, PANEL * 4);
}
#endif

// The same for 4 rows from row r of the tile, without tile registers.
void vectors_int8(const uint8_t* a, const uint8_t* b, int64_t num_k_tiles, int32_t* sums) {
  __m512i high[4][2], low[4][2];
  for (int r = 0; r < 4; ++r) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
  const uint8_t* b1 = b + num_k_tiles * TILE_BYTES;
  for (int64_t k = 0; k < num_k_tiles; ++k, a += INPUT_TILE, b += TILE_BYTES, b1 += TILE_BYTES)
    for (int q = 0; q < 16; ++q) {
      multiply<4>(a + q * 4, _mm512_load_si512(b + q * 64), high, low, 0);
      multiply<4>(a + q * 4, _mm512_load_si512(b1 + q * 64), high, low, 1);
    }
  for (int r = 0; r < 4; ++r)
    for (int block = 0; block < 2; ++block) {
      _mm512_store_si512(sums + r * PANEL + block * 16, high[r][block]);
      _mm512_store_si512(sums + (TILE_ROWS + r) * PANEL + block * 16, low[r][block]);
    }
}

}  // namespace

void pack_input_int8(const GemmArgs& args, int64_t row, int64_t num_rows, PackedInput* input) {
  const int64_t num_k_tiles = (args.K + 63) / 64, padded = round_up(num_rows, TILE_ROWS);
  const int64_t row_tile = num_k_tiles * INPUT_TILE;
  uint8_t* tiles = (uint8_t*)scratch(SCRATCH_A, padded / TILE_ROWS * row_tile + padded * 12);
  float* step = (float*)(tiles + padded / TILE_ROWS * row_tile);
  int32_t *sum_high = (int32_t*)(step + padded), *sum_low = sum_high + padded;
  for (int64_t r = 0; r < num_rows; ++r)
    quantise_row(args.x + (row + r) * args.x_stride, args.K, num_k_tiles,
                 tiles + r / TILE_ROWS * row_tile + r % TILE_ROWS * 64, step + r, sum_high + r, sum_low + r);
  for (int64_t r = num_rows; r < padded; ++r) {  // whatever the rest of the last tile holds must be no trap
    step[r] = 0.0f;
    sum_high[r] = sum_low[r] = 0;
  }
  *input = {tiles, num_rows, num_k_tiles, step, sum_high, sum_low};
}

void gemv_int8(const GemmArgs& args, int64_t column, int64_t end_column) {
  PackedInput input;
  pack_input_int8(args, 0, args.M, &input);
  if (args.M == 1) gemv<1>(args, input, column, end_column);
  if (args.M == 2) gemv<2>(args, input, column, end_column);
  if (args.M == 3) gemv<3>(args, input, column, end_column);
  if (args.M == 4) gemv<4>(args, input, column, end_column);
}

void unpack_int4(const GemmArgs& args, int64_t column, uint8_t* panel) {
  const int64_t num_k_tiles = (args.K + 63) / 64, second = args.group == 32 ? 32 : 0, stride = block_bytes(args);
  const uint8_t* w = (const uint8_t*)args.weight + column / 16 * stride;
  for (int block = 0; block < 2; ++block, w += stride) {
    const uint8_t* groups = w + num_k_tiles * TILE_BYTES / 2;
    for (int64_t k = 0; k < num_k_tiles; ++k, panel += TILE_BYTES, groups += 32 + second) {
      const Group first_half(groups), second_half(groups + second);
      for (int q = 0; q < 8; ++q) {
        const uint8_t* row = w + k * TILE_BYTES / 2 + q * 64;
        _mm_prefetch((const char*)row + PREFETCH_AHEAD, _MM_HINT_T0);
        const __m512i v = _mm512_load_si512(row);
        _mm512_store_si512(panel + q * 64, first_half.bytes(low_nibbles(v)));
        _mm512_store_si512(panel + (q + 8) * 64, second_half.bytes(high_nibbles(v)));
      }
    }
  }
}

void panel_int8(const GemmArgs& args, const PackedInput& input, int64_t row, int64_t column, const uint8_t* panel,
                const uint8_t* next, int64_t next_bytes) {
  alignas(64) int32_t sums[2 * TILE_ROWS * PANEL];
  alignas(64) float c[TILE_ROWS * PANEL];
  const int64_t kt = input.num_k_tiles, num_row_tiles = (input.num_rows + TILE_ROWS - 1) / TILE_ROWS;
  const int64_t num_steps = num_row_tiles * kt;
  const int lines = (int)((next_bytes / 64 + num_steps - 1) / num_steps);
  for (int64_t i = 0; i < num_row_tiles; ++i) {
    const uint8_t* a = input.tiles + i * kt * INPUT_TILE;
    const int64_t num_rows = min64(TILE_ROWS, input.num_rows - i * TILE_ROWS);
#ifdef __AMX_TILE__
    if (use_amx()) tiles_int8(a, panel, kt, next, lines, sums);
#endif
    if (!use_amx())
      for (int64_t r = 0; r < num_rows; r += 4) vectors_int8(a + r * 64, panel, kt, sums + r * PANEL);
    for (int64_t r = 0; r < num_rows; ++r)
      for (int64_t n = 0; n < PANEL; n += 16)
        _mm512_store_ps(c + r * PANEL + n,
                        to_float(args, input, i * TILE_ROWS + r, column + n,
                                 _mm512_load_si512(sums + r * PANEL + n),
                                 _mm512_load_si512(sums + (TILE_ROWS + r) * PANEL + n)));
    finish_rows(args, c, row + i * TILE_ROWS, num_rows, column);
  }
}

}  // namespace hearth

// Pack int8 weights [N, K], contiguous, -127 … 127.
extern "C" void hearth_pack_int8(const int8_t* weight, int64_t N, int64_t K, uint8_t* packed, int num_threads) {
  using namespace hearth;
  const int64_t num_blocks = round_up(N, PANEL) / 16, num_k_tiles = (K + 63) / 64;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t block = 0; block < num_blocks; ++block) {
    uint8_t* to = packed + block * num_k_tiles * TILE_BYTES;
    std::memset(to, 128, num_k_tiles * TILE_BYTES);
    for (int64_t n = block * 16; n < min64(N, block * 16 + 16); ++n)
      for (int64_t k = 0; k < K; ++k) to[k / 4 * 64 + n % 16 * 4 + k % 4] = (uint8_t)(weight[n * K + k] + 128);
  }
}

// Pack nibbles [N, depth], one a byte, with mul and add [N, depth / group]; depth is a multiple of 64.
extern "C" void hearth_pack_int4(const uint8_t* nibbles, const uint8_t* mul, const uint8_t* add, int group, int64_t N,
                                 int64_t depth, uint8_t* packed, int num_threads) {
  using namespace hearth;
  const int64_t num_blocks = round_up(N, PANEL) / 16, num_groups = depth / group;
  const int64_t stride = depth * 8 + num_groups * 32;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t block = 0; block < num_blocks; ++block) {
    uint8_t* to = packed + block * stride;
    std::memset(to, 0, stride);
    for (int64_t n = block * 16; n < min64(N, block * 16 + 16); ++n) {
      for (int64_t k = 0; k < depth; ++k)
        to[k / 64 * 512 + k % 32 / 4 * 64 + n % 16 * 4 + k % 4] |= nibbles[n * depth + k] << (k % 64 < 32 ? 0 : 4);
      for (int64_t g = 0; g < num_groups; ++g) {
        to[depth * 8 + g * 32 + n % 16] = mul[n * num_groups + g];
        to[depth * 8 + g * 32 + 16 + n % 16] = add[n * num_groups + g];
      }
    }
  }
}
