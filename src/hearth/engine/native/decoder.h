// A whole stack of decoder layers in one call: norms, projections, rotary embedding, paged attention, MLP.
//
// Covers the layers of the Llama family and its relatives: RMS or layer norm before and after both halves,
// norms of queries and keys (a head at a time or over all), rotary embedding of half-rotated pairs, gated or
// plain MLP. `hearth.engine.stack` reads a model into this form and compares the two before it is used.
#pragma once

#include "attention.h"
#include "common.h"
#include "gemm.h"

namespace hearth {

// NORM_RMS rounds to bfloat16 before it multiplies by the weight, as Llama does; NORM_RMS_WIDE only at the end.
enum NormKind { NORM_NONE = 0, NORM_RMS = 1, NORM_RMS_WIDE = 2, NORM_LAYER = 3 };
enum Activation { ACT_SILU = 0, ACT_GELU_TANH = 1, ACT_GELU = 2, ACT_RELU = 3, ACT_RELU2 = 4 };

struct Norm {
  const float* weight;  // [dim]
  const float* bias;    // [dim] or null
  float eps;
  int32_t kind;
};

struct Linear {
  const void* weight;  // packed; null = there is none
  const float* scale;
  const float* bias;
  int64_t N, K;
  int32_t kind, group;
};

struct DecoderLayer {
  Norm attention_norm, attention_out_norm, mlp_norm, mlp_out_norm;
  Norm query_norm, key_norm;
  int32_t norm_all_heads;  // query_norm and key_norm run over all heads at once
  int32_t activation;
  Linear query, key, value;  // key and value null: query holds all three
  Linear out;
  Linear gate, up, down;  // up null: gate holds both, or, if not gated, only itself
  int32_t gated;
  int32_t rotary_dim;  // leading dims of a head that are rotated; 0 = none
  const float* cos;    // [positions][rotary_dim / 2]
  const float* sin;
  AttentionArgs attention;  // the layer's part; the step's part is filled in here
};

struct DecoderStep {
  int64_t num_tokens, hidden_size;
  const int64_t* positions;  // [T]
  bf16* hidden;              // [T, hidden_size]; in: embeddings, out: after the final norm
  AttentionArgs attention;   // the step's part
};

// Bytes that `decode` needs besides, aligned to 64.
size_t decoder_workspace_bytes(const DecoderLayer* layers, int64_t num_layers, const DecoderStep& step);

// Run the layers and the final norm.
void decode(const DecoderLayer* layers, int64_t num_layers, const Norm& final_norm, const DecoderStep& step,
            void* workspace, int num_threads);

// -- rows (decoder_rows.cpp): each works on one row ---------------------------------------------------------
void norm_row(const Norm& norm, const bf16* x, bf16* out, int64_t dim);
void add_row(bf16* out, const bf16* x, int64_t dim);
// out[i] = act(gate[i]) * up[i], or act(gate[i]) where up is null.
void activate_row(int activation, const bf16* gate, const bf16* up, bf16* out, int64_t dim);
// Rotate one head in place: pairs (i, i + dim / 2) of the leading dims.
void rotate_head(bf16* head, const float* cos, const float* sin, int64_t rotary_dim);

}  // namespace hearth
