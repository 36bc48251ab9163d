// Checks on tensors that arrive from Python. Every exported function validates its arguments here before it
// touches memory; a failed check becomes a Python ValueError that names the argument, what came and what is due.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>

namespace sv3d {

using tvm::ffi::TensorView;

constexpr int64_t ANY = -1;

template <typename T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr DLDataType value{kDLFloat, 32, 1};
  static constexpr const char* name = "float32";
};
template <>
struct dtype_of<int32_t> {
  static constexpr DLDataType value{kDLInt, 32, 1};
  static constexpr const char* name = "int32";
};
template <>
struct dtype_of<int64_t> {
  static constexpr DLDataType value{kDLInt, 64, 1};
  static constexpr const char* name = "int64";
};
template <>
struct dtype_of<uint8_t> {
  static constexpr DLDataType value{kDLUInt, 8, 1};
  static constexpr const char* name = "uint8";
};

[[noreturn]] inline void fail(const std::string& message) { TVM_FFI_THROW(ValueError) << message; }

/// Pointer to the data of `t` after checking device, dtype, contiguity and shape (ANY matches every extent).
template <typename T>
T* data(const TensorView& t, const char* name, std::initializer_list<int64_t> shape, DLDeviceType device = kDLCPU) {
  std::ostringstream why;
  if (t.device().device_type != device) {
    why << name << ": expected a tensor on " << (device == kDLCPU ? "the CPU" : "a CUDA device");
    fail(why.str());
  }
  const DLDataType d = t.dtype(), e = dtype_of<T>::value;
  if (d.code != e.code || d.bits != e.bits || d.lanes != e.lanes) {
    why << name << ": expected dtype " << dtype_of<T>::name;
    fail(why.str());
  }
  bool same = t.ndim() == static_cast<int>(shape.size());
  int i = 0;
  if (same)
    for (int64_t s : shape) same = same && (s == ANY || s == t.size(i)), ++i;
  if (!same) {
    why << name << ": expected shape (";
    for (int64_t s : shape) why << (s == ANY ? std::string("*") : std::to_string(s)) << ",";
    why << "), got (";
    for (int k = 0; k < t.ndim(); ++k) why << t.size(k) << ",";
    why << ")";
    fail(why.str());
  }
  if (!t.IsContiguous()) {
    why << name << ": expected a contiguous tensor";
    fail(why.str());
  }
  return static_cast<T*>(t.data_ptr());
}

}  // namespace sv3d
