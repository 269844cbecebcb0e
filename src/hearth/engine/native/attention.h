// Attention over paged keys and values: bfloat16 queries, a pool of bfloat16 or int8, float32 sums.
//
// Layout of the pool, for blocks of S tokens, K KV heads, key and value dims D and E:
//   keys   [block][K][D/2][S][2]  pairs along the dims: 16 tokens are the lanes of vdpbf16ps, and 16 pairs x 16
//                                 tokens the B operand of tdpbf16ps for Q K^T;
//   values [block][K][S/2][E][2]  pairs along the tokens: 16 dims are the lanes, and 16 pairs x 16 dims the B
//                                 operand for P V.
// int8 pools have the same order, and a float32 scale for each token and head in [block][K][S].
// S, D and E are multiples of 32.
//
// The work is cut into units: one KV head, up to 64 rows (query tokens x the query heads of the KV head), and a
// run of the context. Softmax is computed online over runs of 256 tokens (Milakov and Gimelshein, arXiv
// 1805.02867). The context of short chunks is cut every 512 tokens, so that few long sequences occupy all
// threads (flash-decoding); the thread that ends last with such a piece merges them. The cuts depend on the
// sequence alone: what a sequence gets does not depend on the rest of the batch or on the number of threads.
#pragma once

#include "common.h"

namespace hearth {

struct AttentionArgs {
  // The layer.
  int32_t num_heads, num_kv_heads, key_dim, value_dim;
  int32_t block_size;
  int32_t window;      // tokens that a query sees, itself included; 0 = all
  float scale;         // > 0
  float softcap;       // 0 = none
  const float* sinks;  // [H] or null
  // The pool. Scales are null for bfloat16.
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
  // The step: sequence i has counts[i] tokens here, which begin at row firsts[i], after starts[i] stored ones.
  int32_t num_tokens, num_sequences;
  const int64_t* slots;  // [T] block * S + place in the block
  const int32_t* starts;
  const int32_t* counts;
  const int32_t* firsts;
  const int32_t* tables;  // [N][table_width] blocks
  int64_t table_width;
  // Rows of the step; strides in elements. Dims are contiguous.
  const bf16 *query, *key, *value;
  bf16* out;
  int64_t query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride;
  int64_t out_stride, out_head_stride;
  void* workspace;  // attention_workspace_bytes(args) bytes, aligned to 64
};

// Put the step's keys and values into their slots: the share of one thread. Also readies the workspace.
void write_kv_part(const AttentionArgs& args, int part, int num_parts);

// Attend: the share of one thread, which holds a TileGuard. A barrier must lie between the last write_kv_part
// and the first attend_part of a layer; none is needed after it but for reading `out`.
void attend_part(const AttentionArgs& args, int part, int num_parts);

size_t attention_workspace_bytes(const AttentionArgs& args);
size_t attention_counter_bytes(const AttentionArgs& args);

// -- inside attention*.cpp ---------------------------------------------------------------------------------
constexpr int MAX_ROWS = 64;

// Where the operands of one unit lie: rows of `columns` scores, probabilities, accumulators.
struct Tile {
  int num_rows, padded_rows;  // real ones; with zero rows up to a multiple of 16
  int D, E, S;
  int columns;         // tokens that scores and probs have room for in a row
  bf16* q;             // [padded_rows][D]
  float* scores;       // [padded_rows][columns]
  bf16* probs;         // [padded_rows][columns], zero where a row may not look
  float* acc;          // [padded_rows][E]
  float *top, *total;  // [padded_rows] base-2 logarithm of the largest term; sum relative to it
  int* low;            // [padded_rows] the positions that a row sees: low ... high - 1
  int* high;
};

// `num_blocks` blocks: the tokens before `valid` have been written, what lies behind is of no value.
struct Run {
  const bf16* keys[64];
  const bf16* values[64];
  const bf16* next;
  int num_blocks, valid;
};

void scores_avx512(const Tile& tile, const Run& run);
void accumulate_avx512(const Tile& tile, const Run& run);  // acc += probs x values
#ifdef __AMX_BF16__
void scores_amx(const Tile& tile, const Run& run);
void accumulate_amx(const Tile& tile, const Run& run, bf16* tail);  // tail: room for a block of values
#endif

}  // namespace hearth
