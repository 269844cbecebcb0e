// bfloat16 weights: packing, a dot-product kernel for few rows, and tile (or AVX-512) kernels for more.
#include <cstring>

#include "gemm.h"

namespace hearth {

namespace {

constexpr int64_t PREFETCH_AHEAD = 4096;  // bytes

// R rows x the panels of [column, end_column); x is [R][depth], padded with zeros.
template <int R>
void gemv(const GemmArgs& args, const bf16* x, int64_t depth, int64_t column, int64_t end_column) {
  const uint8_t* w = (const uint8_t*)args.weight + column * depth * 2;
  alignas(64) float c[R * PANEL];
  for (; column < end_column; column += PANEL) {
    for (int block = 0; block < 2; ++block) {
      __m512 sum[R][4];
      for (int r = 0; r < R; ++r)
        for (int u = 0; u < 4; ++u) sum[r][u] = _mm512_setzero_ps();
      for (int64_t k = 0; k < depth; k += 32, w += TILE_BYTES) {
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p) {
          _mm_prefetch((const char*)w + p * 64 + PREFETCH_AHEAD, _MM_HINT_T0);
          const __m512bh pairs = (__m512bh)_mm512_load_si512(w + p * 64);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            int32_t two;
            std::memcpy(&two, x + r * depth + k + p * 2, 4);
            sum[r][p % 4] = _mm512_dpbf16_ps(sum[r][p % 4], pairs, (__m512bh)_mm512_set1_epi32(two));
          }
        }
      }
      for (int r = 0; r < R; ++r)
        _mm512_store_ps(c + r * PANEL + block * 16, _mm512_add_ps(_mm512_add_ps(sum[r][0], sum[r][1]),
                                                                 _mm512_add_ps(sum[r][2], sum[r][3])));
    }
    finish_rows(args, c, 0, R, column);
  }
}

#ifdef __AMX_TILE__
// Two tiles of rows (or one) x two blocks of columns, over all of k.
template <bool TWO>
inline void tiles_bf16(const uint8_t* a, const uint8_t* b, int64_t num_k_tiles, const uint8_t*& next, int lines,
                       float* c) {
  const uint8_t *a1 = a + num_k_tiles * TILE_BYTES, *b1 = b + num_k_tiles * TILE_BYTES;
  _tile_zero(0);
  _tile_zero(1);
  if (TWO) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < num_k_tiles * TILE_BYTES; k += TILE_BYTES) {
    _tile_loadd(4, a + k, 64);
    _tile_loadd(6, b + k, 64);
    _tile_loadd(7, b1 + k, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (TWO) {
      _tile_loadd(5, a1 + k, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    for (int i = 0; i < lines; ++i, next += 64) _mm_prefetch((const char*)next, _MM_HINT_T1);
  }
  _tile_stored(0, c, PANEL * 4);
  _tile_stored(1, c + 16, PANEL * 4);
  if (TWO) {
    _tile_stored(2, c + TILE_ROWS * PANEL, PANEL * 4);
    _tile_stored(3, c + TILE_ROWS * PANEL + 16, PANEL * 4);
  }
}
#endif

// R rows of one tile of rows x two blocks of columns, without tile registers.
template <int R>
void vectors_bf16(const uint8_t* a, const uint8_t* b, int64_t num_k_tiles, float* c) {
  __m512 sum[R][2];
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  const uint8_t* b1 = b + num_k_tiles * TILE_BYTES;
  for (int64_t k = 0; k < num_k_tiles; ++k, a += TILE_BYTES, b += TILE_BYTES, b1 += TILE_BYTES)
    for (int p = 0; p < 16; ++p) {
      const __m512bh left = (__m512bh)_mm512_load_si512(b + p * 64);
      const __m512bh right = (__m512bh)_mm512_load_si512(b1 + p * 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512bh two = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(a + r * 64 + p * 4));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], left, two);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], right, two);
      }
    }
  for (int r = 0; r < R; ++r) {
    _mm512_store_ps(c + r * PANEL, sum[r][0]);
    _mm512_store_ps(c + r * PANEL + 16, sum[r][1]);
  }
}

}  // namespace

