// What both drivers share: tensors in allocations of exactly their size, so that the byte behind
// them is out of bounds, and cases.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/ppcr_types.h"

struct Sizes {
  int64_t images, channels, pixels;
  std::vector<int64_t> levels;
};

inline ppcr::Pooling pooling_of(const Sizes& sizes) {
  ppcr::Pooling pooling;
  const char* const wrong = ppcr::make_pooling(
      sizes.levels.data(), static_cast<int64_t>(sizes.levels.size()), sizes.channels, pooling);
  if (wrong != nullptr) {
    std::fprintf(stderr, "%s\n", wrong);
    std::exit(2);
  }
  return pooling;
}

// `count` values that begin `offset` elements into an allocation that ends with them.
template <class T>
class Tensor {
 public:
  explicit Tensor(int64_t count, int64_t offset = 0)
      : count_(count),
        offset_(offset),
        memory_(static_cast<T*>(std::malloc((offset + count) * sizeof(T))), &std::free) {}
  T* data() { return memory_.get() + offset_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  Tensor& draw(uint32_t seed) {
    uint64_t state = seed * 2654435761u + 1;
    for (int64_t i = 0; i < count_; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      data()[i] =
          static_cast<T>(static_cast<float>(state >> 40) / (1 << 22) - 1.5f);  // -1.5 .. 2.5
    }
    return *this;
  }
  Tensor& fill_with_nan() {
    std::memset(static_cast<void*>(data()), 0xFF, bytes());
    return *this;
  }
  bool finite() {
    for (int64_t i = 0; i < count_; ++i)
      if (!std::isfinite(static_cast<double>(data()[i]))) return false;
    return true;
  }
  bool same_bits(Tensor& other) { return std::memcmp(data(), other.data(), bytes()) == 0; }

 private:
  int64_t count_, offset_;
  std::unique_ptr<T, void (*)(void*)> memory_;
};

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "wrong result: %s\n", what.c_str());
  std::exit(3);
}
