// Room for one more step in many growing caches at once: the commonest case of graphopt/runtime/kv.py, all of whose rules
// hold here too. What is any other case is left to Python.
#pragma once

#include "direct.h"

namespace graphopt {
namespace {

// What is known of a buffer [capacity, *rest]: `Buffer` of graphopt/runtime/kv.py, an attribute of the buffer tensor.
struct Buffer {
  int64_t dim, row, capacity, used, version;
};

// A longer view of the memory of `past`, if that is the last rows handed out of its buffer, unchanged, and more fit.
at::Tensor longer(const at::Tensor& past, const at::Tensor& base, Buffer& buffer, int64_t count, int64_t dim) {
  if (dim != buffer.dim || past.dim() != base.dim() || past.dtype() != base.dtype() || past.storage_offset() % buffer.row) return {};
  at::DimVector size(past.sizes()), stride(past.strides());
  for (int64_t d = 0; d < past.dim(); ++d) {
    const int64_t kept = d == dim ? 0 : d < dim ? d + 1 : d;  // the dimension of the buffer
    if (stride[d] != base.stride(kept) || (d != dim && size[d] != base.size(kept))) return {};
  }
  const int64_t end = past.storage_offset() / buffer.row + size[dim];
  if (end != buffer.used || end + count > buffer.capacity || past._version() != buffer.version) return {};
  size[dim] += count;
  at::Tensor view = base.as_strided(size, stride, past.storage_offset());
  buffer.used = end + count;
  return view;
}

// The view for one call (past, count, dim and, perhaps, a capacity) as a new reference; None for what Python has to do; null
// with an error set.
PyObject* reserved(PyObject* call) {
  PyObject* tensor = nullptr;
  PyObject* capacity = Py_None;
  Py_ssize_t count, dim;
  if (!PyArg_ParseTuple(call, "Onn|O", &tensor, &count, &dim, &capacity)) return nullptr;
  const Py_ssize_t most = capacity == Py_None ? PY_SSIZE_T_MAX : PyLong_AsSsize_t(capacity);
  if (most == -1 && PyErr_Occurred()) return nullptr;
  if (!THPVariable_CheckExact(tensor)) Py_RETURN_NONE;
  const at::Tensor& past = THPVariable_Unpack(tensor);
  if (past.layout() != at::kStrided || past.is_inference() || !past.is_view() || dim < 0 || dim >= past.dim()) Py_RETURN_NONE;
  if (past.size(dim) + count > most) Py_RETURN_NONE;
  const at::Tensor base(past._base());
  PyObject* owner = THPVariable_Wrap(base);
  if (!owner) return nullptr;
  PyObject* known = PyObject_GetAttrString(owner, "_graphopt_kv");
  Py_DECREF(owner);
  if (!known) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  Py_buffer memory;
  const int failed = PyObject_GetBuffer(known, &memory, PyBUF_WRITABLE);
  Py_DECREF(known);  // the buffer tensor holds it
  if (failed) return nullptr;
  PyObject* result = answered([&] {
    TORCH_CHECK(memory.len == sizeof(Buffer), "reserve: ", sizeof(Buffer), " bytes of a buffer expected, got ", memory.len);
    at::Tensor view = longer(past, base, *static_cast<Buffer*>(memory.buf), count, dim);
    return view.defined() ? as_python(std::move(view)) : Py_NewRef(Py_None);
  });
  PyBuffer_Release(&memory);
  return result;
}

// calls: a list of such tuples. The list of views, None where Python has to do it.
PyObject* reserve(PyObject*, PyObject* calls) {
  if (!PyList_Check(calls)) return PyErr_Format(PyExc_TypeError, "reserve: expected a list, got %s", Py_TYPE(calls)->tp_name);
  const Py_ssize_t count = PyList_GET_SIZE(calls);
  PyObject* views = PyList_New(count);
  for (Py_ssize_t i = 0; views && i < count; ++i) {
    PyObject* view = reserved(PyList_GET_ITEM(calls, i));
    if (!view) Py_CLEAR(views);
    else PyList_SET_ITEM(views, i, view);
  }
  return views;
}

}  // namespace
}  // namespace graphopt
