// Paged attention: how a step's work is cut, the online softmax, and the merging of pieces of a context.
#include "attention.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>

namespace hearth {
namespace {

constexpr int RUN_TOKENS = 256, SPLIT_TOKENS = 512;
constexpr int SPLIT_BELOW = 16;  // query tokens of a sequence in a step below which its context is cut
constexpr int AMX_ROWS = 8;      // rows from which the matrix registers are quicker
constexpr float NOTHING = -1e30f, MASKED = -1e37f;
constexpr float LOG2E = 1.4426950408889634f;

// 2^x for x <= 0 or so within 4e-6: interpolated at Chebyshev nodes of [0, 1).
inline __m512 exp2_ps(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.3670309453e-2f), _mm512_set1_ps(5.1744997764e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4160435727e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9297292217e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0000034929f));
  return _mm512_scalef_ps(p, x);  // times 2^floor(x)
}

// cap * tanh(x), by 1 - 2 / (1 + e^2x). NaN stays NaN: of an extreme with NaN the processor takes the second operand.
inline __m512 cap_ps(__m512 x, __m512 cap) {
  const __m512 limit = _mm512_set1_ps(15.0f);
  x = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit), _mm512_min_ps(limit, x));
  const __m512 one = _mm512_set1_ps(1.0f), e = exp2_ps(_mm512_mul_ps(x, _mm512_set1_ps(2 * LOG2E)));
  const __m512 part = _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(one, e));
  return _mm512_mul_ps(cap, _mm512_sub_ps(one, part));
}

struct Softmax {
  float factor;             // from a score to a base-2 logarithm
  float scale, softcap;     // softcap > 0: applied to scores before the factor
  const float* key_scales;  // [columns] or null
  const float* value_scales;
};

// Scores that need more than a factor: the scale of a quantised key, the cap.
void prepare(float* x, int begin, int end, const Softmax& rules) {
  for (int c = begin; c < end; c += 16) {
    __m512 s = _mm512_loadu_ps(x + c);
    if (rules.key_scales) s = _mm512_mul_ps(s, _mm512_loadu_ps(rules.key_scales + c));
    if (rules.softcap > 0)
      s = cap_ps(_mm512_mul_ps(s, _mm512_set1_ps(rules.scale / rules.softcap)), _mm512_set1_ps(rules.softcap));
    _mm512_storeu_ps(x + c, s);
  }
}

// One row of a run, whose first column is position `base`: scores to probabilities relative to the new top.
void softmax_row(const Tile& tile, int row, int base, int num_columns, const Softmax& rules) {
  float* x = tile.scores + row * tile.columns;
  bf16* probs = tile.probs + row * tile.columns;
  const int low = (int)max64(0, tile.low[row] - base), high = (int)min64(num_columns, tile.high[row] - base);
  if (low >= high) {
    std::memset(probs, 0, num_columns * sizeof(bf16));
    return;
  }
  const int begin = low / 16 * 16, end = (int)round_up(high, 16);
  if (rules.key_scales || rules.softcap > 0) prepare(x, begin, end, rules);
  const __m512 masked = _mm512_set1_ps(MASKED);
  _mm512_mask_storeu_ps(x + begin, (__mmask16)~(0xFFFFu << (low - begin)), masked);
  if (high < end) _mm512_mask_storeu_ps(x + end - 16, (__mmask16)(0xFFFFu << (high - end + 16)), masked);
  // Two of each, because one would wait for itself.
  __m512 best[2] = {masked, masked};
  int c = begin;
  for (; c + 32 <= end; c += 32)
    for (int i = 0; i < 2; i++) best[i] = _mm512_max_ps(best[i], _mm512_loadu_ps(x + c + 16 * i));
  if (c < end) best[0] = _mm512_max_ps(best[0], _mm512_loadu_ps(x + c));
  const float before = tile.top[row];
  const float top = fmaxf(before, _mm512_reduce_max_ps(_mm512_max_ps(best[0], best[1])) * rules.factor);
  const __m512 factor = _mm512_set1_ps(rules.factor), tops = _mm512_set1_ps(top);
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const auto probability = [&](int at, __m512& total) {
    __m512 p = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(x + at), factor, tops));
    total = _mm512_add_ps(total, p);
    return rules.value_scales ? _mm512_mul_ps(p, _mm512_loadu_ps(rules.value_scales + at)) : p;
  };
  std::memset(probs, 0, begin * sizeof(bf16));
  for (c = begin; c + 32 <= end; c += 32) {
    const __m512 p = probability(c, sum[0]), q = probability(c + 16, sum[1]);
    _mm512_storeu_si512(probs + c, (__m512i)_mm512_cvtne2ps_pbh(q, p));
  }
  if (c < end) _mm256_storeu_si256((__m256i*)(probs + c), narrow(probability(c, sum[0])));
  std::memset(probs + end, 0, (num_columns - end) * sizeof(bf16));
  float total = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
  if (before > NOTHING) {
    const float shrink = exp2f(before - top);
    total += tile.total[row] * shrink;
    float* acc = tile.acc + row * tile.E;
    if (shrink != 1.0f)
      for (int e = 0; e < tile.E; e += 16)
        _mm512_storeu_ps(acc + e, _mm512_mul_ps(_mm512_loadu_ps(acc + e), _mm512_set1_ps(shrink)));
  }
  tile.top[row] = top;
  tile.total[row] = total;
}

