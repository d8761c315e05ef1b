#include "tiles.h"

#include <cstring>

#if defined(FATE_X86)
#include <cpuid.h>
#elif defined(FATE_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fate {

namespace {

bool any_processor() { return true; }

#if defined(FATE_X86)
// Asks the operating system's part too: whether it keeps the wide registers of a thread.
bool has_avx512_vnni() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

bool has_avx2() {
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1u) != 0;
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1u) != 0;
}
#elif defined(FATE_ARM)
bool has_dotprod() {
#if defined(__ARM_FEATURE_DOTPROD)
    return true;
#elif defined(__linux__)
    constexpr unsigned long kDotProd = 1ul << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & kDotProd) != 0;
#else
    return false;
#endif
}
#endif

struct Choice {
    const TileKernels* kernels;
    bool (*runs)();
};

// Fastest first.
const Choice kChoices[] = {
#if defined(FATE_X86)
    {&kAvx512VnniTiles, has_avx512_vnni},
    {&kAvxVnniTiles, has_avx_vnni},
    {&kAvx2Tiles, has_avx2},
#elif defined(FATE_ARM)
    {&kNeonDotprodTiles, has_dotprod},
    {&kNeonTiles, any_processor},
#endif
    {&kPortableTiles, any_processor},
};

const TileKernels* g_selected = available_tile_kernels().front();

}  // namespace

std::vector<const TileKernels*> available_tile_kernels() {
    std::vector<const TileKernels*> available;
    for (const Choice& choice : kChoices) {
        if (choice.runs()) available.push_back(choice.kernels);
    }
    return available;
}

const TileKernels& tile_kernels() { return *g_selected; }

bool select_tile_kernels(const char* name) {
    for (const TileKernels* kernels : available_tile_kernels()) {
        if (std::strcmp(name, kernels->name) == 0) {
            g_selected = kernels;
            return true;
        }
    }
    return false;
}

}  // namespace fate
