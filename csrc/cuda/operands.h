// The tensors of one call, without their types: what the entry hands to the launcher. No CUDA, no
// torch.
#pragma once
#include "../ppcr_types.h"

namespace ppcr::cuda {

// weight or bias: absent, of the accumulation type, or of x's own type. A flag at run time instead
// of a template parameter: it is read once per block.
struct Parameter {
  enum Kind : int { kAbsent, kWide, kOwn };
  const void* data = nullptr;
  Kind kind = kAbsent;
};

struct Operands : TensorPointers {
  Parameter weight, bias;
  double eps = 0;
  void* partials = nullptr;  // [contexts + 1][plan.partial_count] of the accumulation type
  void* dweight = nullptr;   // of the type of weight
  void* dbias = nullptr;     // of the type of bias
};

}  // namespace ppcr::cuda