// -- how work is cut ---------------------------------------------------------------------------------------

// The work of one sequence for one KV head: tiles of rows x pieces of the context.
struct Cut {
  int sequence, count, length;  // tokens in this step; stored ones and these
  int num_rows, num_tiles, piece_blocks, first_piece, num_pieces;

  Cut(const AttentionArgs& args, int i) : sequence(i) {
    const int start = args.starts[i];
    count = args.counts[i];
    length = start + count;
    num_rows = count * (args.num_heads / args.num_kv_heads);
    num_tiles = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
    const int first = args.window ? (int)max64(0, start + 1 - args.window) : 0;
    const bool split = count < SPLIT_BELOW;
    piece_blocks = (int)max64(1, split ? SPLIT_TOKENS / args.block_size : length);
    first_piece = first / args.block_size / piece_blocks;
    num_pieces = (length - 1) / args.block_size / piece_blocks + 1 - first_piece;
  }
};

// What one thread computes without stopping: rows [row, row + num_rows) of a head over blocks [block, end).
struct Unit {
  int head, tile, row, num_rows, piece, block, end_block;
};

Unit unit_of(const AttentionArgs& args, const Cut& cut, int head, int tile, int piece) {
  const int group = args.num_heads / args.num_kv_heads, S = args.block_size;
  Unit unit{head, tile, tile * MAX_ROWS, 0, piece, 0, 0};
  unit.num_rows = (int)min64(MAX_ROWS, cut.num_rows - unit.row);
  const int start = args.starts[cut.sequence];
  const int first = start + unit.row / group, last = start + (unit.row + unit.num_rows - 1) / group;
  const int low = args.window ? (int)max64(0, first + 1 - args.window) : 0;
  const int begin = (cut.first_piece + piece) * cut.piece_blocks;
  unit.block = (int)max64(low / S, begin);
  unit.end_block = (int)min64(last / S + 1, begin + cut.piece_blocks);
  return unit;
}

// Memory traffic and arithmetic of a unit in arbitrary equal units.
int64_t cost_of(const AttentionArgs& args, const Unit& unit) {
  return 64 + max64(0, unit.end_block - unit.block) * args.block_size * (16 + unit.num_rows) / 16;
}

size_t piece_floats(const AttentionArgs& args, int num_rows) { return (size_t)num_rows * (args.value_dim + 2); }

}  // namespace

size_t attention_counter_bytes(const AttentionArgs& args) {
  int64_t counters = 0;
  for (int i = 0; i < args.num_sequences; i++) {
    const Cut cut(args, i);
    if (cut.num_pieces > 1) counters += (int64_t)cut.num_tiles * args.num_kv_heads;
  }
  return round_up(counters * 4, 64);
}

size_t attention_workspace_bytes(const AttentionArgs& args) {
  size_t floats = 0;
  for (int i = 0; i < args.num_sequences; i++) {
    const Cut cut(args, i);
    if (cut.num_pieces > 1) floats += piece_floats(args, cut.num_rows) * cut.num_pieces * args.num_kv_heads;
  }
  return attention_counter_bytes(args) + floats * sizeof(float);
}

namespace {

// -- one unit ----------------------------------------------------------------------------------------------

struct Worker {
  const AttentionArgs& args;
  Tile tile{};
  float *key_scales = nullptr, *value_scales = nullptr;  // of a run, quantised pools only
  bf16 *wide_keys = nullptr, *wide_values = nullptr, *tail;

