// int8 and int4 weights: the input in 15 bits as two bytes, exact sums in int32, one scale at the end.
#include <cstring>

#include "gemm_inner.h"

namespace hearth {

namespace {

constexpr float LARGEST = 127 * 128;  // of a quantised input: high and low then both fit a signed byte

// One row: into row `r` of tiles of 64 k each.
void quantise_row(const bf16* x, int64_t K, int64_t num_k_tiles, uint8_t* to, float* step, int32_t* sum_high,
                  int32_t* sum_low) {
  __m512i top = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 16)
    top = max_magnitude(top, widen(_mm256_maskz_loadu_epi16(mask16(K - k), x + k)));
  const float largest = reduce_magnitude(top);
  const __m512 inverse = _mm512_set1_ps(largest > 0 ? LARGEST / largest : 0.0f);
  __m512i highs = _mm512_setzero_si512(), lows = highs;
  for (int64_t t = 0; t < num_k_tiles; ++t, to += PAIR_BYTES)
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

int64_t group_bytes(const GemmArgs& args) { return args.group == 32 ? 64 : 32; }  // of one tile

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

// The sums of R rows x one panel [row][block]; each weight is fetched from memory, once.
template <int R>
inline void panel_int8(const uint8_t* a, const uint8_t* w, int64_t num_k_tiles, __m512i (&high)[R][2],
                       __m512i (&low)[R][2]) {
  for (int64_t k = 0; k < num_k_tiles; ++k, a += PAIR_BYTES)
#pragma GCC unroll 2
    for (int block = 0; block < 2; ++block, w += TILE_BYTES)
#pragma GCC unroll 16
      for (int q = 0; q < 16; ++q) {
        prefetch(w + q * 64);
        multiply<R>(a + q * 4, _mm512_load_si512(w + q * 64), high, low, block);
      }
}

template <int R>
inline void panel_int4(const uint8_t* a, const uint8_t* w, int64_t num_k_tiles, int64_t group_bytes,
                       __m512i (&high)[R][2], __m512i (&low)[R][2]) {
  const uint8_t* groups = w + num_k_tiles * TILE_BYTES;
  for (int64_t k = 0; k < num_k_tiles; ++k, a += PAIR_BYTES)
#pragma GCC unroll 2
    for (int block = 0; block < 2; ++block, w += TILE_BYTES / 2, groups += group_bytes) {
      const Group first_half(groups), second_half(groups + group_bytes - 32);
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) {
        prefetch(w + q * 64);
        const __m512i v = _mm512_load_si512(w + q * 64);
        multiply<R>(a + q * 4, first_half.bytes(low_nibbles(v)), high, low, block);
        multiply<R>(a + q * 4 + 32, second_half.bytes(high_nibbles(v)), high, low, block);
      }
    }
}

template <int R>
void gemv(const GemmArgs& args, const PackedInput& input, int64_t column, int64_t end_column) {
  const int64_t panel_bytes = packed_bytes(args.kind, PANEL, args.K, args.group);
  const uint8_t* w = (const uint8_t*)args.weight + column / PANEL * panel_bytes;
  for (; column < end_column; column += PANEL, w += panel_bytes) {
    __m512i high[R][2], low[R][2];
    for (int r = 0; r < R; ++r) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
    if (args.kind == WEIGHT_INT8)
      panel_int8<R>(input.pairs, w, input.num_k_tiles, high, low);
    else
      panel_int4<R>(input.pairs, w, input.num_k_tiles, group_bytes(args), high, low);
    for (int r = 0; r < R; ++r)
      for (int block = 0; block < 2; ++block)
        finish(args, to_float(args, input, high[r][block], low[r][block], r, column + block * BLOCK), r,
               column + block * BLOCK);
  }
}

}  // namespace

