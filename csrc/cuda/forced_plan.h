// What PPCR_PLAN asks for, in plain C++.
#pragma once
#include <charconv>
#include <map>
#include <sstream>
#include <string>

namespace ppcr::cuda {

// PPCR_PLAN, for tuning, such as "q=128,groups=4,cluster=2": what it names is taken as it says, and
// other plans are not considered.
struct Forced {
  int q = 0, groups = 0, cluster = 0, clusters = 0, vector = 0, steps = 0, warps = 0, variant = -1;
  std::string error;

  explicit Forced(const std::string& text) {
    const std::map<std::string, int*> fields{{"q=", &q},
                                             {"groups=", &groups},
                                             {"cluster=", &cluster},
                                             {"clusters=", &clusters},
                                             {"vector=", &vector},
                                             {"steps=", &steps},
                                             {"warps=", &warps},
                                             {"variant=", &variant}};
    std::istringstream items(text);
    for (std::string item; std::getline(items, item, ',') && error.empty();) {
      const std::string name = item.substr(0, item.find('=') + 1);
      const auto field = fields.find(name);
      const char* const end = item.data() + item.size();
      int value = -1;
      const auto [rest, wrong] = std::from_chars(item.data() + name.size(), end, value);
      if (field == fields.end() || wrong != std::errc() || rest != end || value < 0)
        error = "PPCR_PLAN: '" + item +
                "' is not one of q=, groups=, cluster=, clusters=, vector=, steps=, warps=, "
                "variant= with a number";
      else
        *field->second = value;
    }
  }
};

}  // namespace ppcr::cuda
