// Included before every C++ file of llama.cpp. GCC before 14 tells the optimiser that `ldtilecfg` reads eight bytes
// and that `tileloadd` reads no memory, so stores to a tile configuration or a tile's buffer may be dropped or moved
// behind their use: the quantised kernels then die of a general protection fault. This says what is read.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 14 && defined(__AMX_TILE__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#undef _tile_loadd
#define _tile_loadd(dst, base, stride)                                                                                 \
    __extension__({                                                                                                    \
        __asm__ volatile("" ::: "memory");                                                                             \
        _tile_loadd_internal(dst, base, stride);                                                                       \
    })
#endif
