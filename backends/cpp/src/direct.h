// The operators as plain functions of Python, for code that has checked its inputs long ago: what a compiled graph calls.
//
// The way through torch's dispatcher takes 4-8 us for each call from Python, which for the 150 calls of a decode step is a
// millisecond; these functions take one. Arguments are positional; tensors are plain CPU tensors.
#pragma once

#include <Python.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <c10/util/string_view.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace graphopt {
namespace {

// What a function's parameter is made from; alive while the function runs.
template <class T>
struct Argument;

template <>
struct Argument<const at::Tensor&> {
  const at::Tensor& value;
  explicit Argument(PyObject* object) : value(tensor(object)) {}
  static const at::Tensor& tensor(PyObject* object) {
    TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a Tensor, got ", Py_TYPE(object)->tp_name);
    return THPVariable_Unpack(object);
  }
};

template <>
struct Argument<const std::optional<at::Tensor>&> {
  std::optional<at::Tensor> value;
  explicit Argument(PyObject* object) {
    if (object != Py_None) value = Argument<const at::Tensor&>::tensor(object);
  }
};

template <class Value, class Element>
struct ListArgument {
  c10::SmallVector<Value, 8> value;
  explicit ListArgument(PyObject* object) {
    TORCH_CHECK_TYPE(PyList_Check(object), "expected a list, got ", Py_TYPE(object)->tp_name);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(object); ++i) value.emplace_back(Element(PyList_GET_ITEM(object, i)).value);
  }
};
template <>
struct Argument<at::TensorList> : ListArgument<at::Tensor, Argument<const at::Tensor&>> {
  using ListArgument::ListArgument;
};
template <>
struct Argument<at::ArrayRef<std::optional<at::Tensor>>> : ListArgument<std::optional<at::Tensor>, Argument<const std::optional<at::Tensor>&>> {
  using ListArgument::ListArgument;
};

// -1 with an error set is a failure of these conversions, and rare: the error is taken up after the call was refused.
struct Failed {};
template <>
struct Argument<double> {
  double value;
  explicit Argument(PyObject* object) : value(PyFloat_AsDouble(object)) {
    if (value == -1 && PyErr_Occurred()) throw Failed{};
  }
};
template <>
struct Argument<int64_t> {
  int64_t value;
  explicit Argument(PyObject* object) : value(PyLong_AsLongLong(object)) {
    if (value == -1 && PyErr_Occurred()) throw Failed{};
  }
};
template <>
struct Argument<bool> {
  bool value;
  explicit Argument(PyObject* object) : value(object == Py_True) {
    TORCH_CHECK_TYPE(PyBool_Check(object), "expected a bool, got ", Py_TYPE(object)->tp_name);
  }
};
template <>
struct Argument<c10::string_view> {
  c10::string_view value;
  explicit Argument(PyObject* object) {
    Py_ssize_t size;
    const char* text = PyUnicode_AsUTF8AndSize(object, &size);
    if (!text) throw Failed{};
    value = {text, size_t(size)};
  }
};
template <>
struct Argument<at::ScalarType> {
  at::ScalarType value;
  explicit Argument(PyObject* object) {
    TORCH_CHECK_TYPE(THPDtype_Check(object), "expected a torch.dtype, got ", Py_TYPE(object)->tp_name);
    value = reinterpret_cast<THPDtype*>(object)->scalar_type;
  }
};

struct Nothing {};
inline PyObject* as_python(Nothing) { return Py_NewRef(Py_None); }
inline PyObject* as_python(bool answer) { return PyBool_FromLong(answer); }
inline PyObject* as_python(at::Tensor tensor) { return THPVariable_Wrap(std::move(tensor)); }
inline PyObject* as_python(std::vector<at::Tensor> tensors) {
  PyObject* list = PyList_New(Py_ssize_t(tensors.size()));
  for (size_t i = 0; list && i < tensors.size(); ++i) PyList_SET_ITEM(list, i, as_python(std::move(tensors[i])));
  return list;
}

// Other threads run while a kernel does.
struct Unlocked {
  PyThreadState* state = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(state); }
};

inline PyObject* refused(PyObject* type, const c10::Error& error) {
  PyErr_SetString(type, error.what_without_backtrace());
  return nullptr;
}

// What `body` gives, or null with its error set as Python's.
template <class Body>
PyObject* answered(const Body& body) {
  try {
    return body();
  } catch (const Failed&) {
    return nullptr;
  } catch (const c10::IndexError& error) {
    return refused(PyExc_IndexError, error);
  } catch (const c10::TypeError& error) {
    return refused(PyExc_TypeError, error);
  } catch (const c10::Error& error) {
    return refused(PyExc_RuntimeError, error);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <class Result, class... Parameters, size_t... i>
PyObject* called(Result (*function)(Parameters...), PyObject* const* objects, std::index_sequence<i...>) {
  return answered([&] {
    std::tuple<Argument<Parameters>...> arguments(objects[i]...);
    auto result = [&] {
      const Unlocked unlocked;
      const at::AutoDispatchBelowADInplaceOrView plain;
      if constexpr (std::is_void_v<Result>)
        return function(std::get<i>(arguments).value...), Nothing{};
      else
        return function(std::get<i>(arguments).value...);
    }();
    return as_python(std::move(result));
  });
}

template <class Result, class... Parameters>
PyObject* call(Result (*function)(Parameters...), PyObject* const* objects, Py_ssize_t count) {
  if (count == sizeof...(Parameters)) return called(function, objects, std::index_sequence_for<Parameters...>{});
  PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(Parameters), count);
  return nullptr;
}

// `function` as a method of Python under this name.
template <auto function>
PyMethodDef direct(const char* name) {
  constexpr auto entry = +[](PyObject*, PyObject* const* objects, Py_ssize_t count) { return call(function, objects, count); };
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry)), METH_FASTCALL, nullptr};
}

}  // namespace
}  // namespace graphopt
