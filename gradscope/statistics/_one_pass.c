/* What gradscope.statistics.one_pass calls. Optional: it falls back on torch's own operations where this
 * was not built. Every function takes the address of contiguous memory as an integer and reads it only; the
 * caller keeps the tensor alive.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_kernels.h"
#include "_view.h"

static int addresses(PyObject *const *args, Py_ssize_t given, Py_ssize_t count, size_t *numbers) {
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "%zd arguments are taken, %zd were given", count, given);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        numbers[i] = PyLong_AsSize_t(args[i]);
        if (numbers[i] == (size_t)-1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

/* Runs CALL for the dtype, float32 or (half) bfloat16, without the lock where that takes long. */
#define RUN(HALF, SIZE, F32, BF16)                       \
    do {                                                 \
        PyThreadState *state = NULL;                     \
        if ((SIZE) >= RELEASE) state = PyEval_SaveThread(); \
        if (HALF) {                                      \
            BF16;                                        \
        } else {                                         \
            F32;                                         \
        }                                                \
        if (state) PyEval_RestoreThread(state);          \
    } while (0)

PyDoc_STRVAR(moments_doc, "moments(address, half, n) -> (sum, squares, absmax, zeros, nonfinite)");

static PyObject *moments(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    size_t a[3];
    Moments m;
    if (addresses(args, given, 3, a)) return NULL;
    RUN(a[1], a[2], moments_f32((const float *)a[0], a[2], &m), moments_bf16((const bf16 *)a[0], a[2], &m));
    return Py_BuildValue("(dddLL)", m.sum, m.squares, (double)m.absmax, (long long)m.zeros,
                         (long long)m.nonfinite);
}

PyDoc_STRVAR(squares_doc, "squares(address, half, n) -> sum of squares");

static PyObject *squares(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    size_t a[3];
    double found;
    if (addresses(args, given, 3, a)) return NULL;
    RUN(a[1], a[2], found = squares_f32((const float *)a[0], a[2]),
        found = squares_bf16((const bf16 *)a[0], a[2]));
    return PyFloat_FromDouble(found);
}

PyDoc_STRVAR(pair_doc, "pair(address, address, half, n) -> (<x, y>, |x - y|^2)");

static PyObject *pair(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    size_t a[4];
    Pair p;
    if (addresses(args, given, 4, a)) return NULL;
    RUN(a[2], a[3], pair_f32((const float *)a[0], (const float *)a[1], a[3], &p),
        pair_bf16((const bf16 *)a[0], (const bf16 *)a[1], a[3], &p));
    return Py_BuildValue("(dd)", p.dot, p.difference);
}

PyDoc_STRVAR(rows_doc,
             "rows(address, input or 0, half, sequences, tokens, d, rows between sequences, rows between "
             "tokens) -> (fourth powers, squares about each row's mean, sum over sequences of |sum of "
             "directions|^2, squares about each sequence's mean token, sum of cosines with the input, zero "
             "rows, zero rows of the input)");

static PyObject *rows(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    size_t a[8];
    Rows r;
    if (addresses(args, given, 8, a)) return NULL;
    /* On a cache line of its own: a store across two lines costs twice. */
    void *memory = malloc(2 * a[5] * sizeof(double) + LINE);
    if (!memory) return PyErr_NoMemory();
    double *scratch = (double *)(((uintptr_t)memory + LINE - 1) / LINE * LINE);
    RUN(a[2], a[3] * a[4] * a[5],
        rows_f32((const float *)a[0], (const float *)a[1], a[3], a[4], a[5], a[6], a[7], scratch, &r),
        rows_bf16((const bf16 *)a[0], (const bf16 *)a[1], a[3], a[4], a[5], a[6], a[7], scratch, &r));
    free(memory);
    return Py_BuildValue("(dddddLL)", r.fourth, r.within, r.direction, r.centred, r.input,
                         (long long)r.zero, (long long)r.zero_input);
}

PyDoc_STRVAR(together_doc,
             "together(address, half, outer, samples, inner) -> sum of (sum_b x[outer, b, inner])^2");

static PyObject *together(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    size_t a[5];
    double found;
    if (addresses(args, given, 5, a)) return NULL;
    RUN(a[1], a[2] * a[3] * a[4], found = together_f32((const float *)a[0], a[2], a[3], a[4]),
        found = together_bf16((const bf16 *)a[0], a[2], a[3], a[4]));
    return PyFloat_FromDouble(found);
}

PyDoc_STRVAR(pair_rows_doc,
             "pair_rows(address of h, address of h' or F, half, rows, d, branch) -> sums over rows of cos(h, "
             "h'), their angle, |F|/|h|, cos(F, h), and how many rows of h, h' or F, and F are zero");

