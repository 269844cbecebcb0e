// The instruction set in use, permission for AMX, tile configuration and scratch memory.
#include "common.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <new>

namespace hearth {

int isa = ISA_AVX512;

namespace {

#ifdef __AMX_TILE__
// Linux gives AMX to a process that asks for it (Documentation/arch/x86/xstate.rst).
bool ask_for_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfig tile_config;
#endif

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[NUM_SCRATCH_SLOTS];

}  // namespace

TileGuard::TileGuard() {
#ifdef __AMX_TILE__
  if (use_amx()) _tile_loadconfig(&tile_config);
#endif
}

TileGuard::~TileGuard() {
#ifdef __AMX_TILE__
  if (use_amx()) _tile_release();
#endif
}

void* scratch(ScratchSlot slot, size_t num_bytes) {
  Buffer& buffer = buffers[slot];
  if (buffer.size < num_bytes) {
    std::free(buffer.data);
    constexpr size_t HUGE_PAGE = size_t(2) << 20;
    const size_t align = num_bytes >= HUGE_PAGE / 2 ? HUGE_PAGE : 64;
    buffer.size = (num_bytes + align - 1) / align * align;
    buffer.data = std::aligned_alloc(align, buffer.size);
    if (buffer.data == nullptr) {
      buffer.size = 0;
      std::abort();  // no exception may leave a parallel region
    }
    if (align == HUGE_PAGE) madvise(buffer.data, buffer.size, MADV_HUGEPAGE);
  }
  return buffer.data;
}

}  // namespace hearth

// Choose the instruction set: `wanted` is 0 for the best, or a member of Isa. Returns the one in use.
extern "C" int hearth_init(int wanted) {
  hearth::isa = hearth::ISA_AVX512;
#ifdef __AMX_TILE__
  if (wanted != hearth::ISA_AVX512 && hearth::ask_for_amx()) hearth::isa = hearth::ISA_AMX;
#else
  (void)wanted;
#endif
  return hearth::isa;
}

// Ask for huge pages under a buffer that is about to be filled: weights are read in one long stream, and
// small pages cost a walk of the page table every 4 KiB. A refusal is no error.
extern "C" void hearth_advise_huge(void* data, size_t num_bytes) {
  const uintptr_t page = 4096, begin = ((uintptr_t)data + page - 1) / page * page;
  const uintptr_t end = ((uintptr_t)data + num_bytes) / page * page;
  if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
}
