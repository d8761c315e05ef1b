#include "tiles.h"

#include <cstring>

namespace fate {

namespace {

const TileKernels* best() {
#if defined(FATE_HAVE_AVX512)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
        return &kAvx512Tiles;
    }
#endif
    return &kPortableTiles;
}

const TileKernels* g_selected = best();

}  // namespace

const TileKernels& tile_kernels() { return *g_selected; }

bool select_tile_kernels(const char* name) {
    if (std::strcmp(name, "") == 0 || std::strcmp(name, best()->name) == 0) g_selected = best();
    else if (std::strcmp(name, kPortableTiles.name) == 0) g_selected = &kPortableTiles;
    else return false;
    return true;
}

}  // namespace fate
