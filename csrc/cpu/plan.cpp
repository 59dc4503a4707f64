// Which order of memory access, and which tiles: from the sizes and from what the processor is.
#include "kernels.h"

namespace ppcr {
namespace {

// AMD's processors (Zen 4 was measured) read and write fastest in memory order, and with tiles that
// stay in a part of the L1 cache. Others take kGrouped, which Intel's with AVX-512 preferred.
Method choose(const Problem& p, int64_t element_size, int64_t most) {
  const Processor& cpu = processor();
  if (cpu.forced) return cpu.method;
  if (!cpu.amd) return Method::kGrouped;
  const int64_t channel_bytes = p.pixels * element_size, pixel_bytes = p.channels * element_size;
  if (p.channels_last) {  // small pixels of short segments: four at once are less work
    const bool several = pixel_bytes <= std::min(256, 64 * p.pooling.segments);
    return several && !p.pooling.standard ? Method::kGrouped : Method::kSequential;
  }
  // Small images are faster grouped where channels, whole pages apart, share sets of the L1 cache.
  if (p.long_channels(element_size))
    return channel_bytes % kPageBytes != 0 || channel_bytes * p.channels > 1 << 18
               ? Method::kSequential
               : Method::kGrouped;
  // Shorter ones as whole images, where every core gets an image, or where cores that share a
  // channel would take each other's cache lines too often.
  const int64_t largest = p.images < cpu.cores && channel_bytes > 2048 ? 1 << 20 : 4 << 20;
  return channel_bytes * p.channels <= largest && p.pixels <= most ? Method::kSequential
                                                                   : Method::kGrouped;
}

// Whether the AVX2 kernels run where there is AVX-512. Zen 4 executes 512 bits in halves, and
// streams from memory faster with 256: from the sizes on that are here. Newer ones were not
// measured. 16-bit types are 256 bits in memory, and have twice the instructions to save.
bool is_narrow(const Problem& p, int64_t element_size, bool small) {
  if (!processor().amd || element_size == 2) return false;
  const bool grouped = p.method == Method::kGrouped;
  const int64_t pixel_bytes = p.channels * element_size;
  if (p.channels_last) {
    const int64_t least = element_size == 8 ? 1024 : small || p.tensors.dx ? 320 : 256;
    return !grouped && pixel_bytes >= least;
  }
  if (grouped) return p.pixels * pixel_bytes > 2 << 20 && pixel_bytes >= 256;
  return !small && p.pixels > 64 && !p.long_channels(element_size);
}

}  // namespace

void plan(Problem& p, int64_t element_size, const Method* method) {
  const int64_t scalar = element_size == 8 ? 8 : 4;  // accumulation type
  const int64_t unit = 64 / scalar;                  // pixels in the widest vector
  const int64_t pixel_bytes = p.channels * element_size;

  if (p.channels_last) {  // one image holds all pixels
    p.pixels *= p.images;
    p.images = 1;
  }
  // Scratch holds a value per pixel and row; a row of a contiguous tile two vectors more.
  const int64_t row = kScratchBytes / (scalar * (p.pooling.segments + 1)),
                most = (row - 2 * unit) / unit * unit;
  p.method = method != nullptr ? *method : choose(p, element_size, most);
  const bool grouped = p.method == Method::kGrouped;
  const Processor& cpu = processor();
  const int64_t image_bytes = p.pixels * pixel_bytes;
  // An L3 cache of 32 MB holds x, y, grad and dx of up to 8 MB each, and keeps them up to 5 MB.
  const bool small = p.images * image_bytes <= 5 << 20;
  p.narrow = is_narrow(p, element_size, small);

  int64_t cache, least, longest = most;
  if (p.channels_last) {
    // Tiles are runs of memory. A short one stays in the L1 cache with what is written; a longer
    // one changes less often between reading and writing. From timings on Zen 4.
    const bool near = image_bytes <= 7 << 19;
    const bool longer = (near && (image_bytes > 5 << 19 || element_size == 2)) ||
                        (pixel_bytes >= 512 && !p.tensors.dx);
    cache = grouped ? 64 << 10 : cpu.l1_bytes / ((near ? 2 : 4) * (longer ? 1 : 2));
    least = grouped ? unit : near && element_size == 2 ? 8 : 2;
  } else {
    // Contiguous tiles need long rows, since every row reads a page of its own, unless a tile is a
    // whole plane and so one run of memory.
    cache = !grouped ? 4 << 20 : image_bytes <= 1 << 20 ? 1 << 20 : 512 << 10;
    least = 4 * unit;
    if (!grouped && p.long_channels(element_size)) {
      // x and grad of a tile stay in a core's share of the caches; a core gets at least two tiles.
      cache = 2 << 20;
      longest = std::min(longest, std::max(16 * unit, p.images * p.pixels / (2 * cpu.cores)));
    }
  }
  int64_t tile = std::max(cache / pixel_bytes, least);
  if (tile > unit) tile = tile / unit * unit;
  tile = std::min(tile, grouped ? std::min<int64_t>(longest, 1024) : longest);

  // Even tiles; one that would be shorter than a vector joins the one before it.
  int64_t count = (p.pixels + tile - 1) / tile;
  tile = (p.pixels + count - 1) / count;
  if (tile > unit || !p.channels_last) tile = (tile + unit - 1) / unit * unit;
  count = p.pixels / tile;
  if (count == 0 || p.pixels - count * tile >= unit || (p.channels_last && p.pixels > count * tile))
    ++count;
  p.tile_pixels = tile;
  p.tiles_per_image = count;
  p.chunks = p.tiles() < 256 ? p.tiles() : 256;
}

}  // namespace ppcr
