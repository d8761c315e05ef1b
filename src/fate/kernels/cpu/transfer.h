// Moving bytes as single calls that hold no Python object: what transfer threads do between the interpreter's turns.
#pragma once

#include <cstdint>

namespace fate {

// Shared with Python (transfer/scheduler.py): `stop` asks to return at the end of the chunk, `done` counts bytes.
struct Progress {
    int64_t stop;
    int64_t done;
};

// Bytes [offset, offset + length) of a file to `to`, `chunk` at a time. 0, or errno; ENODATA where the file ends early.
int read_file(int fd, uint8_t* to, int64_t length, int64_t offset, int64_t chunk, Progress* progress);

// `length` bytes, each chunk arriving when a link of `bytes_per_s` (0: no limit) that began at `start_s` of
// CLOCK_MONOTONIC would have brought it.
void copy_paced(uint8_t* to, const uint8_t* from, int64_t length, int64_t chunk, double start_s, double bytes_per_s,
                Progress* progress);

}  // namespace fate
