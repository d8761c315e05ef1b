// Threads that help the calling one with a loop. Unlike an OpenMP team, nobody waits for a helper that has not come: a
// caller whose helpers are asleep, or kept from their core by a thread that reads, does all items itself. What it waits
// for is at most the item a helper is in.
#pragma once

#include <cstdint>

namespace fate {

using ItemBody = void (*)(const void* context, int64_t item, int thread);

// body(context, item, thread) for every item of [0, count), on up to `threads` threads; returns when all are done.
// thread: in [0, threads), 0 the caller. Items are handed out in order. Where another caller is at it, or in an item,
// the caller does them alone.
void run_items(int64_t count, int threads, ItemBody body, const void* context);

// The item at `turn` of an order in which `threads` threads that keep pace each walk through neighbours: what a core
// prefetches beyond its item is then what it does next.
inline int64_t item_at(int64_t turn, int64_t count, int64_t threads) {
    const int64_t run = turn % threads, each = count / threads, longer = count % threads;
    return run * each + (run < longer ? run : longer) + turn / threads;
}

// The same for a callable (item, thread), each thread among neighbours.
template <typename F>
void parallel_for(int64_t count, int threads, const F& body) {
    struct Loop {
        const F& body;
        int64_t count;
        int threads;
    };
    const Loop loop{body, count, threads > 1 ? threads : 1};
    run_items(
        count, threads,
        [](const void* context, int64_t turn, int thread) {
            const Loop& loop = *static_cast<const Loop*>(context);
            loop.body(item_at(turn, loop.count, loop.threads), thread);
        },
        &loop);
}

}  // namespace fate