  explicit Worker(const AttentionArgs& a);
  void load_rows(const Cut& cut, const Unit& unit);
  int64_t next_place(const Cut& cut, const Unit& unit, int block) const;
  void load_run(const Cut& cut, const Unit& unit, int block, Run* run);
  void compute(const Cut& cut, const Unit& unit);
  void store(const Cut& cut, int head, int row, const float* acc, float top, float total) const;
  void merge(const Cut& cut, const Unit& unit, const float* pieces) const;
};

Worker::Worker(const AttentionArgs& a) : args(a) {
  tile.D = a.key_dim;
  tile.E = a.value_dim;
  tile.S = a.block_size;
  tile.columns = (int)max64(RUN_TOKENS / tile.S, 1) * tile.S;
  const bool quantised = a.key_scales != nullptr;
  const size_t C = tile.columns, R = MAX_ROWS;
  const size_t wide = quantised ? C * (tile.D + tile.E) * 2 + C * 8 : 0;
  const size_t bytes = R * (tile.D * 2 + C * 6 + tile.E * 4 + 16) + (size_t)tile.S * tile.E * 2 + wide;
  char* next = (char*)scratch(SCRATCH_ATTENTION, bytes + 16 * 64);
  const auto take = [&next](size_t n) { return std::exchange(next, next + round_up(n, 64)); };
  tile.q = (bf16*)take(R * tile.D * 2);
  tile.scores = (float*)take(R * C * 4);
  tile.probs = (bf16*)take(R * C * 2);
  tile.acc = (float*)take(R * tile.E * 4);
  tile.top = (float*)take(R * 4);
  tile.total = (float*)take(R * 4);
  tile.low = (int*)take(R * 4);
  tile.high = (int*)take(R * 4);
  tail = (bf16*)take((size_t)tile.S * tile.E * 2);
  if (quantised) {
    key_scales = (float*)take(C * 4);
    value_scales = (float*)take(C * 4);
    wide_keys = (bf16*)take(C * tile.D * 2);
    wide_values = (bf16*)take(C * tile.E * 2);
  }
}

void Worker::load_rows(const Cut& cut, const Unit& unit) {
  const int group = args.num_heads / args.num_kv_heads;
  tile.num_rows = unit.num_rows;
  tile.padded_rows = (int)round_up(unit.num_rows, 16);
  for (int r = 0; r < unit.num_rows; r++) {
    const int token = (unit.row + r) / group, head = unit.head * group + (unit.row + r) % group;
    const int64_t at = args.firsts[cut.sequence] + token;
    std::memcpy(tile.q + r * tile.D, args.query + at * args.query_stride + head * args.query_head_stride,
                tile.D * sizeof(bf16));
    tile.high[r] = args.starts[cut.sequence] + token + 1;
    tile.low[r] = args.window ? (int)max64(0, tile.high[r] - args.window) : 0;
    tile.top[r] = NOTHING;
    tile.total[r] = 0;
  }
  const int rest = tile.padded_rows - tile.num_rows;
  std::memset(tile.q + tile.num_rows * tile.D, 0, (size_t)rest * tile.D * sizeof(bf16));
  std::memset(tile.probs + tile.num_rows * tile.columns, 0, (size_t)rest * tile.columns * sizeof(bf16));
  std::memset(tile.acc, 0, (size_t)tile.padded_rows * tile.E * sizeof(float));
}

// int8 to bfloat16, which holds every such number exactly; the scales are applied to scores and probabilities.
// `next` is what will be widened after it.
void widen_int8(const int8_t* x, const int8_t* next, bf16* out, int64_t n) {
  const int64_t ahead = next - x;
  for (int64_t i = 0; i < n; i += 32) {
    _mm_prefetch((const char*)(x + i + ahead), _MM_HINT_T0);
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)(x + i));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    _mm512_storeu_si512(out + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// Where what is read after the blocks before `block` lies, counted in heads of blocks: the next run of the unit, or
// else probably the next head or the next sequence. Only a hint of what to fetch.
int64_t Worker::next_place(const Cut& cut, const Unit& unit, int block) const {
  const int64_t K = args.num_kv_heads;
  const int32_t* table = args.tables + cut.sequence * args.table_width;
  if (block < unit.end_block) return table[block] * K + unit.head;
  if (unit.head + 1 < K) return table[unit.block] * K + unit.head + 1;
  if (cut.sequence + 1 < args.num_sequences) return table[args.table_width] * K;
  return table[unit.block] * K + unit.head;
}

void Worker::load_run(const Cut& cut, const Unit& unit, int block, Run* run) {
  const int S = tile.S;
  run->num_blocks = (int)min64(tile.columns / S, unit.end_block - block);
  run->valid = (int)min64((int64_t)run->num_blocks * S, cut.length - (int64_t)block * S);
  const int32_t* table = args.tables + cut.sequence * args.table_width + block;
  const int64_t following = next_place(cut, unit, block + run->num_blocks);
  run->next = key_scales ? wide_keys : (const bf16*)args.keys + following * S * tile.D;
  for (int b = 0; b < run->num_blocks; b++) {
    const int64_t at = ((int64_t)table[b] * args.num_kv_heads + unit.head) * S;
    if (!key_scales) {
      run->keys[b] = (const bf16*)args.keys + at * tile.D;
      run->values[b] = (const bf16*)args.values + at * tile.E;
      continue;
    }
    const int tokens = (int)min64(S, run->valid - b * S);
    std::memcpy(key_scales + b * S, args.key_scales + at, S * sizeof(float));
    std::memset(value_scales + b * S, 0, S * sizeof(float));
    std::memcpy(value_scales + b * S, args.value_scales + at, tokens * sizeof(float));
    run->keys[b] = wide_keys + (int64_t)b * S * tile.D;
    run->values[b] = wide_values + (int64_t)b * S * tile.E;
    const int64_t next =
        b + 1 < run->num_blocks ? (int64_t)table[b + 1] * args.num_kv_heads + unit.head : following;
    const auto* keys = (const int8_t*)args.keys;
    const auto* values = (const int8_t*)args.values;
    widen_int8(keys + at * tile.D, keys + next * S * tile.D, wide_keys + (int64_t)b * S * tile.D,
               (int64_t)S * tile.D);
    widen_int8(values + at * tile.E, values + next * S * tile.E, wide_values + (int64_t)b * S * tile.E,
               round_up(tokens, 2) * tile.E);
  }
}

void Worker::compute(const Cut& cut, const Unit& unit) {
  load_rows(cut, unit);
  const bool capped = args.softcap > 0;
  const Softmax rules{capped ? LOG2E : args.scale * LOG2E, args.scale, args.softcap, key_scales, value_scales};
#ifdef __AMX_BF16__
  const bool amx = use_amx() && unit.num_rows >= AMX_ROWS;
#else
  const bool amx = false;
#endif
  Run run;
  for (int block = unit.block; block < unit.end_block; block += run.num_blocks) {
    load_run(cut, unit, block, &run);
#ifdef __AMX_BF16__
    if (amx) scores_amx(tile, run);
#endif
    if (!amx) scores_avx512(tile, run);
    for (int r = 0; r < tile.num_rows; r++)
      softmax_row(tile, r, block * tile.S, run.num_blocks * tile.S, rules);
#ifdef __AMX_BF16__
    if (amx) accumulate_amx(tile, run, tail);
#endif
    if (!amx) accumulate_avx512(tile, run);
  }
}

// Row `row` of the sequence's rows for this KV head: divide by the sum, to which a sink may add.
void Worker::store(const Cut& cut, int head, int row, const float* acc, float top, float total) const {
  const int group = args.num_heads / args.num_kv_heads, query_head = head * group + row % group;
  float inverse = 1.0f / total;
  if (args.sinks) {  // one more logit, which takes probability and gives nothing
    const float sink = args.sinks[query_head] * LOG2E, best = fmaxf(top, sink), shrink = exp2f(top - best);
    inverse = shrink / (total * shrink + exp2f(sink - best));
  }
  const int64_t at = args.firsts[cut.sequence] + row / group;
  bf16* out = args.out + at * args.out_stride + query_head * args.out_head_stride;
  for (int e = 0; e < tile.E; e += 16)
    _mm256_storeu_si256((__m256i*)(out + e), narrow(_mm512_mul_ps(_mm512_loadu_ps(acc + e), _mm512_set1_ps(inverse))));
}

// The pieces of a context, in order, as if they had been runs of one.
void Worker::merge(const Cut& cut, const Unit& unit, const float* pieces) const {
  const size_t stride = piece_floats(args, unit.num_rows);
  const int E = tile.E;
  for (int r = 0; r < unit.num_rows; r++) {
    float top = NOTHING, total = 0;
    for (int p = 0; p < cut.num_pieces; p++) top = fmaxf(top, pieces[p * stride + (size_t)unit.num_rows * E + r]);
    float* sum = tile.acc;
    std::memset(sum, 0, E * sizeof(float));
    for (int p = 0; p < cut.num_pieces; p++) {
      const float* piece = pieces + p * stride;
      const float weight = exp2f(piece[(size_t)unit.num_rows * E + r] - top);
      total += weight * piece[(size_t)unit.num_rows * (E + 1) + r];
      for (int e = 0; e < E; e += 16)
        _mm512_storeu_ps(sum + e, _mm512_fmadd_ps(_mm512_set1_ps(weight), _mm512_loadu_ps(piece + r * E + e),
                                                  _mm512_loadu_ps(sum + e)));
    }
    store(cut, unit.head, unit.row + r, sum, top, total);
  }
}

// Compute a unit of a sequence whose pieces lie at `pieces`; whoever ends the last piece of a tile merges it.
void run_unit(Worker& worker, const Cut& cut, const Unit& unit, std::atomic<int>* counters, float* pieces) {
  worker.compute(cut, unit);
  const Tile& tile = worker.tile;
  if (cut.num_pieces == 1) {
    for (int r = 0; r < unit.num_rows; r++)
      worker.store(cut, unit.head, unit.row + r, tile.acc + r * tile.E, tile.top[r], tile.total[r]);
    return;
  }
  const size_t head_floats = piece_floats(worker.args, cut.num_rows) * cut.num_pieces;
  float* mine = pieces + unit.head * head_floats + piece_floats(worker.args, unit.row) * cut.num_pieces;
  float* piece = mine + unit.piece * piece_floats(worker.args, unit.num_rows);
  const size_t R = unit.num_rows;
  std::memcpy(piece, tile.acc, R * tile.E * sizeof(float));
  std::memcpy(piece + R * tile.E, tile.top, R * sizeof(float));
  std::memcpy(piece + R * (tile.E + 1), tile.total, R * sizeof(float));
  std::atomic<int>& counter = counters[unit.head * cut.num_tiles + unit.tile];
  if (counter.fetch_add(1, std::memory_order_acq_rel) + 1 < cut.num_pieces) return;
  worker.merge(cut, unit, mine);
  counter.store(0, std::memory_order_relaxed);
}

int64_t head_cost(const AttentionArgs& args, const Cut& cut) {
  int64_t cost = 0;
  for (int t = 0; t < cut.num_tiles; t++)
    for (int p = 0; p < cut.num_pieces; p++) cost += cost_of(args, unit_of(args, cut, 0, t, p));
  return cost;
}

}  // namespace

void attend_part(const AttentionArgs& args, int part, int num_parts) {
  int64_t all = 0, before = 0;
  for (int i = 0; i < args.num_sequences; i++) all += head_cost(args, Cut(args, i)) * args.num_kv_heads;
  const auto part_at = [&](int64_t cost) { return (int)(cost * num_parts / max64(all, 1)); };
  auto* counters = (std::atomic<int>*)args.workspace;
  float* pieces = (float*)((char*)args.workspace + attention_counter_bytes(args));
  Worker worker(args);
  for (int i = 0; i < args.num_sequences; i++) {
    const Cut cut(args, i);
    const int64_t per_head = head_cost(args, cut);
    for (int h = 0; h < args.num_kv_heads; h++, before += per_head) {
      if (part_at(before + per_head) < part || part_at(before) > part) continue;
      int64_t at = before;
      for (int t = 0; t < cut.num_tiles; t++)
        for (int p = 0; p < cut.num_pieces; p++) {
          const Unit unit = unit_of(args, cut, h, t, p);
          const int64_t cost = cost_of(args, unit);
          if (part_at(at + cost / 2) == part) run_unit(worker, cut, unit, counters, pieces);
          at += cost;
        }
    }
    if (cut.num_pieces > 1) {
      counters += (int64_t)cut.num_tiles * args.num_kv_heads;
      pieces += piece_floats(args, cut.num_rows) * cut.num_pieces * args.num_kv_heads;
    }
  }
}

}  // namespace hearth
