// Random calls of every kernel over buffers that end where their contents do, each result against float64 (make fuzz).
//
//   kernel_fuzz ROUNDS SEED     prints how many calls of each kind were made, or what is wrong and the round's seed
//   kernel_fuzz --plant WHAT    hands a kernel a buffer that is one element short: the sanitizer must end the process
#include <string>

#include "cases.h"
#include "tiles.h"

namespace {

using Case = void (*)(fuzz::Random&, const std::string& planted);

struct Kind {
    const char* name;
    Case run;
    int share;  // of all rounds
};

const Kind kKinds[] = {{"linear", fuzz::linear, 5},     {"experts", fuzz::experts, 6}, {"gather", fuzz::gather, 2},
                       {"reduce", fuzz::reduce, 2},     {"attend", fuzz::attend, 2},   {"quantize", fuzz::quantize, 1},
                       {"rank", fuzz::rank, 1},         {"copy", fuzz::copy, 1},       {"layer", fuzz::layer, 2},
                       {"gated", fuzz::gated, 1},       {"decode", fuzz::decode, 3},   {"latent", fuzz::latent, 2},
                       {"delta", fuzz::delta, 2}};

std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
    for (const fate::TileKernels* kernels : fate::available_tile_kernels()) found.push_back(kernels->name);
    return found;
}

int plant(const std::string& what) {
    for (uint64_t seed = 0; seed < 1000; ++seed) {
        fuzz::Random random{std::mt19937_64(seed)};
        fuzz::g_guarded = seed % 2 == 1;
        (what.rfind("experts", 0) == 0 ? fuzz::experts : fuzz::linear)(random, what);
    }
    std::printf("%s: not noticed\n", what.c_str());
    return 0;
}

int run(uint64_t rounds, uint64_t seed) {
    const std::vector<std::string> sets = instruction_sets();
    std::vector<uint64_t> calls(std::size(kKinds)), of_set(sets.size());
    int64_t shares = 0;
    for (const Kind& kind : kKinds) shares += kind.share;
    for (uint64_t round = seed; round < seed + rounds; ++round) {
        fuzz::Random random{std::mt19937_64(round)};
        fuzz::g_guarded = random.chance(0.5);
        const size_t set = random.in(0, static_cast<int64_t>(sets.size()) - 1);
        fate::select_tile_kernels(sets[set].c_str());
        int64_t choice = random.in(0, shares - 1);
        size_t kind = 0;
        while (choice >= kKinds[kind].share) choice -= kKinds[kind++].share;
        std::snprintf(fuzz::g_round, sizeof fuzz::g_round, "seed %llu (%s, %s)",
                      static_cast<unsigned long long>(round), kKinds[kind].name, sets[set].c_str());
        kKinds[kind].run(random, "");
        ++calls[kind];
        ++of_set[set];
    }
    for (size_t i = 0; i < std::size(kKinds); ++i) {
        std::printf("%s%s %llu", i == 0 ? "" : ", ", kKinds[i].name, static_cast<unsigned long long>(calls[i]));
    }
    for (size_t i = 0; i < sets.size(); ++i) {
        std::printf("%s%s %llu", i == 0 ? "; " : ", ", sets[i].c_str(), static_cast<unsigned long long>(of_set[i]));
    }
    std::printf("\n");
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 3 && std::string(arguments[1]) == "--plant") return plant(arguments[2]);
    if (count == 3) return run(std::stoull(arguments[1]), std::stoull(arguments[2]));
    std::fprintf(stderr, "usage: kernel_fuzz ROUNDS SEED, or kernel_fuzz --plant WHAT\n");
    return 2;
}
