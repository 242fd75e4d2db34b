// Products and attention in bf16, for the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace veneer {

void add_16_bits(nanobind::module_& m);

}  // namespace veneer
