// Prefill: tokens in block form. Eight weight rows are unpacked once for all tokens; a vector holds 4 columns of 16
// tokens and meets 4 broadcast weights, lanes = tokens.
#include <cstring>

#include "avx512.h"

namespace fate {

namespace {

constexpr int kOctet = 8;  // weight rows unpacked together

// Eight unpacked weight rows. Rows beyond the matrix are zero.
struct Octet {
    uint8_t* codes;  // [8][groups * 64]
    float* scales;   // [8][padded groups]
    float* offsets;
    float* lanes;  // [16 lanes][8 rows][2 blocks][16 tokens]
};

constexpr int64_t kLaneFloats = static_cast<int64_t>(kLanes) * kOctet * 2 * kBlockTokens;

// Bytes from one unpacked row to the next: an odd number of cache lines, so that eight rows do not share L1 sets.
inline int64_t octet_pitch(int groups) { return static_cast<int64_t>(groups | 1) * kGroup; }

int64_t avx512_scratch_bytes(int groups) {
    return kLaneFloats * 4 + kOctet * (octet_pitch(groups) + 8 * padded_groups(groups));
}

Octet octet_in(void* scratch, int groups) {
    float* lanes = static_cast<float*>(scratch);
    float* scales = lanes + kLaneFloats;
    float* offsets = scales + kOctet * padded_groups(groups);
    return {reinterpret_cast<uint8_t*>(offsets + kOctet * padded_groups(groups)), scales, offsets, lanes};
}

template <Mode mode, int groups>
inline void store_codes(const uint8_t* high, const uint8_t* low, uint8_t* out) {
    __m512i codes[groups];
    unpack<mode, groups>(high, low, codes);
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) _mm512_storeu_si512(out + g * kGroup, codes[g]);
}

template <Mode mode>
void unpack_octet(const Matrix& matrix, int row, int count, const Octet& octet) {
    constexpr int kStep = mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes;
    const int groups = matrix.groups, padded = padded_groups(groups);
    for (int r = 0; r < kOctet; ++r) {
        uint8_t* codes = octet.codes + r * octet_pitch(groups);
        if (r >= count) {
            std::memset(codes, 0, static_cast<size_t>(groups) * kGroup);
            std::memset(octet.scales + r * padded, 0, padded * sizeof(float));
            std::memset(octet.offsets + r * padded, 0, padded * sizeof(float));
            continue;
        }
        const uint8_t* high = matrix.high_row(row + r);
        const uint8_t* low = mode == Mode::kInt4 ? matrix.low_row(row + r) : high;
        int g = 0;
        for (; g + 4 <= groups; g += 4) store_codes<mode, 4>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        const int left = groups - g;
        if (left == 3) store_codes<mode, 3>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        else if (left == 2) store_codes<mode, 2>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        else if (left == 1) store_codes<mode, 1>(high + g * kStep, low + g * kStep, codes + g * kGroup);
        for (g = 0; g < groups; g += kLanes) {
            const Affine affines = load_affine<mode>(matrix.affine_row(row + r), groups, g);
            _mm512_storeu_ps(octet.scales + r * padded + g, affines.scales);
            _mm512_storeu_ps(octet.offsets + r * padded + g, affines.offsets);
        }
    }
}

inline __m512i broadcast4(const uint8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, 4);
    return _mm512_set1_epi32(four);
}

// dots += u8 weights * s8 activations, in place: GCC copies the intrinsic's 16 live accumulators around every step.
inline void accumulate(__m512i& dots, __m512i weights, __m512i activations) {
    asm("vpdpbusd %2, %1, %0" : "+v"(dots) : "v"(weights), "v"(activations));
}

// 8 vectors of 16 tokens -> tile[token][0..7].
inline void store_transposed(const __m512 rows[kOctet], float* tile) {
    for (int half = 0; half < 2; ++half) {
        const __m512* r = rows + 4 * half;
        const __m512 lo01 = _mm512_unpacklo_ps(r[0], r[1]), hi01 = _mm512_unpackhi_ps(r[0], r[1]);
        const __m512 lo23 = _mm512_unpacklo_ps(r[2], r[3]), hi23 = _mm512_unpackhi_ps(r[2], r[3]);
        const __m512 tokens[4] = {_mm512_shuffle_ps(lo01, lo23, 0x44), _mm512_shuffle_ps(lo01, lo23, 0xee),
                                  _mm512_shuffle_ps(hi01, hi23, 0x44), _mm512_shuffle_ps(hi01, hi23, 0xee)};
        for (int i = 0; i < 4; ++i) {
            float* out = tile + i * kTileRows + 4 * half;
            _mm_storeu_ps(out, _mm512_extractf32x4_ps(tokens[i], 0));
            _mm_storeu_ps(out + 4 * kTileRows, _mm512_extractf32x4_ps(tokens[i], 1));
            _mm_storeu_ps(out + 8 * kTileRows, _mm512_extractf32x4_ps(tokens[i], 2));
            _mm_storeu_ps(out + 12 * kTileRows, _mm512_extractf32x4_ps(tokens[i], 3));
        }
    }
}

