// The two products of attention, Q K^T and P V, on the matrix registers (AMX) or the vector registers.
#include "attention.h"

#include <cstring>

namespace hearth {
namespace {

inline __m512i pair(const bf16* x) {
  uint32_t both;
  std::memcpy(&both, x, 4);
  return _mm512_set1_epi32((int)both);
}

inline __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// Ask for what lies in the next block, and for what comes soon in this one: two levels, as for weights.
inline void prefetch(const bf16* at, int64_t next_block) {
  _mm_prefetch((const char*)(at + next_block), _MM_HINT_T1);
  _mm_prefetch((const char*)(at + 512), _MM_HINT_T0);
}

// R rows against V * 16 tokens of one block. Two sums each, because one would wait for itself.
template <int R, int V>
void score_block(const Tile& tile, const bf16* keys, const bf16* next, int row, int token, float* out) {
  constexpr int SUMS = R * V <= 6 ? 2 : 1;
  __m512 sum[SUMS][R][V] = {};
  const bf16* q = tile.q + row * tile.D;
  const bf16* k = keys + token * 2;
  const int64_t stride = 2 * tile.S, ahead = next - keys;
  for (int d = 0; d < tile.D; d += 2 * SUMS) {
#pragma GCC unroll 2
    for (int u = 0; u < SUMS; u++) {
      __m512i key[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        key[v] = _mm512_loadu_si512(k + v * 32);
        prefetch(k + v * 32, ahead);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512i both = pair(q + r * tile.D + d + 2 * u);
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sum[u][r][v] = dot(sum[u][r][v], key[v], both);
      }
      k += stride;
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      __m512 s = sum[0][r][v];
      if (SUMS == 2) s = _mm512_add_ps(s, sum[SUMS - 1][r][v]);
      _mm512_storeu_ps(out + r * tile.columns + v * 16, s);
    }
}

template <int V>
void score_rows(const Tile& tile, const bf16* keys, const bf16* next, int token, float* out) {
  int r = 0;
  for (; r + 8 <= tile.num_rows; r += 8) score_block<8, V>(tile, keys, next, r, token, out + r * tile.columns);
  for (; r + 3 <= tile.num_rows; r += 3) score_block<3, V>(tile, keys, next, r, token, out + r * tile.columns);
  for (; r + 2 <= tile.num_rows; r += 2) score_block<2, V>(tile, keys, next, r, token, out + r * tile.columns);
  for (; r < tile.num_rows; r++) score_block<1, V>(tile, keys, next, r, token, out + r * tile.columns);
}

// R rows x V * 16 dims, over `num_blocks` blocks from `block` on.
template <int R, int V>
void value_block(const Tile& tile, const Run& run, int block, int num_blocks, int row, int dim) {
  __m512 sum[R][V];
  float* acc = tile.acc + row * tile.E + dim;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[r][v] = _mm512_loadu_ps(acc + r * tile.E + v * 16);
  for (int b = block; b < block + num_blocks; b++) {
    const int tokens = (int)min64(tile.S, run.valid - b * tile.S);
    const bf16* p = tile.probs + row * tile.columns + b * tile.S;
    const bf16* values = run.values[b] + dim * 2;
    const int64_t ahead = (b + 1 < run.num_blocks ? run.values[b + 1] : run.next) - run.values[b];
    for (int t = 0; t < tokens; t += 2, values += 2 * tile.E) {
      // The partner of an odd last token was never written: it may be no number, which zero does not cancel.
      const __mmask32 keep = t + 1 < tokens ? 0xFFFFFFFF : 0x55555555;
      __m512i both[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) both[r] = pair(p + r * tile.columns + t);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        prefetch(values + v * 32, ahead);
        const __m512i value = _mm512_maskz_loadu_epi16(keep, values + v * 32);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sum[r][v] = dot(sum[r][v], value, both[r]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) _mm512_storeu_ps(acc + r * tile.E + v * 16, sum[r][v]);
}

template <int R>
void value_dims(const Tile& tile, const Run& run, int block, int num_blocks, int row) {
  int dim = 0;
  for (; dim + 128 <= tile.E; dim += 128) value_block<R, 8>(tile, run, block, num_blocks, row, dim);
  for (; dim < tile.E; dim += 32) value_block<R, 2>(tile, run, block, num_blocks, row, dim);
}

void value_rows(const Tile& tile, const Run& run, int block, int num_blocks) {
  int r = 0;
  for (; r + 3 <= tile.num_rows; r += 3) value_dims<3>(tile, run, block, num_blocks, r);
  for (; r + 2 <= tile.num_rows; r += 2) value_dims<2>(tile, run, block, num_blocks, r);
  for (; r < tile.num_rows; r++) value_dims<1>(tile, run, block, num_blocks, r);
}

}  // namespace

void scores_avx512(const Tile& tile, const Run& run) {
  for (int b = 0; b < run.num_blocks; b++) {
    const int tokens = (int)min64(tile.S, run.valid - b * tile.S);
    float* out = tile.scores + b * tile.S;
    const bf16* next = b + 1 < run.num_blocks ? run.keys[b + 1] : run.values[0];
    int t = 0;
    for (; t + 16 < tokens; t += 32) score_rows<2>(tile, run.keys[b], next, t, out + t);
    if (t < tokens) score_rows<1>(tile, run.keys[b], next, t, out + t);
  }
}

void accumulate_avx512(const Tile& tile, const Run& run) {
  if (tile.num_rows <= 3) return value_rows(tile, run, 0, run.num_blocks);  // each value is read once
  for (int b = 0; b < run.num_blocks; b++) value_rows(tile, run, b, 1);     // once from memory, then from L1
}

#ifdef __AMX_BF16__

// Tiles 0 to 3: sums of two tiles of rows x two of columns; 4 and 5: rows; 6 and 7: columns.
void scores_amx(const Tile& tile, const Run& run) {
  const int64_t q_stride = tile.D * 2, k_stride = tile.S * 4, s_stride = tile.columns * 4;
  for (int b = 0; b < run.num_blocks; b++) {
    const int tokens = (int)min64(tile.S, run.valid - b * tile.S);
    for (int t = 0; t < tokens; t += 32) {
      for (int r = 0; r < tile.padded_rows; r += 32) {
        const bool two = r + 16 < tile.padded_rows;
        const bf16* q = tile.q + r * tile.D;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < tile.D; d += 32) {
          const bf16* k = run.keys[b] + (int64_t)d * tile.S + t * 2;
          _tile_loadd(6, k, k_stride);
          _tile_loadd(4, q + d, q_stride);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, k + 32, k_stride);
          _tile_dpbf16ps(1, 4, 7);
          if (two) {
            _tile_loadd(5, q + 16 * tile.D + d, q_stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
        float* out = tile.scores + r * tile.columns + b * tile.S + t;
        _tile_stored(0, out, s_stride);
        _tile_stored(1, out + 16, s_stride);
        if (two) {
          _tile_stored(2, out + 16 * tile.columns, s_stride);
          _tile_stored(3, out + 16 * tile.columns + 16, s_stride);
        }
      }
    }
  }
}

void accumulate_amx(const Tile& tile, const Run& run, bf16* tail) {
  const int64_t p_stride = tile.columns * 2, v_stride = tile.E * 4, acc_stride = tile.E * 4;
  const bf16* values[64];
  std::memcpy(values, run.values, sizeof(bf16*) * run.num_blocks);
  const int last = run.num_blocks - 1, tokens = run.valid - last * tile.S;
  if (tokens % 32) {  // what was never written may be no number, which a zero probability does not cancel
    const int64_t written = (int64_t)(tokens / 2) * 2 * tile.E;
    std::memcpy(tail, values[last], written * 2);
    std::memset(tail + written, 0, (round_up(tokens, 32) * tile.E - written) * 2);
    if (tokens % 2)
      for (int e = 0; e < tile.E; e++) tail[written + 2 * e] = values[last][written + 2 * e];
    values[last] = tail;
    // g++ 12 does not know that a tile load reads memory: what was written here must be there before.
    __asm__ volatile("" ::: "memory");
  }
  for (int e = 0; e < tile.E; e += 32) {
    for (int r = 0; r < tile.padded_rows; r += 32) {
      const bool two = r + 16 < tile.padded_rows;
      float* acc = tile.acc + r * tile.E + e;
      _tile_loadd(0, acc, acc_stride);
      _tile_loadd(1, acc + 16, acc_stride);
      if (two) {
        _tile_loadd(2, acc + 16 * tile.E, acc_stride);
        _tile_loadd(3, acc + 16 * tile.E + 16, acc_stride);
      }
      for (int b = 0; b < run.num_blocks; b++) {
        const int end = (int)min64(tile.S, run.valid - b * tile.S);
        for (int t = 0; t < end; t += 32) {
          const bf16* p = tile.probs + r * tile.columns + b * tile.S + t;
          const bf16* v = values[b] + (int64_t)t * tile.E + 2 * e;
          _tile_loadd(6, v, v_stride);
          _tile_loadd(4, p, p_stride);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, v + 32, v_stride);
          _tile_dpbf16ps(1, 4, 7);
          if (two) {
            _tile_loadd(5, p + 16 * tile.columns, p_stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
      }
      _tile_stored(0, acc, acc_stride);
      _tile_stored(1, acc + 16, acc_stride);
      if (two) {
        _tile_stored(2, acc + 16 * tile.E, acc_stride);
        _tile_stored(3, acc + 16 * tile.E + 16, acc_stride);
      }
    }
  }
}

#endif

}  // namespace hearth