void gemv_bf16(const GemmArgs& args, int64_t column, int64_t end_column) {
  const int64_t depth = round_up(args.K, 32);
  bf16* x = (bf16*)scratch(SCRATCH_A, args.M * depth * 2);
  for (int64_t r = 0; r < args.M; ++r) {
    std::memcpy(x + r * depth, args.x + r * args.x_stride, args.K * 2);
    std::memset(x + r * depth + args.K, 0, (depth - args.K) * 2);
  }
  if (args.M == 1) gemv<1>(args, x, depth, column, end_column);
  if (args.M == 2) gemv<2>(args, x, depth, column, end_column);
  if (args.M == 3) gemv<3>(args, x, depth, column, end_column);
  if (args.M == 4) gemv<4>(args, x, depth, column, end_column);
}

void pack_input_bf16(const GemmArgs& args, int64_t row, int64_t num_rows, PackedInput* input) {
  const int64_t num_k_tiles = (args.K + 31) / 32, num_row_tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS;
  uint8_t* tiles = (uint8_t*)scratch(SCRATCH_A, num_row_tiles * num_k_tiles * TILE_BYTES);
  for (int64_t r = 0; r < num_row_tiles * TILE_ROWS; ++r) {
    const bf16* x = args.x + (row + r) * args.x_stride;
    uint8_t* to = tiles + r / TILE_ROWS * num_k_tiles * TILE_BYTES + r % TILE_ROWS * 64;
    for (int64_t k = 0; k < num_k_tiles; ++k, to += TILE_BYTES) {
      const int64_t left = r < num_rows ? min64(32, args.K - k * 32) : 0;
      const __mmask32 mask = left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1;
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(mask, x + k * 32));
    }
  }
  *input = {tiles, num_rows, num_k_tiles, nullptr, nullptr, nullptr};
}

void panel_bf16(const GemmArgs& args, const PackedInput& input, int64_t row, int64_t column, const uint8_t* panel,
                const uint8_t* next, int64_t next_bytes) {
  alignas(64) float c[2 * TILE_ROWS * PANEL];
  const int64_t kt = input.num_k_tiles, num_row_tiles = (input.num_rows + TILE_ROWS - 1) / TILE_ROWS;
#ifdef __AMX_TILE__
  if (use_amx()) {
    // The next panel is fetched while this one is used, a few lines a step.
    const int64_t num_steps = (num_row_tiles + 1) / 2 * kt;
    const int lines = (int)((next_bytes / 64 + num_steps - 1) / num_steps);
    for (int64_t i = 0; i < num_row_tiles; i += 2) {
      const uint8_t* a = input.tiles + i * kt * TILE_BYTES;
      if (i + 1 < num_row_tiles)
        tiles_bf16<true>(a, panel, kt, next, lines, c);
      else
        tiles_bf16<false>(a, panel, kt, next, lines, c);
      finish_rows(args, c, row + i * TILE_ROWS, min64(2 * TILE_ROWS, input.num_rows - i * TILE_ROWS), column);
    }
    return;
  }
#else
  (void)next, (void)next_bytes;
#endif
  for (int64_t r = 0; r < input.num_rows; r += 8) {
    const uint8_t* a = input.tiles + r / TILE_ROWS * kt * TILE_BYTES + r % TILE_ROWS * 64;
    const int64_t left = min64(8, input.num_rows - r);
    if (left > 4)
      vectors_bf16<8>(a, panel, kt, c);
    else
      vectors_bf16<4>(a, panel, kt, c);
    finish_rows(args, c, row + r, left, column);
  }
}

}  // namespace hearth

// Pack weight [N, K] with rows `stride` elements apart into `packed` (hearth_packed_bytes of them).
extern "C" void hearth_pack_bf16(const void* weight, int64_t stride, int64_t N, int64_t K, void* packed,
                                 int num_threads) {
  using namespace hearth;
  const int64_t num_blocks = round_up(N, PANEL) / 16, num_k_tiles = (K + 31) / 32;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t block = 0; block < num_blocks; ++block) {
    uint32_t* to = (uint32_t*)packed + block * num_k_tiles * TILE_BYTES / 4;
    std::memset(to, 0, num_k_tiles * TILE_BYTES);
    for (int64_t n = block * 16; n < min64(N, block * 16 + 16); ++n) {
      const bf16* from = (const bf16*)weight + n * stride;
      for (int64_t p = 0; p < K / 2; ++p) std::memcpy(to + p * 16 + n % 16, from + p * 2, 4);
      if (K % 2) to[K / 2 * 16 + n % 16] = from[K - 1];
    }
  }
}
