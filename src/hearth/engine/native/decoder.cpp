#include "decoder.h"

#include <omp.h>

namespace hearth {
namespace {

// Where the intermediate rows of a step lie. Projections may be padded: strides are the widths written here.
struct Buffers {
  bf16 *normed, *qkv, *context, *projected, *gate_up, *active;
  void* attention;
  int64_t qkv_width, context_width, gate_up_width, mlp_width;
};

inline int64_t qkv_width(const DecoderLayer& layer) {
  return layer.query.N + (layer.key.weight ? layer.key.N + layer.value.N : 0);
}

AttentionArgs with_step(const DecoderLayer& layer, const DecoderStep& step, const Buffers& buffers) {
  AttentionArgs a = layer.attention;
  const AttentionArgs& s = step.attention;
  a.num_tokens = s.num_tokens;
  a.num_sequences = s.num_sequences;
  a.slots = s.slots;
  a.starts = s.starts;
  a.counts = s.counts;
  a.firsts = s.firsts;
  a.tables = s.tables;
  a.table_width = s.table_width;
  int64_t queries = (int64_t)a.num_heads * a.key_dim, keys = (int64_t)a.num_kv_heads * a.key_dim;
  a.query = buffers.qkv;
  a.key = buffers.qkv + queries;
  a.value = buffers.qkv + queries + keys;
  a.query_stride = a.key_stride = a.value_stride = buffers.qkv_width;
  a.query_head_stride = a.key_head_stride = a.key_dim;
  a.value_head_stride = a.value_dim;
  a.out = buffers.context;
  a.out_stride = buffers.context_width;
  a.out_head_stride = a.value_dim;
  a.workspace = buffers.attention;
  return a;
}

// Sizes are the largest that any layer asks for.
size_t lay_out(const DecoderLayer* layers, int64_t num_layers, const DecoderStep& step, char* base, Buffers* b) {
  size_t attention = 0;
  *b = Buffers{};
  for (int64_t i = 0; i < num_layers; i++) {
    const DecoderLayer& layer = layers[i];
    b->qkv_width = max64(b->qkv_width, round_up(qkv_width(layer), 32));
    b->context_width = max64(b->context_width, round_up(layer.out.K, 32));
    b->gate_up_width = max64(b->gate_up_width, round_up(layer.gate.N + (layer.up.weight ? layer.up.N : 0), 32));
    b->mlp_width = max64(b->mlp_width, round_up(layer.down.K, 32));
    size_t bytes = attention_workspace_bytes(with_step(layer, step, *b));
    attention = attention > bytes ? attention : bytes;
  }
  size_t used = 0;
  auto take = [&](size_t bytes) {
    char* at = base + used;
    used += round_up(bytes, 64);
    return at;
  };
  int64_t T = step.num_tokens, hidden = round_up(step.hidden_size, 32);
  b->attention = take(attention);
  b->normed = (bf16*)take(T * hidden * 2);
  b->projected = (bf16*)take(T * hidden * 2);
  b->qkv = (bf16*)take(T * b->qkv_width * 2);
  b->context = (bf16*)take(T * b->context_width * 2);
  b->gate_up = (bf16*)take(T * b->gate_up_width * 2);
  b->active = (bf16*)take(T * b->mlp_width * 2);
  return used;
}

// One thread's way through the layers; all threads take it together.
struct Walker {
  const DecoderStep& step;
  const Buffers& b;
  int part, num_parts;
  int64_t begin, end;  // the rows of this thread in row-wise parts

  void wait() const {
#pragma omp barrier
  }

  void multiply(const Linear& linear, const bf16* x, int64_t x_stride, bf16* out, int64_t out_stride,
                int flags = 0) const {
    GemmArgs g{};
    g.x = x;
    g.x_stride = x_stride;
    g.weight = linear.weight;
    g.scale = linear.scale;
    g.bias = linear.bias;
    g.out = out;
    g.out_stride = out_stride;
    g.M = step.num_tokens;
    g.N = linear.N;
    g.K = linear.K;
    g.kind = linear.kind;
    g.group = linear.group;
    g.flags = flags;
    gemm_part(g, part, num_parts);
  }

  // The input of a half layer: normed, or the hidden rows themselves.
  const bf16* normed(const Norm& norm) const {
    if (norm.kind == NORM_NONE) return step.hidden;
    int64_t D = step.hidden_size;
    for (int64_t t = begin; t < end; t++) norm_row(norm, step.hidden + t * D, b.normed + t * D, D);
    wait();
    return b.normed;
  }

  // hidden += norm(x weight): with a norm the product is kept apart first.
  void project_back(const Linear& linear, const bf16* x, int64_t x_stride, const Norm& norm) const {
    int64_t D = step.hidden_size;
    if (norm.kind == NORM_NONE) {
      multiply(linear, x, x_stride, step.hidden, D, GEMM_ACCUMULATE);
      wait();
      return;
    }
    multiply(linear, x, x_stride, b.projected, D);
    wait();
    for (int64_t t = begin; t < end; t++) {
      norm_row(norm, b.projected + t * D, b.projected + t * D, D);
      add_row(step.hidden + t * D, b.projected + t * D, D);
    }
    wait();
  }

