// The variants that this machine runs. Not for the variants.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace veneer {

std::vector<std::string> variants();  // the fastest last

// Raises std::invalid_argument where this machine has none of the name.
const Variant& variant(const std::string& name);

}  // namespace veneer
