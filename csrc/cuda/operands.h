// The tensors of one call, without their types: what the entry hands to the launcher. No CUDA, no
// torch.
#pragma once

namespace ppcr::cuda {

// weight or bias: absent, of the accumulation type, or of x's own type. A flag at run time instead
// of a template parameter: it is read once per block.
struct Parameter {
  enum Kind : int { kAbsent, kWide, kOwn };
  const void* data = nullptr;
  Kind kind = kAbsent;
};

struct Operands {
  const void* x = nullptr;
  const void* grad = nullptr;      // backward; gate mode: one value per pixel
  const void* extra_in = nullptr;  // residual (forward) or y (backward) of the add_relu mode
  void* out = nullptr;             // y, or dx; gate mode, forward: one value per pixel
  void* extra_out = nullptr;       // dresidual
  Parameter weight, bias;
  double eps = 0;
  void* partials = nullptr;  // [contexts + 1][plan.partial_count] of the accumulation type
  void* dweight = nullptr;   // of the type of weight
  void* dbias = nullptr;     // of the type of bias
};

}  // namespace ppcr::cuda
