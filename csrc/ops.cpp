// The module manpp_kernels._C: importing it loads this library, whose static initialisers register the operators with
// PyTorch's dispatcher. (Schemas are defined in manpp_kernels/ops; implementations register beside their kernels.)
#include <Python.h>

#ifndef MANPP_CUDA_ARCHITECTURES
#define MANPP_CUDA_ARCHITECTURES "" // built without CUDA
#endif

static PyObject* cuda_architectures(PyObject*, PyObject*) {
  return PyUnicode_FromString(MANPP_CUDA_ARCHITECTURES);
}

static PyMethodDef methods[] = {
    {"cuda_architectures",
     cuda_architectures,
     METH_NOARGS,
     "The CUDA architectures this library was compiled for, joined by commas; empty if it was built without CUDA."},
    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", "The compiled operators of manpp_kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
