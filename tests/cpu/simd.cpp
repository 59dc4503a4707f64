// The vector operations of simd.h by themselves, against double precision and at the edge of memory
// that may not be touched: for an instruction set that only an emulator runs. Built by make arm;
// tests/test_arm.py reads the machine code of the functions here that C names.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "sigmoid.cpp"

extern "C" {
void half_to_float(float* to, const Half* from) { store(to, load(from)); }
void float_to_half(Half* to, const float* from) { store(to, load(from)); }
void bfloat16_to_float(float* to, const BFloat16* from) { store(to, load(from)); }
void float_to_bfloat16(BFloat16* to, const float* from) { store(to, load(from)); }
void multiply_add_float(float* to, const float* from) {
  constexpr int W = kLanes<float>;
  store(to, multiply_add(load(from), load(from + W), load(from + 2 * W)));
}
void multiply_add_double(double* to, const double* from) {
  constexpr int W = kLanes<double>;
  store(to, multiply_add(load(from), load(from + W), load(from + 2 * W)));
}
void inv_sqrt_float(float* to, const float* from) { store(to, SimdMath::inv_sqrt(load(from))); }
void inv_sqrt_double(double* to, const double* from) { store(to, SimdMath::inv_sqrt(load(from))); }
}

namespace {

void expect(bool condition, const char* what, double at) {
  if (condition) return;
  std::printf("wrong: %s at %a\n", what, at);
  std::exit(3);
}

// A float of 16 bits with `digits` of a significand, the leading one included, as a double.
double decoded(uint32_t bits, int digits) {
  const int fraction = digits - 1, exponents = 15 - fraction;
  const int bias = (1 << (exponents - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> fraction, low = bits & ((1 << fraction) - 1);
  const double magnitude = exponent == (1 << exponents) - 1 ? (low ? NAN : INFINITY)
                           : exponent
                               ? std::ldexp(low + (1 << fraction), exponent - bias - fraction)
                               : std::ldexp(low, 1 - bias - fraction);
  return bits & 0x8000 ? -magnitude : magnitude;
}
// The nearest of them, ties to even.
double rounded(double v, int digits) {
  const int least = digits == 11 ? -14 : -126, most = digits == 11 ? 15 : 127;
  if (!std::isfinite(v)) return v;
  int exponent;
  std::frexp(v, &exponent);
  const int unit = (exponent - 1 < least ? least : exponent - 1) - digits + 1;
  const double near = std::ldexp(std::nearbyint(std::ldexp(v, -unit)), unit);
  return std::fabs(near) >= std::ldexp(1, most + 1) ? std::copysign(INFINITY, v) : near;
}
bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

void check_narrow(float v) {
  constexpr int W = kLanes<float>;
  float from[W];
  for (float& lane : from) lane = v;
  Half half[W];
  BFloat16 bfloat16[W];
  float_to_half(half, from);
  float_to_bfloat16(bfloat16, from);
  expect(same(decoded(half[W - 1].bits, 11), rounded(v, 11)), "float to half", v);
  expect(same(decoded(bfloat16[W - 1].bits, 8), rounded(v, 8)), "float to bfloat16", v);
}

void check_16_bits() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double half = decoded(bits, 11), next = decoded(bits + 1, 11);
    expect(same(widen_half(static_cast<uint16_t>(bits)), half), "half to float", half);
    BFloat16 b[kLanes<float>] = {{static_cast<uint16_t>(bits)}};
    float wide[kLanes<float>];
    bfloat16_to_float(wide, b);
    expect(same(wide[0], decoded(bits, 8)), "bfloat16 to float", wide[0]);
    for (const double v :
         {half, (half + next) / 2, decoded(bits, 8), (decoded(bits, 8) + decoded(bits + 1, 8)) / 2})
      check_narrow(static_cast<float>(v));
  }
  for (uint32_t i = 0; i < 1u << 20; ++i) {
    const uint32_t bits = i * 4093;
    float v;
    std::memcpy(&v, &bits, sizeof v);
    check_narrow(v);
  }
}

template <class S>
void check_arithmetic(void (*add)(S*, const S*), void (*root)(S*, const S*)) {
  constexpr int W = kLanes<S>;
  for (int i = 0; i < 4096; ++i) {
    S from[3 * W], to[W];
    for (int j = 0; j < 3 * W; ++j) from[j] = S(std::rand()) / S(RAND_MAX) + S(0x1p-20);
    add(to, from);
    for (int j = 0; j < W; ++j)
      expect(to[j] == std::fma(from[j], from[W + j], from[2 * W + j]), "a * b + c", from[j]);
    root(to, from);
    for (int j = 0; j < W; ++j) expect(to[j] == 1 / std::sqrt(from[j]), "1 / square root", from[j]);
  }
}

// Partial loads and stores up to the end of a page, behind which is none.
template <class T>
void check_partial(char* end) {
  constexpr int W = kLanes<ppcr::Acc<T>>;
  for (int n = 1; n < W; ++n) {
    T* const at = reinterpret_cast<T*>(end) - n;
    T lanes[W], back[W];
    for (int i = 0; i < W; ++i) {
      if constexpr (sizeof(T) == 2)
        lanes[i].bits = static_cast<uint16_t>(i + 1);
      else
        lanes[i] = static_cast<T>(i + 1);
    }
    std::memset(static_cast<void*>(at - 1), 0, sizeof(T));
    store(at, load(lanes), n);
    store(back, load(at, n));
    T none[2] = {};
    expect(std::memcmp(at, lanes, n * sizeof(T)) == 0, "partial store", n);
    expect(std::memcmp(at - 1, none, sizeof(T)) == 0, "partial store's neighbour", n);
    expect(std::memcmp(back, lanes, n * sizeof(T)) == 0, "partial load", n);
    for (int i = n; i < W; ++i)
      expect(std::memcmp(&back[i], none, sizeof(T)) == 0, "lane beyond a partial load", n);
  }
}

}  // namespace

int main() {
  check_16_bits();
  check_arithmetic<float>(multiply_add_float, inv_sqrt_float);
  check_arithmetic<double>(multiply_add_double, inv_sqrt_double);
  const size_t page = 1 << 16;
  void* const pages =
      mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  char* const end = static_cast<char*>(pages) + page;
  expect(pages != MAP_FAILED && mprotect(end, page, PROT_NONE) == 0, "memory", 0);
  check_partial<float>(end);
  check_partial<double>(end);
  check_partial<Half>(end);
  check_partial<BFloat16>(end);
  const double worst = worst_float(0, 4001, (int64_t(1) << 32) / 4001);
  expect(worst <= 2.5, "sigmoid, in units of the last place", worst);
  std::printf("vector operations are right; sigmoid within %.2f units of the last place\n", worst);
}
