// The tile kernels of one instruction set: compiled once for each (see CMakeLists.txt) with its flags, FATE_TILES, the
// constant to define, and FATE_TILES_NAME.
#include "simd.h"
#include "float_rows.h"
#include "tiles_rows.h"
#if defined(FATE_BAND_KERNEL)
#include "tiles_bands.h"
#endif

namespace fate {

#if defined(FATE_BAND_KERNEL)
const TileKernels FATE_TILES = {
    FATE_TILES_NAME, {kBandsInt4, kBandsInt2, kBandsInt8}, kBandRows, band_bytes, simd_rows, simd_bands,
    simd_dot_rows, simd_add_rows};
#else
static int64_t no_scratch(int) { return 0; }
const TileKernels FATE_TILES = {FATE_TILES_NAME, {INT32_MAX, INT32_MAX, INT32_MAX}, 1, no_scratch, simd_rows, nullptr,
                                simd_dot_rows, simd_add_rows};
#endif

}  // namespace fate
