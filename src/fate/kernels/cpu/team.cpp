#include "team.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fate {

namespace {

// How long a helper looks for the next loop before it sleeps: the interpreter's time between two kernels of a layer.
constexpr auto kSpin = std::chrono::microseconds(200);
constexpr int kPauses = 32;  // between looks at the clock, and offers of the core to others
constexpr int kMaxHelpers = 255;
constexpr int kBits = 20;
constexpr uint64_t kMaxItems = (uint64_t{1} << kBits) - 1;

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// A loop's number, how many items it has and which is next, in one word: an item is taken by adding 1, and only while
// the loop is the one that was looked at.
struct Ticket {
    uint64_t word;
    uint64_t count() const { return word >> kBits & kMaxItems; }
    uint64_t next() const { return word & kMaxItems; }
    uint64_t loop() const { return word >> 2 * kBits; }
    bool open() const { return next() < count(); }
    Ticket following(uint64_t items) const { return {(loop() + 1) << 2 * kBits | items << kBits}; }
};

class Team {
  public:
    void run(int64_t count, int threads, ItemBody body, const void* context) {
        if (threads <= 1 || count <= 1 || busy_.exchange(true, std::memory_order_acquire)) {
            for (int64_t item = 0; item < count; ++item) body(context, item, 0);
            return;
        }
        engage(std::min<int64_t>(threads, count) - 1);
        for (int64_t first = 0; first < count; first += kMaxItems) {
            first_.store(first, std::memory_order_relaxed);
            loop(std::min<int64_t>(count - first, kMaxItems), threads, body, context);
        }
        busy_.store(false, std::memory_order_release);
    }

  private:
    void loop(int64_t count, int threads, ItemBody body, const void* context) {
        body_.store(body, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        threads_.store(threads, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        const Ticket last{ticket_.load(std::memory_order_relaxed)};
        ticket_.store(last.following(count).word);  // sequentially consistent, as what helpers do before they sleep
        if (asleep_.load() > 0) {
            signal_.fetch_add(1);
            signal_.notify_all();
        }
        take_items(0);
        for (unsigned tries = 0; done_.load(std::memory_order_acquire) < count; ++tries) {
            pause();
            if (tries % kPauses == kPauses - 1) std::this_thread::yield();  // a helper may want this very core
        }
    }

    // Returns the number of the loop that has nothing more to take. What is read here of a loop is that of the ticket,
    // or the ticket has moved on and no item is taken.
    uint64_t take_items(int thread) noexcept {  // others are in the loop: it cannot be left halfway
        for (;;) {
            Ticket ticket{ticket_.load(std::memory_order_acquire)};
            if (!ticket.open()) return ticket.loop();
            const ItemBody body = body_.load(std::memory_order_relaxed);
            const void* context = context_.load(std::memory_order_relaxed);
            const int64_t item = first_.load(std::memory_order_relaxed) + static_cast<int64_t>(ticket.next());
            if (thread >= threads_.load(std::memory_order_relaxed)) return ticket.loop();
            if (!ticket_.compare_exchange_weak(ticket.word, ticket.word + 1, std::memory_order_acq_rel)) continue;
            body(context, item, thread);
            done_.fetch_add(1, std::memory_order_release);
        }
    }

    // At least `helpers` threads exist, if the system grants them.
    void engage(int64_t helpers) {
        helpers = std::min<int64_t>(helpers, kMaxHelpers);
        while (helpers_ < helpers) {
            try {
                std::thread([this, thread = helpers_ + 1] { help(thread); }).detach();
            } catch (const std::exception&) {
                return;
            }
            ++helpers_;
        }
    }

    void help(int thread) {
        for (;;) {
            const uint64_t seen = take_items(thread);
            const auto until = std::chrono::steady_clock::now() + kSpin;
            while (loop_number() == seen && std::chrono::steady_clock::now() < until) {
                for (int i = 0; i < kPauses && loop_number() == seen; ++i) pause();
                std::this_thread::yield();
            }
            if (loop_number() == seen) sleep(seen);
        }
    }

    void sleep(uint64_t seen) {
        asleep_.fetch_add(1);
        const uint32_t signal = signal_.load();
        if (Ticket{ticket_.load()}.loop() == seen) signal_.wait(signal);
        asleep_.fetch_sub(1);
    }

    uint64_t loop_number() const { return Ticket{ticket_.load(std::memory_order_acquire)}.loop(); }

    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<bool> busy_{false};
    std::atomic<ItemBody> body_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int64_t> first_{0};
    std::atomic<int> threads_{0};
    std::atomic<int> asleep_{0};
    std::atomic<uint32_t> signal_{0};
    int helpers_ = 0;  // changed by who is busy
};

}  // namespace

void run_items(int64_t count, int threads, ItemBody body, const void* context) {
    static Team& team = *new Team;  // never destroyed: helpers outlive the interpreter's exit
    team.run(count, threads, body, context);
}

}  // namespace fate