static PyObject *pair_rows(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    size_t a[6];
    PairRows p;
    if (addresses(args, given, 6, a)) return NULL;
    RUN(a[2], a[3] * a[4],
        pair_rows_f32((const float *)a[0], (const float *)a[1], a[3], a[4], (int)a[5], &p),
        pair_rows_bf16((const bf16 *)a[0], (const bf16 *)a[1], a[3], a[4], (int)a[5], &p));
    return Py_BuildValue("(ddddLLL)", p.cosine, p.angle, p.ratio, p.change_cosine, (long long)p.zero,
                         (long long)p.zero_next, (long long)p.zero_change);
}

/* What a list of tensors asks of each: dense memory of one of the types, of not more elements. */
typedef struct {
    PyObject *types;
    Exchange *exchange;
    size_t most;
} Taken;

static int taken_of(PyObject *types, PyObject *capsule, PyObject *most, Taken *taken) {
    taken->types = types;
    if (!PyTuple_Check(types)) {
        PyErr_SetString(PyExc_TypeError, "types must be a tuple");
        return -1;
    }
    if (!(taken->exchange = exchange_of(capsule))) return -1;
    taken->most = PyLong_AsSize_t(most);
    return PyErr_Occurred() ? -1 : 0;
}

static int take(const Taken *taken, PyObject *tensor, View *view) {
    for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(taken->types); k++)
        if ((PyObject *)Py_TYPE(tensor) == PyTuple_GET_ITEM(taken->types, k)) {
            int found = view_of(taken->exchange, tensor, view);
            return found > 0 ? view->n <= taken->most : found;
        }
    return 0;
}

PyDoc_STRVAR(norms_doc,
             "norms(tensors, types, exchange, most) -> list of Frobenius norms; None for each that is not taken: "
             "of another type, not dense float32 or bfloat16 on a CPU, or of more elements");

static PyObject *norms(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Taken taken;
    if (given != 4 || !PyList_Check(args[0]))
        return PyErr_Format(PyExc_TypeError, "norms(list, types, exchange, most)");
    if (taken_of(args[1], args[2], args[3], &taken)) return NULL;
    PyObject *found = PyList_New(PyList_GET_SIZE(args[0]));
    for (Py_ssize_t i = 0; found && i < PyList_GET_SIZE(found); i++) {
        View view;
        double squares = 0;
        int fits = take(&taken, PyList_GET_ITEM(args[0], i), &view);
        if (fits > 0)
            RUN(view.half, view.n, squares = squares_f32(view.data, view.n),
                squares = squares_bf16(view.data, view.n));
        PyObject *norm = fits > 0 ? PyFloat_FromDouble(sqrt(squares)) : fits ? NULL : Py_NewRef(Py_None);
        if (norm)
            PyList_SET_ITEM(found, i, norm);
        else
            Py_CLEAR(found);
    }
    return found;
}

PyDoc_STRVAR(distances_doc,
             "distances(tensors, others, types, exchange, most) -> list of |x - y|; None for each pair that is "
             "not taken, as in norms, or not of one dtype and number of elements");

static PyObject *distances(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Taken taken;
    if (given != 5 || !PyList_Check(args[0]) || !PyList_Check(args[1]) ||
        PyList_GET_SIZE(args[0]) != PyList_GET_SIZE(args[1]))
        return PyErr_Format(PyExc_TypeError, "distances(list, list, types, exchange, most)");
    if (taken_of(args[2], args[3], args[4], &taken)) return NULL;
    PyObject *found = PyList_New(PyList_GET_SIZE(args[0]));
    for (Py_ssize_t i = 0; found && i < PyList_GET_SIZE(found); i++) {
        View x, y;
        Pair pair = {0, 0};
        int fits = take(&taken, PyList_GET_ITEM(args[0], i), &x);
        if (fits > 0) fits = take(&taken, PyList_GET_ITEM(args[1], i), &y);
        if (fits > 0) fits = x.n == y.n && x.half == y.half;
        if (fits > 0) RUN(x.half, x.n, pair_f32(x.data, y.data, x.n, &pair), pair_bf16(x.data, y.data, x.n, &pair));
        PyObject *distance =
            fits > 0 ? PyFloat_FromDouble(sqrt(pair.difference)) : fits ? NULL : Py_NewRef(Py_None);
        if (distance)
            PyList_SET_ITEM(found, i, distance);
        else
            Py_CLEAR(found);
    }
    return found;
}

#define FAST(NAME) {#NAME, (PyCFunction)(void (*)(void))NAME, METH_FASTCALL, NAME##_doc}

static PyMethodDef methods[] = {FAST(moments), FAST(squares),  FAST(pair),         FAST(rows),
                                FAST(together), FAST(pair_rows), FAST(norms), FAST(distances), {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_one_pass", "One pass over a tensor for all of its statistics.", -1, methods,
    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__one_pass(void) { return prepare_views() ? NULL : PyModule_Create(&module); }
