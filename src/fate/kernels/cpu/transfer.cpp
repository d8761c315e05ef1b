#include "transfer.h"

#if defined(__linux__)
#include <sys/prctl.h>
#endif
#include <time.h>
#include <unistd.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

namespace fate {

namespace {

// Past the caches where the processor can: an expert fits in none, and the layer that computes needs them.
void copy_streaming(uint8_t* to, const uint8_t* from, int64_t size) {
#if defined(__SSE2__)
    int64_t at = 0;
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        for (; at + 64 <= size; at += 64) {
            const __m128i* source = reinterpret_cast<const __m128i*>(from + at);
            __m128i* target = reinterpret_cast<__m128i*>(to + at);
            _mm_prefetch(reinterpret_cast<const char*>(from + at + 1024), _MM_HINT_NTA);
            for (int i = 0; i < 4; ++i) _mm_stream_si128(target + i, _mm_loadu_si128(source + i));
        }
        _mm_sfence();
    }
    std::memcpy(to + at, from + at, static_cast<size_t>(size - at));
#else
    std::memcpy(to, from, static_cast<size_t>(size));
#endif
}

// True while there is more to move and nobody has asked to stop.
bool advance(Progress* progress, int64_t bytes) {
    std::atomic_ref<int64_t>(progress->done).fetch_add(bytes, std::memory_order_relaxed);
    return std::atomic_ref<int64_t>(progress->stop).load(std::memory_order_relaxed) == 0;
}

// `seconds` of CLOCK_MONOTONIC.
void sleep_until(double seconds) {
#if defined(__linux__)
    // Linux lets sleeps of a thread run over by 50 us, an eighth of an expert's time on a fast link.
    thread_local const int punctual = prctl(PR_SET_TIMERSLACK, 1000UL, 0, 0, 0);
    (void)punctual;
#endif
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const double left = seconds - (static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec));
    if (left <= 0) return;
    timespec span;
    span.tv_sec = static_cast<time_t>(left);
    span.tv_nsec = static_cast<long>((left - static_cast<double>(span.tv_sec)) * 1e9);
    while (nanosleep(&span, &span) != 0 && errno == EINTR) {
    }
}

}  // namespace

int read_file(int fd, uint8_t* to, int64_t length, int64_t offset, int64_t chunk, Progress* progress) {
    for (int64_t at = 0; at < length;) {
        const ssize_t got = pread(fd, to + at, static_cast<size_t>(std::min(chunk, length - at)), offset + at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0 || (at + got < length && got % 4096 != 0)) return ENODATA;  // only the file's end cuts a page
        at += got;
        if (!advance(progress, got)) break;
    }
    return 0;
}

void copy_paced(uint8_t* to, const uint8_t* from, int64_t length, int64_t chunk, double start_s, double bytes_per_s,
                Progress* progress) {
    for (int64_t at = 0; at < length;) {
        const int64_t size = std::min(chunk, length - at);
        copy_streaming(to + at, from + at, size);
        at += size;
        if (bytes_per_s > 0) sleep_until(start_s + static_cast<double>(at) / bytes_per_s);
        if (!advance(progress, size)) break;
    }
}

}  // namespace fate
