#include "expert_activation.h"

#include <cmath>

#include "numeric.h"

// Helpers are inlined by force: what is called from a clone would run the plain instruction set.
#define FATE_INLINE __attribute__((always_inline)) static inline

namespace fate {

FATE_INLINE float at_most(float x, float most) { return x > most ? most : x; }
FATE_INLINE float at_least(float x, float least) { return x < least ? least : x; }

// x * Phi(x), with the complementary error function of Abramowitz and Stegun 7.1.26: error below 1e-7 * |x|.
FATE_INLINE float gelu(float x) {
    const float z = std::fabs(x) * 0.707106781f;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    float sum = 1.061405429f;
    sum = sum * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    const float tail = 0.5f * sum * t * exp2_clamped(z * z * -kLog2E);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// x / 2 * (1 + tanh(y)) is x * sigmoid(2y).
FATE_INLINE float gelu_tanh(float x) {
    const float y = 0.797884561f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp2_clamped(y * (-2.0f * kLog2E)));
}

FATE_INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }

// limit * tanh(x / limit), the identity where there is no limit; a series where 1 - exp(-2z) would cancel.
FATE_INLINE float softcap(float x, float limit) {
    const float z = std::fabs(x / limit), s = z * z;
    const float e = exp2_clamped(z * (-2.0f * kLog2E));
    const float far = (1.0f - e) / (1.0f + e);
    const float near = z * (1.0f + s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f))));
    const float soft = std::copysign(limit * (z < 0.25f ? near : far), x);
    return limit == ExpertActivation::kNone ? x : soft;
}

template <ActivationKind kind>
FATE_INLINE float act(float x, float rate) {
    if constexpr (kind == ActivationKind::kSilu) return silu(x, rate);
    if constexpr (kind == ActivationKind::kGelu) return gelu(x);
    if constexpr (kind == ActivationKind::kGeluTanh) return gelu_tanh(x);
    if constexpr (kind == ActivationKind::kRelu) return relu(x);
    if constexpr (kind == ActivationKind::kRelu2) return relu(x) * relu(x);
    return 0.0f;
}

template <ActivationKind kind>
FATE_INLINE void activate_as(const ExpertActivation& a, const float* gate, const float* up, int count, float* out) {
    const float rate = -kLog2E * a.alpha, gate_max = a.gate_max, act_max = a.act_max;
    const float up_limit = a.up_limit, up_offset = a.up_offset;
    if (up == nullptr) {
        for (int i = 0; i < count; ++i) out[i] = act<kind>(gate[i], rate);
        return;
    }
    for (int i = 0; i < count; ++i) {
        const float bounded = at_least(at_most(up[i], up_limit), -up_limit) + up_offset;
        out[i] = at_most(act<kind>(at_most(gate[i], gate_max), rate), act_max) * bounded;
    }
}

FATE_INLINE void activate_softcapped(const ExpertActivation& a, const float* gate, const float* up, int count,
                                     float* out) {
    const float gate_max = a.gate_max, up_limit = a.up_limit;
    for (int i = 0; i < count; ++i) {
        const float sigmoid = 1.0f / (1.0f + exp2_clamped(gate[i] * -kLog2E));
        out[i] = softcap(gate[i], gate_max) * sigmoid * softcap(up[i], up_limit);
    }
}

FATE_CLONES
void activate(const ExpertActivation& activation, const float* gate, const float* up, int count, float* out) {
    switch (activation.kind) {
        case ActivationKind::kSilu:
            return activate_as<ActivationKind::kSilu>(activation, gate, up, count, out);
        case ActivationKind::kGelu:
            return activate_as<ActivationKind::kGelu>(activation, gate, up, count, out);
        case ActivationKind::kGeluTanh:
            return activate_as<ActivationKind::kGeluTanh>(activation, gate, up, count, out);
        case ActivationKind::kRelu:
            return activate_as<ActivationKind::kRelu>(activation, gate, up, count, out);
        case ActivationKind::kRelu2:
            return activate_as<ActivationKind::kRelu2>(activation, gate, up, count, out);
        case ActivationKind::kSiluSoftcap:
            return activate_softcapped(activation, gate, up, count, out);
    }
}

}  // namespace fate
