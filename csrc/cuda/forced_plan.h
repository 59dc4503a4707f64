// What PPCR_PLAN asks for, in plain C++.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <sstream>
#include <string>
#include <utility>

namespace ppcr::cuda {

constexpr int64_t kMaxBlocks = 0x7fffffff;

// PPCR_PLAN, for tuning, such as "q=128,groups=4,cluster=2": what it names is taken as it says, and
// other plans are not considered.
struct Forced {
  int q = 0, groups = 0, cluster = 0, clusters = 0, vector = 0, steps = 0, warps = 0, variant = -1;
  std::string error;

  explicit Forced(const std::string& text) {
    std::istringstream items(text);
    for (std::string item; std::getline(items, item, ',') && error.empty();) {
      const size_t equals = item.find('=');
      int* const field = field_of(item.substr(0, equals));
      char* end = nullptr;
      const long value =
          equals == std::string::npos ? -1 : std::strtol(item.c_str() + equals + 1, &end, 10);
      if (field == nullptr || end == nullptr || *end != 0 || value < 0 || value > kMaxBlocks)
        error = "PPCR_PLAN: '" + item +
                "' is not one of q=, groups=, cluster=, clusters=, vector=, steps=, warps=, "
                "variant= with a number";
      else
        *field = static_cast<int>(value);
    }
  }

 private:
  int* field_of(const std::string& name) {
    const std::pair<const char*, int*> fields[] = {
        {"q", &q},           {"groups", &groups}, {"cluster", &cluster}, {"clusters", &clusters},
        {"vector", &vector}, {"steps", &steps},   {"warps", &warps},     {"variant", &variant}};
    for (const auto& [known, field] : fields)
      if (name == known) return field;
    return nullptr;
  }
};

}  // namespace ppcr::cuda
