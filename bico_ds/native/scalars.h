// Scalars of the fused kernels: to and from fp32, and exp.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

using c10::BFloat16;

inline float widen(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float widen(float x) { return x; }

template <typename T>
T narrow(float x);

template <>
inline float narrow<float>(float x) {
  return x;
}

template <>
inline BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return BFloat16(static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16), BFloat16::from_bits());
}

// exp(x) for x <= 0 to 2 ulp: Cody-Waite reduction and a degree-6 polynomial; branch-free, so that loops vectorise.
inline float exp_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  float shifted = x * 1.44269504f + 12582912.0f;
  float n = shifted - 12582912.0f;
  float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * (0.0083333f + r * 0.0013888f)))));
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}