// One group of eight rows against n blocks of 16 tokens, added to lane g % 16.
template <int n>
inline void add_group(const Octet& octet, const int8_t* const* codes, const float* const* scales,
                      const float* const* sums, int groups, int g) {
    __m512i dots[kOctet][n];
#pragma GCC unroll 8
    for (int r = 0; r < kOctet; ++r)
#pragma GCC unroll 2
        for (int b = 0; b < n; ++b) dots[r][b] = _mm512_setzero_si512();
    const uint8_t* weights = octet.codes + g * kGroup;
    const int64_t pitch = octet_pitch(groups);
    for (int four = 0; four < kGroup / 4; ++four) {
        __m512i x[n];
#pragma GCC unroll 2
        for (int b = 0; b < n; ++b) {
            x[b] = load(codes[b] + (g * (kGroup / 4) + four) * 64);
            _mm_prefetch(codes[b] + ((g + 1) * (kGroup / 4) + four) * 64, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kOctet; ++r) {
            const __m512i w = broadcast4(weights + r * pitch + four * 4);
#pragma GCC unroll 2
            for (int b = 0; b < n; ++b) accumulate(dots[r][b], w, x[b]);
        }
    }
    __m512 scale[n], sum[n];
#pragma GCC unroll 2
    for (int b = 0; b < n; ++b) {
        scale[b] = _mm512_loadu_ps(scales[b] + g * kBlockTokens);
        sum[b] = _mm512_loadu_ps(sums[b] + g * kBlockTokens);
    }
    float* lane = octet.lanes + (g % kLanes) * kOctet * n * kBlockTokens;
    const int padded = padded_groups(groups);
#pragma GCC unroll 8
    for (int r = 0; r < kOctet; ++r) {
        const __m512 a = _mm512_set1_ps(octet.scales[r * padded + g]);
        const __m512 offset = _mm512_set1_ps(octet.offsets[r * padded + g]);
#pragma GCC unroll 2
        for (int b = 0; b < n; ++b) {
            float* at = lane + (r * n + b) * kBlockTokens;
            const __m512 value =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][b]), _mm512_mul_ps(a, scale[b]), _mm512_loadu_ps(at));
            _mm512_storeu_ps(at, _mm512_fmadd_ps(offset, sum[b], value));
        }
    }
}

// The bytes of the eight rows to unpack next, fetched a group's worth at a time while these eight are multiplied.
struct Ahead {
    const uint8_t *high, *low;
    const uint16_t* affine;
    int step;  // bytes of eight rows' codes of one group, in each plane

    explicit Ahead(const Matrix& matrix, int row)
        : high(matrix.high_row(row)),
          low(matrix.mode == Mode::kInt4 ? matrix.low_row(row) : nullptr),
          affine(matrix.affine_row(row)),
          step(kOctet * (matrix.mode == Mode::kInt8 ? kGroup : kPlaneGroupBytes)) {}

    void fetch(int group) const {
        const int64_t first = static_cast<int64_t>(group) * step;
        for (int64_t at = first; at < first + step; at += 64) {
            _mm_prefetch(high + at, _MM_HINT_T0);
            if (low != nullptr) _mm_prefetch(low + at, _MM_HINT_T0);
        }
        _mm_prefetch(affine + static_cast<int64_t>(group) * 2 * kOctet, _MM_HINT_T0);
    }
};

// Eight rows against n (1 or 2) blocks.
template <int n>
void octet_outputs(const Octet& octet, const TokenBlocks& tokens, int block, float gain, const Ahead* ahead,
                   float* tile) {
    const int groups = tokens.groups;
    const int8_t* codes[n];
    const float *scales[n], *sums[n];
    for (int b = 0; b < n; ++b) {
        codes[b] = tokens.block_codes(block + b);
        scales[b] = tokens.block_scales(block + b);
        sums[b] = tokens.block_sums(block + b);
    }
    constexpr int kLane = kOctet * n * kBlockTokens;
    std::memset(octet.lanes, 0, kLanes * kLane * sizeof(float));
    for (int g = 0; g < groups; ++g) {
        if (ahead != nullptr) ahead->fetch(g);
        add_group<n>(octet, codes, scales, sums, groups, g);
    }
    for (int half = kLanes / 2; half >= 1; half /= 2) {
        for (int i = 0; i < half * kLane; i += kLanes) {
            float* at = octet.lanes + i;
            _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), _mm512_loadu_ps(at + half * kLane)));
        }
    }
    for (int b = 0; b < n; ++b) {
        __m512 rows[kOctet];
        for (int r = 0; r < kOctet; ++r) {
            rows[r] = _mm512_mul_ps(_mm512_loadu_ps(octet.lanes + (r * n + b) * kBlockTokens), _mm512_set1_ps(gain));
        }
        store_transposed(rows, tile + b * kBlockTokens * kTileRows);
    }
}

}  // namespace

void avx512_blocks(const Matrix& matrix, int row, int count, const TokenBlocks& tokens, int first, int n, float* tile,
                   void* scratch) {
    const Octet octet = octet_in(scratch, matrix.groups);
    for (int r = 0; r < count; r += kOctet) {
        const int here = count - r < kOctet ? count - r : kOctet;
        if (matrix.mode == Mode::kInt4) unpack_octet<Mode::kInt4>(matrix, row + r, here, octet);
        else if (matrix.mode == Mode::kInt2) unpack_octet<Mode::kInt2>(matrix, row + r, here, octet);
        else unpack_octet<Mode::kInt8>(matrix, row + r, here, octet);
        const Ahead ahead(matrix, row + r + kOctet);
        for (int b = 0; b < n; b += 2) {
            float* out = tile + b * kBlockTokens * kTileRows + r;
            const Ahead* fetched = b == 0 ? &ahead : nullptr;
            if (b + 2 <= n) octet_outputs<2>(octet, tokens, first + b, matrix.gain, fetched, out);
            else octet_outputs<1>(octet, tokens, first + b, matrix.gain, fetched, out);
        }
    }
}

const TileKernels kAvx512Tiles = {"avx512-vnni", 9, avx512_scratch_bytes, avx512_rows, avx512_blocks};

}  // namespace fate
