// What PPCR_PLAN asks for. Plain C++.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <string>

namespace ppcr::cuda {

constexpr int64_t kMaxBlocks = 0x7fffffff;

// PPCR_PLAN, for tuning:
// "q=128,groups=4,cluster=2,clusters=264,vector=4,steps=8,variant=3,warps=4". What it names is
// taken as it says; plans that differ are not considered.
struct Forced {
  int q = 0, groups = 0, cluster = 0, clusters = 0, vector = 0, steps = 0, warps = 0, variant = -1;
  std::string error;
};

inline Forced parse_forced(std::string rest) {
  Forced forced;
  while (!rest.empty()) {
    const size_t comma = rest.find(',');
    const std::string item = rest.substr(0, comma);
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
    const size_t equals = item.find('=');
    const std::string name = item.substr(0, equals);
    int* const field = name == "q"          ? &forced.q
                       : name == "groups"   ? &forced.groups
                       : name == "cluster"  ? &forced.cluster
                       : name == "clusters" ? &forced.clusters
                       : name == "vector"   ? &forced.vector
                       : name == "steps"    ? &forced.steps
                       : name == "warps"    ? &forced.warps
                       : name == "variant"  ? &forced.variant
                                            : nullptr;
    char* end = nullptr;
    const long value =
        equals == std::string::npos ? -1 : std::strtol(item.c_str() + equals + 1, &end, 10);
    if (field == nullptr || end == nullptr || *end != 0 || value < 0 || value > kMaxBlocks) {
      forced.error = "PPCR_PLAN: '" + item +
                     "' is not one of q=, groups=, cluster=, clusters=, vector=, steps=, warps=, "
                     "variant= with a number";
      return forced;
    }
    *field = static_cast<int>(value);
  }
  return forced;
}

}  // namespace ppcr::cuda
