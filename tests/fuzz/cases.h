// One random call of each kernel, and what float64 says of it. `planted`: what to hand it too short, or "".
#pragma once

#include <string>

#include "buffers.h"

namespace fuzz {

void linear(Random& random, const std::string& planted);   // x, bias, high, affine, low, out
void experts(Random& random, const std::string& planted);  // experts-record
void gather(Random& random, const std::string& planted);
void reduce(Random& random, const std::string& planted);
void attend(Random& random, const std::string& planted);
void quantize(Random& random, const std::string& planted);
void rank(Random& random, const std::string& planted);
void copy(Random& random, const std::string& planted);
void layer(Random& random, const std::string& planted);
void gated(Random& random, const std::string& planted);
void latent(Random& random, const std::string& planted);
void delta(Random& random, const std::string& planted);
void decode(Random& random, const std::string& planted);

}  // namespace fuzz
