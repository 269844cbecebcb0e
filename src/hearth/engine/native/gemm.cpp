// How a product is shared out between threads and cut into pieces that fit the caches.
#include <omp.h>

#include "gemm_inner.h"

namespace hearth {

namespace {

// Input kept packed at a time, so that it stays in the second-level cache while weights stream past.
constexpr int64_t INPUT_BYTES = (1 << 20) + (1 << 18);
// With this many rows per thread, splitting rows reads no more weights than splitting columns, and saves
// every thread from packing all of the input.
constexpr int64_t SPLIT_ROWS = 512;

// Rows [row, row_end) x columns [column, column_end), of more than GEMV_ROWS rows.
void blocked(const GemmArgs& args, int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
  const bool is_bf16 = args.kind == WEIGHT_BF16;
  const auto pack_input = is_bf16 ? pack_input_bf16 : pack_input_int8;
  const auto compute = use_amx() ? tiles_panel : is_bf16 ? vectors_bf16 : vectors_int8;
  const int64_t most = max64(PANEL, INPUT_BYTES / (args.K * 2) / PANEL * PANEL);
  const int64_t num_blocks = (row_end - row + most - 1) / most;
  const int64_t block_rows = round_up((row_end - row + num_blocks - 1) / num_blocks, PANEL);
  const int64_t panel_bytes = packed_bytes(args.kind, PANEL, args.K, args.group);
  uint8_t* unpacked = nullptr;
  if (args.kind == WEIGHT_INT4) unpacked = (uint8_t*)scratch(SCRATCH_B, packed_bytes(WEIGHT_INT8, PANEL, args.K, 0));
  for (; row < row_end; row += block_rows) {
    PackedInput input;
    pack_input(args, row, min64(block_rows, row_end - row), &input);
    for (int64_t n = column; n < column_end; n += PANEL) {
      Panel panel;
      panel.weight = (const uint8_t*)args.weight + n / PANEL * panel_bytes;
      panel.column = n;
      panel.next = panel.weight + panel_bytes;
      panel.next_bytes = n + PANEL < column_end ? panel_bytes : 0;
      if (args.kind == WEIGHT_INT4) {
        unpack_int4(args, n, unpacked);
        panel.weight = unpacked;
      }
      compute(args, input, row, panel);
    }
  }
}

}  // namespace

void gemm_part(const GemmArgs& args, int part, int num_parts) {
  if (args.M <= 0 || args.N <= 0) return;
  const int64_t num_panels = (args.N + PANEL - 1) / PANEL;
  if (args.M > GEMV_ROWS && args.M >= SPLIT_ROWS * num_parts) {
    const int64_t num_units = (args.M + PANEL - 1) / PANEL;
    const int64_t row = part_begin(num_units, part, num_parts) * PANEL;
    const int64_t row_end = min64(args.M, part_begin(num_units, part + 1, num_parts) * PANEL);
    if (row < row_end) blocked(args, row, row_end, 0, num_panels * PANEL);
    return;
  }
  const int64_t column = part_begin(num_panels, part, num_parts) * PANEL;
  const int64_t column_end = part_begin(num_panels, part + 1, num_parts) * PANEL;
  if (column >= column_end) return;
  if (args.M > GEMV_ROWS)
    blocked(args, 0, args.M, column, column_end);
  else if (args.kind == WEIGHT_BF16)
    gemv_bf16(args, column, column_end);
  else
    gemv_int8(args, column, column_end);
}

void gemm(const GemmArgs& args, int num_threads) {
#pragma omp parallel num_threads(num_threads)
  {
    TileGuard tiles;
    gemm_part(args, omp_get_thread_num(), omp_get_num_threads());
  }
}

size_t packed_bytes(int kind, int64_t N, int64_t K, int group) {
  const int64_t columns = round_up(N, PANEL);
  if (kind == WEIGHT_BF16) return columns * round_up(K, 32) * 2;
  const int64_t depth = round_up(K, 64);
  if (kind == WEIGHT_INT8) return columns * depth;
  return columns * (depth / 2 + depth / group * 2);
}

}  // namespace hearth

using namespace hearth;

extern "C" int64_t hearth_packed_bytes(int kind, int64_t N, int64_t K, int group) {
  return (int64_t)packed_bytes(kind, N, K, group);
}

// For what the arguments are see GemmArgs; x_stride and out_stride in elements.
extern "C" void hearth_gemm(int kind, int group, int flags, int num_threads, const void* x, int64_t x_stride,
                            const void* weight, const float* scale, const float* bias, void* out,
                            int64_t out_stride, int64_t M, int64_t N, int64_t K) {
  gemm({(const bf16*)x, x_stride, weight, scale, bias, out, out_stride, M, N, K, kind, group, flags}, num_threads);
}
