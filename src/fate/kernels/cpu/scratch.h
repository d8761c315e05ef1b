// Memory of one kernel call, kept by the calling thread for the next call: reserve the sum, then take the parts.
//
// Each thread has one memory for kernels and one for what calls kernels, whose memory they must leave alone.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fate {

class Scratch {
  public:
    static constexpr int64_t kAlign = 64;

    enum Level { kKernel, kCaller };

    // The calling thread's scratch, empty and at least `bytes` large.
    static Scratch& reserve(int64_t bytes, Level level = kKernel) {
        Scratch& scratch = own()[level];
        scratch.grow(bytes);
        scratch.used_ = 0;
        return scratch;
    }

    // Bytes that the calling thread's scratches hold.
    static int64_t held() { return own()[kKernel].size_ + own()[kCaller].size_; }

    // Bytes that take<T>(count) uses.
    template <typename T>
    static int64_t bytes_of(int64_t count) { return rounded(count * static_cast<int64_t>(sizeof(T))); }

    static int64_t rounded(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

    template <typename T>
    T* take(int64_t count) {
        T* at = reinterpret_cast<T*>(base_ + used_);
        used_ += rounded(count * static_cast<int64_t>(sizeof(T)));
        if (used_ > size_) std::abort();  // a caller reserved less than it takes
        return at;
    }

    int64_t used() const { return used_; }
    void rewind(int64_t mark) { used_ = mark; }

    ~Scratch() { std::free(base_); }

  private:
    static Scratch* own() {
        static thread_local Scratch scratches[2];
        return scratches;
    }

    void grow(int64_t bytes) {
        bytes = rounded(bytes);
        if (bytes <= size_) return;
        std::free(base_);
        size_ = 0;
        base_ = static_cast<char*>(std::aligned_alloc(kAlign, bytes));
        if (base_ == nullptr) throw std::bad_alloc();
        size_ = bytes;
    }

    char* base_ = nullptr;
    int64_t size_ = 0;
    int64_t used_ = 0;
};

}  // namespace fate
