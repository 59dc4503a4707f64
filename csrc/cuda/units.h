// The units into which the contiguous kernels cut the channels: plain C++, on the host.
#pragma once
#include "workload.h"

namespace ppcr::cuda {

// Groups and blocks are powers of two, and so are the units of one of four segments.
inline EqualUnits equal_units(const Pooling& pooling, int unit_count) {
  const int per_segment = unit_count / pooling.segments;
  return {static_cast<int>(pooling.edge[1] / per_segment), __builtin_ctz(unsigned(per_segment))};
}

// At least one unit per segment; the longest units are cut until there are `wanted`.
inline TableUnits table_units(const Pooling& pooling, int wanted) {
  int per_segment[kMaxSegments];
  for (int k = 0; k < pooling.segments; ++k) per_segment[k] = 1;
  for (int count = pooling.segments; count < wanted; ++count) {
    int longest = 0;
    double length = 1;
    for (int k = 0; k < pooling.segments; ++k) {
      const double unit = double(pooling.edge[k + 1] - pooling.edge[k]) / per_segment[k];
      if (unit > length) {
        length = unit;
        longest = k;
      }
    }
    if (length < 2) break;  // of single channels nothing can be cut off
    ++per_segment[longest];
  }
  TableUnits units{};
  int unit = 0;
  for (int k = 0; k < pooling.segments; ++k) {
    units.first_of[k] = static_cast<uint16_t>(unit);
    const int64_t length = pooling.edge[k + 1] - pooling.edge[k];
    for (int i = 0; i < per_segment[k]; ++i, ++unit) {
      units.edge[unit] = static_cast<int>(pooling.edge[k] + length / per_segment[k] * i +
                                          std::min<int64_t>(i, length % per_segment[k]));
      units.segment_of[unit] = static_cast<uint8_t>(k);
    }
  }
  units.first_of[pooling.segments] = static_cast<uint16_t>(unit);
  for (; unit <= kMaxUnits; ++unit)
    units.edge[unit] = static_cast<int>(pooling.edge[pooling.segments]);
  return units;
}

template <class Bins>
UnitsOf<Bins> units_of(const Pooling& pooling, int unit_count) {
  if constexpr (Bins::kStandard)
    return equal_units(pooling, unit_count);
  else
    return table_units(pooling, unit_count);
}

}  // namespace ppcr::cuda
