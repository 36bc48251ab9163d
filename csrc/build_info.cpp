// What this library was built with, for `sv3d-fast info`.
#include <tvm/ffi/tvm_ffi.h>

#include <string>

namespace {

tvm::ffi::String build_info() {
#ifdef _OPENMP
  const std::string openmp = "OpenMP " + std::to_string(_OPENMP);
#else
  const std::string openmp = "no OpenMP";
#endif
  return "compiler " __VERSION__ ", " + openmp;
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(build_info, build_info);
