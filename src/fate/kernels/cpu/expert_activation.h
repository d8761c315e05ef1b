// What an expert computes between its matrices, one formula for all families (fate/kernels/activation.py):
//
//   gated    min(act(min(gate, gate_max)), act_max) * (clamp(up, -up_limit, up_limit) + up_offset)
//   plain    act(up)
//
// silu is x * sigmoid(alpha * x). silu_softcap bounds softly, limit * tanh(x / limit), and its sigmoid sees what was
// not bounded: softcap(gate, gate_max) * sigmoid(gate) * softcap(up, up_limit).
#pragma once

#include <limits>

namespace fate {

enum class ActivationKind : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4, kSiluSoftcap = 5 };

struct ExpertActivation {
    static constexpr float kNone = std::numeric_limits<float>::infinity();

    ActivationKind kind = ActivationKind::kSilu;
    bool gated = true;
    bool interleaved = false;  // rows of the first matrix: gate 0, up 0, gate 1, ...; else gates, then ups
    float alpha = 1.0f;
    float gate_max = kNone, act_max = kNone, up_limit = kNone;
    float up_offset = 0.0f;
};

// gate and up [count] -> out; `up` is null where nothing gates, and `gate` is what act is of.
void activate(const ExpertActivation& activation, const float* gate, const float* up, int count, float* out);

}  // namespace fate