  void norm_heads(const DecoderLayer& layer, const Norm& norm, bf16* heads, int64_t num_heads) const {
    int64_t dim = layer.attention.key_dim;
    if (norm.kind == NORM_NONE) return;
    if (layer.norm_all_heads) {
      norm_row(norm, heads, heads, num_heads * dim);
    } else {
      for (int64_t h = 0; h < num_heads; h++) norm_row(norm, heads + h * dim, heads + h * dim, dim);
    }
  }

  void prepare_heads(const DecoderLayer& layer) const {
    const AttentionArgs& a = layer.attention;
    int64_t half = layer.rotary_dim / 2;
    for (int64_t t = begin; t < end; t++) {
      bf16* query = b.qkv + t * b.qkv_width;
      bf16* key = query + (int64_t)a.num_heads * a.key_dim;
      norm_heads(layer, layer.query_norm, query, a.num_heads);
      norm_heads(layer, layer.key_norm, key, a.num_kv_heads);
      if (!half) continue;
      const float *cos = layer.cos + step.positions[t] * half, *sin = layer.sin + step.positions[t] * half;
      for (int h = 0; h < a.num_heads + a.num_kv_heads; h++)  // the keys follow the queries
        rotate_head(query + (int64_t)h * a.key_dim, cos, sin, layer.rotary_dim);
    }
  }

  void attention_half(const DecoderLayer& layer) const {
    const bf16* x = normed(layer.attention_norm);
    int64_t D = step.hidden_size;
    multiply(layer.query, x, D, b.qkv, b.qkv_width);
    if (layer.key.weight) {
      multiply(layer.key, x, D, b.qkv + layer.query.N, b.qkv_width);
      multiply(layer.value, x, D, b.qkv + layer.query.N + layer.key.N, b.qkv_width);
    }
    wait();
    prepare_heads(layer);
    wait();
    AttentionArgs a = with_step(layer, step, b);
    write_kv_part(a, part, num_parts);
    wait();
    attend_part(a, part, num_parts);
    wait();
    project_back(layer.out, b.context, b.context_width, layer.attention_out_norm);
  }

  void mlp_half(const DecoderLayer& layer) const {
    const bf16* x = normed(layer.mlp_norm);
    int64_t D = step.hidden_size, width = layer.down.K;
    multiply(layer.gate, x, D, b.gate_up, b.gate_up_width);
    if (layer.up.weight) multiply(layer.up, x, D, b.gate_up + width, b.gate_up_width);
    wait();
    for (int64_t t = begin; t < end; t++) {
      const bf16* gate = b.gate_up + t * b.gate_up_width;
      activate_row(layer.activation, gate, layer.gated ? gate + width : nullptr, b.active + t * b.mlp_width, width);
    }
    wait();
    project_back(layer.down, b.active, b.mlp_width, layer.mlp_out_norm);
  }
};

}  // namespace

size_t decoder_workspace_bytes(const DecoderLayer* layers, int64_t num_layers, const DecoderStep& step) {
  Buffers buffers;
  return lay_out(layers, num_layers, step, nullptr, &buffers);
}

void decode(const DecoderLayer* layers, int64_t num_layers, const Norm& final_norm, const DecoderStep& step,
            void* workspace, int num_threads) {
  Buffers buffers;
  lay_out(layers, num_layers, step, (char*)workspace, &buffers);
#pragma omp parallel num_threads(num_threads)
  {
    TileGuard tiles;
    int part = omp_get_thread_num(), num_parts = omp_get_num_threads();
    Walker walker{step, buffers, part, num_parts, part_begin(step.num_tokens, part, num_parts),
                  part_begin(step.num_tokens, part + 1, num_parts)};
    for (int64_t i = 0; i < num_layers; i++) {
      walker.attention_half(layers[i]);
      walker.mlp_half(layers[i]);
    }
    int64_t D = step.hidden_size;
    for (int64_t t = walker.begin; t < walker.end; t++)
      if (final_norm.kind != NORM_NONE) norm_row(final_norm, step.hidden + t * D, step.hidden + t * D, D);
  }
}

}  // namespace hearth

extern "C" {

int64_t hearth_decoder_workspace_bytes(const hearth::DecoderLayer* layers, int64_t num_layers,
                                       const hearth::DecoderStep* step) {
  return (int64_t)hearth::decoder_workspace_bytes(layers, num_layers, *step);
}

void hearth_decode(const hearth::DecoderLayer* layers, int64_t num_layers, const hearth::Norm* final_norm,
                   const hearth::DecoderStep* step, void* workspace, int32_t num_threads) {
  hearth::decode(layers, num_layers, *final_norm, *step, workspace, num_threads);
}

// Sizes of the structures, so that the other side can check its copies of them.
void hearth_decoder_sizes(int64_t* sizes) {
  sizes[0] = sizeof(hearth::Norm);
  sizes[1] = sizeof(hearth::Linear);
  sizes[2] = sizeof(hearth::DecoderLayer);
  sizes[3] = sizeof(hearth::DecoderStep);
}

}  // extern "C"
