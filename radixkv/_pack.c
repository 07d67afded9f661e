/* Token ids out of a list or tuple of Python integers, as int32 bytes.

   The one thing the core does to every token of a list[int] prompt, and so the one thing written in C: 5 to 8 ns a
   token where struct.pack takes 20 to 40. Anything unusual makes it answer None, and tokens.py finds out what is wrong. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

static PyObject *pack(PyObject *module, PyObject *ids) {
    PyObject **items;
    Py_ssize_t count;
    if (PyList_CheckExact(ids)) {
        items = ((PyListObject *)ids)->ob_item;
        count = PyList_GET_SIZE(ids);
    } else if (PyTuple_CheckExact(ids)) {
        items = ((PyTupleObject *)ids)->ob_item;
        count = PyTuple_GET_SIZE(ids);
    } else {
        Py_RETURN_NONE;
    }
    if (count > PY_SSIZE_T_MAX / (Py_ssize_t)sizeof(int32_t)) {
        Py_RETURN_NONE;
    }
    PyObject *packed = PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(int32_t));
    if (packed == NULL) {
        return NULL;
    }
    int32_t *out = (int32_t *)PyBytes_AS_STRING(packed);
    for (Py_ssize_t index = 0; index < count; index++) {
        int overflow = 0;
        long value = PyLong_Check(items[index]) ? PyLong_AsLongAndOverflow(items[index], &overflow) : -1;
        if (overflow != 0 || value < 0 || value > INT32_MAX) {
            Py_DECREF(packed);
            Py_RETURN_NONE;
        }
        out[index] = (int32_t)value;
    }
    return packed;
}

static PyMethodDef methods[] = {
    {"pack", pack, METH_O, "int32 bytes of a list or tuple of token ids; None if any of them cannot be one."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_pack", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__pack(void) { return PyModule_Create(&definition); }
