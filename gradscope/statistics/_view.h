/* What a tensor is, from torch itself, in one call: its exchange API of DLPack 1.2. */

typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct Exchange {
    uint32_t major, minor;
    struct Exchange *previous;
    void *allocate, *managed_from, *managed_to;
    int (*look)(void *tensor, DLTensor *out);
    void *stream;
} Exchange;

enum { DL_CPU = 1, DL_FLOAT = 2, DL_BFLOAT = 4 };

/* Memory of a storage that was emptied lies at its offset from 0. */
#define LEAST_ADDRESS ((uintptr_t)1 << 32)
/* From so many elements on torch's operations are faster where they may use several threads. */
#define MANY ((size_t)1 << 22)

typedef struct {
    const void *data;
    int half, ndim;
    size_t n, features; /* of one position: the last axis, or all of a vector */
    const int64_t *shape;
} View;

static PyObject *s_is_neg;

static int prepare_views(void) { return (s_is_neg = PyUnicode_InternFromString("is_neg")) ? 0 : -1; }

/* The API in torch's capsule; NULL with an error. */
static Exchange *exchange_of(PyObject *capsule) {
    Exchange *found = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (found && (found->major != 1 || !found->look)) {
        PyErr_SetString(PyExc_TypeError, "another version of DLPack");
        return NULL;
    }
    return found;
}

/* 1 where the tensor is what the kernels take, 0 where not, -1 with an error. Its type is the caller's to
 * look at: a subclass need not be what it looks like. */
static int view_of(Exchange *exchange, PyObject *tensor, View *view) {
    DLTensor found;
    PyObject *negative = PyObject_CallMethodNoArgs(tensor, s_is_neg);
    if (!negative) return -1;
    Py_DECREF(negative);
    if (negative != Py_False) return 0;
    if (exchange->look(tensor, &found)) { /* no memory of its own, as a sparse tensor */
        PyErr_Clear();
        return 0;
    }
    int half = found.code == DL_BFLOAT && found.bits == 16;
    if (!half && !(found.code == DL_FLOAT && found.bits == 32)) return 0;
    if (found.device_type != DL_CPU || found.lanes != 1) return 0;
    int64_t n = 1;
    for (int axis = found.ndim - 1; axis >= 0; axis--) {
        if (found.shape[axis] != 1 && found.strides[axis] != n) return 0;
        n *= found.shape[axis];
    }
    uintptr_t data = (uintptr_t)found.data + found.byte_offset;
    if (n < 1 || data < LEAST_ADDRESS) return 0;
    view->data = (const void *)data;
    view->half = half;
    view->ndim = found.ndim;
    view->shape = found.shape;
    view->n = (size_t)n;
    view->features = (size_t)(found.ndim > 1 ? found.shape[found.ndim - 1] : n);
    return 1;
}