void pack_input_int8(const GemmArgs& args, int64_t row, int64_t num_rows, PackedInput* input) {
  const int64_t num_k_tiles = (args.K + 63) / 64, num_groups = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
  const int64_t pairs_bytes = num_groups * num_k_tiles * PAIR_BYTES;
  uint8_t* pairs = (uint8_t*)scratch(SCRATCH_A, pairs_bytes + num_rows * 12);
  float* step = (float*)(pairs + pairs_bytes);
  int32_t *sum_high = (int32_t*)(step + num_rows), *sum_low = sum_high + num_rows;
  // The padding of the last group is whatever was there: its products are never looked at.
  for (int64_t r = 0; r < num_rows; ++r)
    quantise_row(args.x + (row + r) * args.x_stride, args.K, num_k_tiles,
                 pairs + r / TILE_ROWS * num_k_tiles * PAIR_BYTES + r % TILE_ROWS * 64, step + r, sum_high + r,
                 sum_low + r);
  *input = {pairs, num_rows, num_k_tiles, step, sum_high, sum_low};
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
  const int64_t num_tiles = (args.K + 63) / 64 * 2, step = group_bytes(args);
  const uint8_t* w = (const uint8_t*)args.weight + column / PANEL * packed_bytes(args.kind, PANEL, args.K, args.group);
  const uint8_t* groups = w + num_tiles * TILE_BYTES / 2;
  for (int64_t t = 0; t < num_tiles; ++t, w += TILE_BYTES / 2, panel += TILE_BYTES, groups += step) {
    const Group first_half(groups), second_half(groups + step - 32);
    for (int q = 0; q < 8; ++q) {
      prefetch(w + q * 64);
      const __m512i v = _mm512_load_si512(w + q * 64);
      _mm512_store_si512(panel + q * 64, first_half.bytes(low_nibbles(v)));
      _mm512_store_si512(panel + (q + 8) * 64, second_half.bytes(high_nibbles(v)));
    }
  }
}

void vectors_int8(const GemmArgs& args, const PackedInput& input, int64_t row, Panel panel) {
  for (int64_t r = 0; r < input.num_rows; r += 4) {
    __m512i high[4][2], low[4][2];
    for (int i = 0; i < 4; ++i) high[i][0] = high[i][1] = low[i][0] = low[i][1] = _mm512_setzero_si512();
    const uint8_t* a = input.pairs + r / TILE_ROWS * input.num_k_tiles * PAIR_BYTES + r % TILE_ROWS * 64;
    panel_int8<4>(a, panel.weight, input.num_k_tiles, high, low);
    for (int64_t i = 0; i < min64(4, input.num_rows - r); ++i)
      for (int block = 0; block < 2; ++block)
        finish(args, to_float(args, input, high[i][block], low[i][block], r + i, panel.column + block * BLOCK),
               row + r + i, panel.column + block * BLOCK);
  }
}

}  // namespace hearth

// Pack int8 weights [N, K], contiguous, -127 ... 127.
extern "C" void hearth_pack_int8(const int8_t* weight, int64_t N, int64_t K, uint8_t* packed, int num_threads) {
  using namespace hearth;
  const int64_t num_panels = (N + PANEL - 1) / PANEL, panel_bytes = (K + 63) / 64 * PAIR_BYTES;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    uint8_t* to = packed + panel * panel_bytes;
    std::memset(to, 128, panel_bytes);
    for (int64_t n = panel * PANEL; n < min64(N, (panel + 1) * PANEL); ++n) {
      uint8_t* column = to + n / BLOCK % 2 * TILE_BYTES + n % BLOCK * 4;
      for (int64_t k = 0; k < K; ++k)
        column[k / 64 * PAIR_BYTES + k % 64 / 4 * 64 + k % 4] = (uint8_t)(weight[n * K + k] + 128);
    }
  }
}

// Pack nibbles [N, depth], one a byte, with mul and add [N, depth / group]; depth is a multiple of 64.
extern "C" void hearth_pack_int4(const uint8_t* nibbles, const uint8_t* mul, const uint8_t* add, int group, int64_t N,
                                 int64_t depth, uint8_t* packed, int num_threads) {
  using namespace hearth;
  const int64_t num_panels = (N + PANEL - 1) / PANEL, num_groups = depth / group, per_tile = 64 / group;
  const int64_t panel_bytes = packed_bytes(WEIGHT_INT4, PANEL, depth, group);
#pragma omp parallel for num_threads(num_threads)
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    uint8_t* to = packed + panel * panel_bytes;
    std::memset(to, 0, panel_bytes);
    for (int64_t n = panel * PANEL; n < min64(N, (panel + 1) * PANEL); ++n) {
      const int64_t block = n / BLOCK % 2, lane = n % BLOCK;
      for (int64_t k = 0; k < depth; ++k)
        to[k / 64 * TILE_BYTES + block * 512 + k % 32 / 4 * 64 + lane * 4 + k % 4] |=
            nibbles[n * depth + k] << (k % 64 < 32 ? 0 : 4);
      for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t tile = g / per_tile * 2 + block;
        uint8_t* bytes = to + depth * 16 + (tile * per_tile + g % per_tile) * 32 + lane;
        bytes[0] = mul[n * num_groups + g];
        bytes[16] = add[n * num_groups + g];
      }
    }
  }
}
