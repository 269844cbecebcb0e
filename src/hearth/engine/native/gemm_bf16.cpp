// bfloat16 weights: packing, a dot-product kernel for few rows, and tile (or AVX-512) kernels for more.
#include <cstring>

#include "gemm_inner.h"

namespace hearth {

namespace {

// R rows x the panels of [column, end_column); x is [R][depth], padded with zeros.
template <int R>
void gemv(const GemmArgs& args, const bf16* x, int64_t depth, int64_t column, int64_t end_column) {
  const uint8_t* w = (const uint8_t*)args.weight + column * depth * 2;
  for (; column < end_column; column += PANEL) {
    __m512 sum[R][2][2];  // block, chain
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 4; ++i) sum[r][i / 2][i % 2] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 32)
#pragma GCC unroll 2
      for (int block = 0; block < 2; ++block, w += TILE_BYTES)
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p) {
          prefetch(w + p * 64);
          const __m512bh pairs = (__m512bh)_mm512_load_si512(w + p * 64);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            int32_t two;
            std::memcpy(&two, x + r * depth + k + p * 2, 4);
            __m512& to = sum[r][block][p % 2];
            to = _mm512_dpbf16_ps(to, pairs, (__m512bh)_mm512_set1_epi32(two));
          }
        }
    for (int r = 0; r < R; ++r)
      for (int block = 0; block < 2; ++block)
        finish(args, _mm512_add_ps(sum[r][block][0], sum[r][block][1]), r, column + block * BLOCK);
  }
}

// R rows of one tile x one panel, without tile registers.
template <int R>
void multiply(const uint8_t* a, const uint8_t* b, int64_t num_k_tiles, __m512 (&sum)[8][2]) {
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < num_k_tiles; ++k, a += PAIR_BYTES, b += PAIR_BYTES)
    for (int p = 0; p < 16; ++p) {
      const __m512bh left = (__m512bh)_mm512_load_si512(b + p * 64);
      const __m512bh right = (__m512bh)_mm512_load_si512(b + TILE_BYTES + p * 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512bh two = (__m512bh)_mm512_set1_epi32(*(const int32_t*)(a + r * 64 + p * 4));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], left, two);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], right, two);
      }
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
  const int64_t num_k_tiles = (args.K + 31) / 32, num_padded = round_up(num_rows, TILE_ROWS);
  const int64_t group_bytes = num_k_tiles * PAIR_BYTES, num_groups = (num_rows + 31) / 32;
  uint8_t* pairs = (uint8_t*)scratch(SCRATCH_A, num_groups * group_bytes);
  for (int64_t r = 0; r < num_padded; ++r) {
    const bf16* x = args.x + (row + r) * args.x_stride;
    uint8_t* to = pairs + r / 32 * group_bytes + r % 32 * 64;
    for (int64_t k = 0; k < num_k_tiles; ++k, to += PAIR_BYTES) {
      const int64_t left = r < num_rows ? min64(32, args.K - k * 32) : 0;
      const __mmask32 mask = left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1;
      _mm512_store_si512(to, _mm512_maskz_loadu_epi16(mask, x + k * 32));
    }
  }
  *input = {pairs, num_rows, num_k_tiles, nullptr, nullptr, nullptr};
}

void vectors_bf16(const GemmArgs& args, const PackedInput& input, int64_t row, Panel panel) {
  __m512 sum[8][2];
  for (int64_t r = 0; r < input.num_rows; r += 8) {
    const uint8_t* a = input.pairs + r / 32 * input.num_k_tiles * PAIR_BYTES + r % 32 * 64;
    const int64_t num_rows = min64(8, input.num_rows - r);
    if (num_rows > 4)
      multiply<8>(a, panel.weight, input.num_k_tiles, sum);
    else
      multiply<4>(a, panel.weight, input.num_k_tiles, sum);
    for (int64_t i = 0; i < num_rows; ++i) {
      finish(args, sum[i][0], row + r + i, panel.column);
      finish(args, sum[i][1], row + r + i, panel.column + BLOCK);
    }
  }
}

}  // namespace hearth

// Pack weight [N, K] with rows `stride` elements apart into `packed` (hearth_packed_bytes of them).
extern "C" void hearth_pack_bf16(const void* weight, int64_t stride, int64_t N, int64_t K, void* packed,
                                 int num_threads) {
  using namespace hearth;
  const int64_t num_panels = (N + PANEL - 1) / PANEL, panel_bytes = (K + 31) / 32 * PAIR_BYTES;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    uint8_t* to = (uint8_t*)packed + panel * panel_bytes;
    std::memset(to, 0, panel_bytes);
    for (int64_t n = panel * PANEL; n < min64(N, (panel + 1) * PANEL); ++n) {
      const bf16* from = (const bf16*)weight + n * stride;
      uint8_t* column = to + n / BLOCK % 2 * TILE_BYTES + n % BLOCK * 4;
      for (int64_t k = 0; k < K; k += 2)
        std::memcpy(column + k / 32 * PAIR_BYTES + k % 32 * 32, from + k, k + 1 < K ? 4 : 2);
    }
  }
}
