// Element types that the Python side passes by name.

#pragma once

namespace vi_simsiam {

enum class DType { float32, float64, bfloat16, float16 };

}  // namespace vi_simsiam
