// What every native kernel shares: the instruction set in use, tile registers, scratch memory, bfloat16.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace hearth {

using bf16 = uint16_t;  // the upper half of a float32

enum Isa { ISA_AVX512 = 1, ISA_AMX = 2 };

// Chosen once by hearth_init, before any kernel runs.
extern int isa;
inline bool use_amx() { return isa == ISA_AMX; }

// Tile registers for the life of this object: eight tiles of 16 rows x 64 bytes, which is what every kernel
// here uses (short inputs are padded with zeros). Other libraries configure the same registers on the same
// threads, so every parallel region that uses tiles holds one, per thread. Does nothing without AMX.
class TileGuard {
 public:
  TileGuard();
  ~TileGuard();
  TileGuard(const TileGuard&) = delete;
  TileGuard& operator=(const TileGuard&) = delete;
};

// Memory of this thread, aligned to 64 bytes, kept between calls; a second call with the same slot may move
// it. Slots are the user's: one per purpose that is alive at the same time.
enum ScratchSlot { SCRATCH_A, SCRATCH_B, SCRATCH_C, SCRATCH_ATTENTION, NUM_SCRATCH_SLOTS };
void* scratch(ScratchSlot slot, size_t num_bytes);

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// The first unit of a part when num_units are shared out as evenly as possible.
inline int64_t part_begin(int64_t num_units, int part, int num_parts) { return num_units * part / num_parts; }

inline __mmask16 mask16(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// The largest magnitude so far, by its bits: without signs they have the order of the numbers, and NaN comes last
// and thus stays, which the maximum of floating point does not promise.
inline __m512i max_magnitude(__m512i most, __m512 x) {
  return _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
}
inline float reduce_magnitude(__m512i most) {
  const uint32_t bits = _mm512_reduce_max_epu32(most);
  float largest;
  std::memcpy(&largest, &bits, 4);
  return largest;
}

}  // namespace hearth
