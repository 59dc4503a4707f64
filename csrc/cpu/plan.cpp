// Which tiles, and which instruction set.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace ppcr {

void plan(Problem& p, int64_t element_size) {
  const int64_t scalar = element_size == 8 ? 8 : 4;  // accumulation type
  const int64_t unit = 64 / scalar;                  // pixels in the widest vector
  const int64_t rows = p.pooling.segments + 1, capacity = kScratchBytes / scalar;
  const int64_t pixel_bytes = p.channels * element_size;

  if (p.pixel_major) {  // one image holds all pixels
    p.pixels *= p.images;
    p.images = 1;
  }
  // Channel-major tiles need long rows, since every row visits a page of its own, unless a tile is
  // a whole plane and so one run of memory; pixel-major ones always are, and may be small. Scratch
  // holds a value per pixel and row, in pixel-major order four partial ones more.
  const bool plane = !p.pixel_major && p.pixels * pixel_bytes <= 1 << 20;
  const int64_t cache = p.pixel_major ? 64 << 10 : plane ? 1 << 20 : 512 << 10;
  const int64_t most =
      (p.pixel_major ? capacity / (rows * 5) : capacity / rows - 2 * unit) / unit * unit;
  int64_t tile = cache / pixel_bytes / unit * unit;
  const int64_t least = p.pixel_major ? unit : 4 * unit;
  if (tile < least) tile = least;
  if (tile > 1024) tile = 1024;
  if (tile > most) tile = most;

  // Even tiles; one that would be shorter than a vector joins the one before it.
  int64_t count = (p.pixels + tile - 1) / tile;
  tile = ((p.pixels + count - 1) / count + unit - 1) / unit * unit;
  count = p.pixels / tile;
  if (count == 0 || p.pixels - count * tile >= unit || (p.pixel_major && p.pixels > count * tile))
    ++count;
  p.tile_pixels = tile;
  p.tiles_per_image = count;
  p.chunks = p.tiles() < 256 ? p.tiles() : 256;
}

namespace {

enum Capability { kDefault, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"default", "avx2", "avx512"};

#if defined(__x86_64__)
// Clang has no word for it in __builtin_cpu_supports before version 18.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

Capability detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  Capability best = kDefault;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")) {
    best = kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = kAvx512;
  }
  if (const char* wanted = std::getenv("PPCR_CPU_CAPABILITY"))
    for (int i = kDefault; i <= best; ++i)
      if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<Capability>(i);
  return best;
#else
  return kDefault;
#endif
}

Capability capability() {
  static const Capability value = detect();
  return value;
}

}  // namespace

const char* cpu_capability() { return kNames[capability()]; }

Kernel find_kernel(Op op, Dtype dtype) {
  switch (capability()) {
#if defined(__x86_64__)
    case kAvx512:
      return find_kernel_avx512(op, dtype);
    case kAvx2:
      return find_kernel_avx2(op, dtype);
#endif
    default:
      return find_kernel_default(op, dtype);
  }
}

}  // namespace ppcr
