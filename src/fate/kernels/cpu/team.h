// Threads that help the calling one with a loop. Unlike an OpenMP team, nobody waits for a helper that has not come: a
// caller whose helpers are asleep, or kept from their core by a thread that reads, does all items itself. What it waits
// for is at most the item a helper is in.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace fate {

using ItemBody = void (*)(const void* context, int64_t item, int thread);

// body(context, item, thread) for every item of [0, count), on up to `threads` threads; returns when all are done.
// thread: in [0, threads), 0 the caller. Items are handed out in order. Where another caller is at it, or in an item,
// the caller does them alone.
void run_items(int64_t count, int threads, ItemBody body, const void* context);

// The same for a callable (item, thread).
template <typename F>
void parallel_for(int64_t count, int threads, const F& body) {
    run_items(
        count, threads,
        [](const void* context, int64_t item, int thread) { (*static_cast<const F*>(context))(item, thread); },
        std::addressof(body));
}

}  // namespace fate
