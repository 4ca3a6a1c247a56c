/* The quick way of the hooks, for what nearly every hook of training on a CPU sees: one dense tensor of
 * finite numbers in an ordinary step. Optional; `gradscope.collect.sampling` says what happens, and does it
 * wherever this declines. A call declines (returns False) before it has changed anything.
 *
 * What a hook costs is less what it computes than what it touches: between two hooks the layers have thrown
 * everything out of the caches, and each line of an interpreted function comes from memory again.
 *
 * Passes, calls and slots are the objects of `gradscope.collect.passes`; their slots are written at the
 * offsets that the class's own descriptors give.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "../statistics/_kernels.h"
#include "../statistics/_view.h"

/* -- names ----------------------------------------------------------------------------------------- */

#define NAMES(X)                                                                                          \
    X(requires_grad) X(is_leaf) X(_backward_hooks) X(grad_fn) X(_register_hook_dict) X(_base) X(_version) \
    X(detach) X(shape) X(numel) X(dtype) X(data)

#define DECLARE(NAME) static PyObject *s_##NAME;
NAMES(DECLARE)

/* -- objects whose slots are written --------------------------------------------------------------- */

enum { SLOT, CALL, TRUNK, PASS, PROBE, KINDS };

#define FIELDS(X)                                                                                        \
    X(SLOT, site) X(SLOT, values) X(SLOT, absent) X(SLOT, gradient) X(SLOT, gradient_absent)             \
    X(SLOT, backward) X(SLOT, stream) X(SLOT, successor) X(SLOT, trunk) X(SLOT, owner) X(SLOT, arrival) X(SLOT, writes) \
    X(CALL, site) X(CALL, index) X(CALL, slots) X(CALL, block_call) X(CALL, unit_skip)                   \
    X(TRUNK, calls) X(TRUNK, reading) X(TRUNK, held_activation) X(TRUNK, held_gradient)                  \
    X(PASS, calls) X(PASS, counts) X(PASS, trunks) X(PASS, aliases) X(PASS, begun) X(PASS, valid)        \
    X(PASS, closed) X(PASS, views)                                                                                      \
    X(PROBE, _recorder) X(PROBE, site) X(PROBE, slot) X(PROBE, shape)

#define FIELD(KIND, NAME) KIND##_##NAME,
enum { FIELDS(FIELD) FIELD_COUNT };

typedef struct {
    int quick, block, linear;
    Py_ssize_t parent;   /* the site of a branch's block, -1 without one */
    PyObject *trunk;     /* its name, of a block */
    PyObject *absent;    /* column -> why, as a step without slow statistics has it */
} Site;

typedef struct {
    PyObject_HEAD
    PyObject *recorder, *arrivals, *proofs, *recomputed, *dtypes, *on_autocast, *last, *array;
    PyObject *tensor_type, *ordered;
    PyObject *template[KINDS];          /* an instance of each, with the values of its class's defaults */
    PyObject *grad_enabled, *task, *modes, *function_modes, *interpreter, *tracing, *autocast, *symbolic, *symbolic_name;
    PyObject *gradient_absent[2];       /* outside of the stream, on it */
    PyObject *activation_pair[2], *gradient_pair[2];
    PyObject *empty[2];                 /* no elements, float32 and bfloat16 */
    Py_ssize_t activation_columns, gradient_columns;
    Py_ssize_t offset[FIELD_COUNT];
    Site *sites;
    Py_ssize_t site_count;
    PyObject *pass;
    unsigned long thread;
    int slow, dtypes_seen;
    Exchange *exchange;
} Quick;

/* The slot of an object, borrowed. */
#define AT(q, object, field) (*(PyObject **)((char *)(object) + (q)->offset[field]))

static void put(Quick *q, PyObject *object, int field, PyObject *stolen) {
    PyObject **at = &AT(q, object, field), *old = *at;
    *at = stolen;
    Py_XDECREF(old);
}

static PyObject *new_reference(PyObject *object) {
    Py_INCREF(object);
    return object;
}

/* A new object with the slots of the template of this kind. */
static PyObject *made(Quick *q, int kind) {
    PyObject *from = q->template[kind];
    PyTypeObject *type = Py_TYPE(from);
    PyObject *object = type->tp_alloc(type, 0);
    if (!object) return NULL;
    for (Py_ssize_t at = sizeof(PyObject); at < type->tp_basicsize; at += sizeof(PyObject *)) {
        if (at == type->tp_weaklistoffset) continue;
        PyObject *value = *(PyObject **)((char *)from + at);
        Py_XINCREF(value);
        *(PyObject **)((char *)object + at) = value;
    }
    return object;
}

/* -- looking at tensors ---------------------------------------------------------------------------- */

/* Whether an attribute is true: 1, 0, or -1 with an error. */
static int truth(PyObject *object, PyObject *name) {
    PyObject *value = PyObject_GetAttr(object, name);
    if (!value) return -1;
    int found = PyObject_IsTrue(value);
    Py_DECREF(value);
    return found;
}

static int calls_true(PyObject *function) {
    PyObject *value = PyObject_CallNoArgs(function);
    if (!value) return -1;
    int found = PyObject_IsTrue(value);
    Py_DECREF(value);
    return found;
}

/* 1 where the tensor is what the quick way takes, 0 where not, -1 with an error. */
static int look(Quick *q, PyObject *tensor, View *view) {
    if (Py_TYPE(tensor) != (PyTypeObject *)q->tensor_type) return 0;
    int taken = view_of(q->exchange, tensor, view);
    return taken > 0 ? view->ndim > 0 && view->n > 1 && view->n <= MANY : taken;
}

static int same_shape(const View *a, const View *b) {
    if (a->ndim != b->ndim || a->half != b->half) return 0;
    return memcmp(a->shape, b->shape, (size_t)a->ndim * sizeof *a->shape) == 0;
}

static int has_shape(const View *view, PyObject *shape) {
    if (!PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) != view->ndim) return 0;
    for (int axis = 0; axis < view->ndim; axis++)
        if (PyLong_AsLongLong(PyTuple_GET_ITEM(shape, axis)) != view->shape[axis]) return 0;
    return 1;
}

/* Looks at the gradient of a view's base as one of the view: of this shape, with as many elements. */
static int take_shape(View *view, PyObject *shape) {
    Py_ssize_t axes = PyTuple_Check(shape) ? PyTuple_GET_SIZE(shape) : 0;
    size_t n = 1, last = 1;
    for (Py_ssize_t axis = 0; axis < axes; axis++) {
        last = PyLong_AsSize_t(PyTuple_GET_ITEM(shape, axis));
        n *= last;
    }
    if (axes < 1 || n != view->n) return 0;
    view->features = axes > 1 ? last : n;
    return 1;
}

/* -- statistics ------------------------------------------------------------------------------------ */

/* l2, count, tokens, mean, variance, absmax, zeros, nonfinite: the first columns of the table. */
enum { MOMENTS = 8 };

/* 1 with the values, 0 where an element is not finite or the variance needs a second look. */
static int measure(const View *view, double *values) {
    Moments m;
    PyThreadState *state = view->n >= RELEASE ? PyEval_SaveThread() : NULL;
    if (view->half)
        moments_bf16(view->data, view->n, &m);
    else
        moments_f32(view->data, view->n, &m);
    if (state) PyEval_RestoreThread(state);
    if (!isfinite(m.absmax)) return 0;
    double n = (double)view->n, mean = m.sum / n, spread = m.squares / n - mean * mean;
    if (spread < CANCELLATION * (m.squares / n)) return 0;
    values[0] = sqrt(m.squares);
    values[1] = n;
    values[2] = n / (double)view->features;
    values[3] = mean;
    values[4] = spread * n / (n - 1);
    values[5] = (double)m.absmax;
    values[6] = (double)m.zeros;
    values[7] = 0.0;
    return 1;
}

static void relate(const View *a, const View *b, double *product, double *distance) {
    Pair pair;
    PyThreadState *state = a->n >= RELEASE ? PyEval_SaveThread() : NULL;
    if (a->half)
        pair_bf16(a->data, b->data, a->n, &pair);
    else
        pair_f32(a->data, b->data, a->n, &pair);
    if (state) PyEval_RestoreThread(state);
    *product = pair.dot;
    *distance = sqrt(pair.difference);
}

/* The moments and NaN in all other columns, as array("d"). */
static PyObject *row(Quick *q, const double *moments, Py_ssize_t columns) {
    double values[64];
    if (columns > 64) return PyErr_Format(PyExc_SystemError, "too many columns");
    for (Py_ssize_t i = 0; i < columns; i++) values[i] = i < MOMENTS ? moments[i] : NAN;
    return PyObject_CallFunction(q->array, "sy#", "d", (const char *)values,
                                 (Py_ssize_t)(columns * sizeof *values));
}

static int set_pair(PyObject *values, PyObject *const *columns, double product, double distance) {
    double both[2] = {product, distance};
    for (int i = 0; i < 2; i++) {
        PyObject *value = PyFloat_FromDouble(both[i]);
        if (!value) return -1;
        int failed = PyObject_SetItem(values, columns[i], value);
        Py_DECREF(value);
        if (failed) return -1;
    }
    return 0;
}

/* -- the stream ------------------------------------------------------------------------------------ */

/* 1 with the version of a tensor, 0 where it counts no writes (made under inference_mode), -1 with an error. */
static int version_of(PyObject *tensor, PyObject **version) {
    *version = PyObject_GetAttr(tensor, s__version);
    if (*version) return 1;
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) return -1;
    PyErr_Clear();
    return 0;
}

/* What is held of the position before, (tensor, version, slot): 1 where it is as it was and of this shape,
 * 0 where it is not, -1 with an error. */
static int as_held(Quick *q, PyObject *held, const View *view, View *before) {
    if (!PyTuple_CheckExact(held) || PyTuple_GET_SIZE(held) != 3) return 0;
    PyObject *tensor = PyTuple_GET_ITEM(held, 0);
    int taken = look(q, tensor, before);
    if (taken <= 0) return taken;
    if (!same_shape(before, view)) return 0;
    PyObject *version = NULL;
    int counted = version_of(tensor, &version);
    if (counted <= 0) return counted;
    int same = PyObject_RichCompareBool(version, PyTuple_GET_ITEM(held, 1), Py_EQ);
    Py_DECREF(version);
    return same;
}

/* (tensor without its graph, its version, slot) */
static PyObject *to_hold(PyObject *tensor, PyObject *version, PyObject *slot) {
    PyObject *bare = PyObject_CallMethodNoArgs(tensor, s_detach);
    PyObject *held = bare ? PyTuple_Pack(3, bare, version, slot) : NULL;
    Py_XDECREF(bare);
    return held;
}

/* -- forward --------------------------------------------------------------------------------------- */

/* Whether modes of the user's see what is called here. */
static int under_modes(Quick *q) {
    int modes = calls_true(q->modes);
    return modes ? modes : calls_true(q->function_modes);
}

/* 1 where a forward runs here that is to be measured with nothing around it. */
static int plain_forward(Quick *q) {
    if (!q->pass || q->slow || PyThread_get_thread_ident() != q->thread) return 0;
    if (AT(q, q->pass, PASS_closed) != Py_False) return 0;
    int grad = calls_true(q->grad_enabled);
    if (grad <= 0) return grad;
    PyObject *task = PyObject_CallNoArgs(q->task);
    if (!task) return -1;
    long id = PyLong_AsLong(task);
    Py_DECREF(task);
    if (id != -1) return PyErr_Occurred() ? -1 : 0;
    int modes = under_modes(q);
    if (modes) return modes < 0 ? -1 : 0;
    PyObject *const functions[2] = {q->interpreter, q->tracing};
    for (int i = 0; i < 2; i++) {
        PyObject *found = PyObject_CallNoArgs(functions[i]);
        if (!found) return -1;
        Py_DECREF(found);
        if (found != Py_None) return 0;
    }
    PyObject *tracing = PyDict_GetItemWithError(q->symbolic, q->symbolic_name);
    if (!tracing) return PyErr_Occurred() ? -1 : 0;
    return tracing == Py_False;
}

/* The one tensor of an output, borrowed; NULL where there is another thing, or more. */
static PyObject *only_tensor(Quick *q, PyObject *output) {
    if (Py_TYPE(output) == (PyTypeObject *)q->tensor_type) return output;
    if (!PyTuple_CheckExact(output)) return NULL;
    PyObject *found = NULL;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(output); i++) {
        PyObject *item = PyTuple_GET_ITEM(output, i);
        if (item == Py_None) continue;
        if (found || Py_TYPE(item) != (PyTypeObject *)q->tensor_type) return NULL;
        found = item;
    }
    return found;
}

/* The tensor that the hook of this one belongs on, a new reference: itself, or the base that a Linear's output
 * is a view of. 1, or 0 for a view that takes the hook itself, or -1 with an error. */
static int target_of(Site *site, PyObject *tensor, PyObject **target) {
    PyObject *base = PyObject_GetAttr(tensor, s__base);
    *target = NULL;
    if (!base) return -1;
    if (base == Py_None) {
        Py_DECREF(base);
        *target = new_reference(tensor);
        return 1;
    }
    int whole = 0;
    if (site->linear) {
        PyObject *a = PyObject_CallMethodNoArgs(base, s_numel);
        PyObject *b = a ? PyObject_CallMethodNoArgs(tensor, s_numel) : NULL;
        whole = b ? PyObject_RichCompareBool(a, b, Py_EQ) : -1;
        Py_XDECREF(a);
        Py_XDECREF(b);
        if (whole > 0) whole = truth(base, s_requires_grad);
    }
    *target = whole > 0 ? base : whole < 0 ? NULL : new_reference(tensor);
    if (whole <= 0) Py_DECREF(base);
    return whole;
}

/* `gradscope.collect.tensors.writes_of`: what counts the writes to a view, and their number now. */
static PyObject *writes_of(Quick *q, PyObject *tensor, int half) {
    PyObject *counter = PyObject_CallMethodNoArgs(tensor, s_detach), *version = NULL, *found = NULL;
    if (counter && !PyObject_SetAttr(counter, s_data, q->empty[half]))
        version = PyObject_GetAttr(counter, s__version);
    if (version) found = PyTuple_Pack(2, counter, version);
    Py_XDECREF(counter);
    Py_XDECREF(version);
    return found;
}

/* Whether a view was written to since: 1, 0, or -1 with an error. */
static int was_written(PyObject *writes) {
    if (writes == Py_None) return 0;
    PyObject *version = PyObject_GetAttr(PyTuple_GET_ITEM(writes, 0), s__version);
    if (!version) return -1;
    int written = PyObject_RichCompareBool(version, PyTuple_GET_ITEM(writes, 1), Py_NE);
    Py_DECREF(version);
    return written;
}

/* `gradscope.collect.probes.put_on`: 0, or -1 with an error. */
static int hook(Quick *q, PyObject *number, PyObject *tensor, PyObject *target, PyObject *slot) {
    PyObject *probe = NULL, *hooks = NULL, *node = NULL, *done = NULL;
    int failed = -1;
    if (!(probe = made(q, PROBE))) goto end;
    put(q, probe, PROBE__recorder, new_reference(q->recorder));
    put(q, probe, PROBE_site, new_reference(number));
    put(q, probe, PROBE_slot, new_reference(slot));
    PyObject *shape = PyObject_GetAttr(tensor, s_shape);
    if (!shape) goto end;
    put(q, probe, PROBE_shape, shape);
    if (!(hooks = PyObject_GetAttr(target, s__backward_hooks))) goto end;
    if (hooks != Py_None || Py_TYPE(target) != (PyTypeObject *)q->tensor_type) {
        done = PyObject_CallMethod(target, "register_hook", "O", probe);
        failed = done ? 0 : -1;
        goto end;
    }
    Py_SETREF(hooks, PyObject_CallNoArgs(q->ordered));
    if (!hooks || PyObject_SetAttr(target, s__backward_hooks, hooks)) goto end;
    if (!(node = PyObject_GetAttr(target, s_grad_fn))) goto end;
    if (!(done = PyObject_CallMethodOneArg(node, s__register_hook_dict, target))) goto end;
    failed = PyObject_SetItem(hooks, probe, probe);
end:
    Py_XDECREF(probe);
    Py_XDECREF(hooks);
    Py_XDECREF(node);
    Py_XDECREF(done);
    return failed;
}

static PyObject *count_of(PyObject *counts, PyObject *site) {
    PyObject *found = PyDict_GetItemWithError(counts, site);
    if (found) return new_reference(found);
    return PyErr_Occurred() ? NULL : PyLong_FromLong(0);
}

/* The call and its slot, put where a pass keeps them: 0, or -1 with an error. */
static int keep(Quick *q, PyObject *pass, Site *site, PyObject *number, PyObject *tensor, PyObject *version,
                PyObject *slot, PyObject *call) {
    PyObject *counts = AT(q, pass, PASS_counts);
    PyObject *index = count_of(counts, number), *next = NULL, *slots = NULL, *id = NULL, *weak = NULL,
             *alias = NULL;
    int failed = -1;
    if (!index) return -1;
    put(q, call, CALL_site, new_reference(number));
    put(q, call, CALL_index, index);
    if (!(slots = PyList_New(1))) return -1;
    PyList_SET_ITEM(slots, 0, new_reference(slot));
    put(q, call, CALL_slots, slots);
    if (site->parent >= 0) {
        PyObject *parent = PyLong_FromSsize_t(site->parent);
        PyObject *during = parent ? count_of(counts, parent) : NULL;
        Py_XDECREF(parent);
        if (!during) return -1;
        put(q, call, CALL_block_call, during);
    }
    if (!(next = PyLong_FromSsize_t(PyLong_AsSsize_t(index) + 1))) goto end;
    if (!(id = PyLong_FromVoidPtr(tensor)) || !(weak = PyWeakref_NewRef(tensor, NULL))) goto end;
    if (!(alias = PyTuple_Pack(3, weak, version, slot))) goto end;
    if (PyDict_SetItem(counts, number, next)) goto end;
    if (PyDict_SetItem(AT(q, pass, PASS_aliases), id, alias)) goto end;
    failed = PyList_Append(AT(q, pass, PASS_calls), call);
end:
    Py_XDECREF(next);
    Py_XDECREF(id);
    Py_XDECREF(weak);
    Py_XDECREF(alias);
    return failed;
}

/* A call becomes the stream's last position: 0, or -1 with an error. */
static int join(Quick *q, PyObject *trunk, PyObject *held, const View *view, const View *before,
                PyObject *number, PyObject *tensor, PyObject *version, PyObject *slot, PyObject *call) {
    PyObject *calls = AT(q, trunk, TRUNK_calls), *holding;
    Py_ssize_t count = PyList_GET_SIZE(calls);
    if (held) {
        PyObject *earlier = PyTuple_GET_ITEM(held, 2), *absent = AT(q, earlier, SLOT_absent);
        double product, distance;
        relate(before, view, &product, &distance);
        put(q, earlier, SLOT_successor, new_reference(slot));
        for (int i = 0; i < 2; i++)
            if (PyDict_DelItem(absent, q->activation_pair[i])) return -1;
        if (set_pair(AT(q, earlier, SLOT_values), q->activation_pair, product, distance)) return -1;
    }
    if (!(holding = to_hold(tensor, version, slot))) return -1;
    put(q, trunk, TRUNK_held_activation, holding);
    put(q, trunk, TRUNK_reading, new_reference(Py_None));
    if (count) {
        PyObject *previous = PyList_GET_ITEM(calls, count - 1);
        PyObject *key = PyTuple_Pack(2, number, AT(q, call, CALL_index));
        if (!key) return -1;
        PyObject *proof = PyDict_GetItemWithError(q->proofs, key);
        Py_DECREF(key);
        if (!proof && PyErr_Occurred()) return -1;
        put(q, previous, CALL_unit_skip, new_reference(proof ? proof : Py_None));
    }
    return PyList_Append(calls, call);
}

static int note_dtype(Quick *q, PyObject *tensor, int half) {
    int autocast = calls_true(q->autocast);
    if (autocast < 0) return -1;
    if (autocast) {
        PyObject *done = PyObject_CallOneArg(q->on_autocast, tensor);
        if (!done) return -1;
        Py_DECREF(done);
    }
    if (q->dtypes_seen & (1 << half)) return 0;
    PyObject *dtype = PyObject_GetAttr(tensor, s_dtype);
    if (!dtype) return -1;
    int failed = PySet_Add(q->dtypes, dtype);
    Py_DECREF(dtype);
    q->dtypes_seen |= 1 << half;
    return failed;
}

PyDoc_STRVAR(forward_doc, "forward(site, output) -> whether it was measured");

static PyObject *forward(Quick *q, PyObject *const *args, Py_ssize_t given) {
    if (given != 2) return PyErr_Format(PyExc_TypeError, "forward(site, output)");
    PyObject *number = args[0], *trunk = NULL, *held = NULL, *slot = NULL, *call = NULL, *values = NULL;
    PyObject *target = NULL, *version = NULL, *pass = q->pass;
    Py_ssize_t at = PyLong_AsSsize_t(number);
    if (at == -1 && PyErr_Occurred()) return NULL;
    if (!pass || at < 0 || at >= q->site_count || !q->sites[at].quick) Py_RETURN_FALSE;
    Site *site = &q->sites[at];
    PyObject *tensor = only_tensor(q, args[1]);
    if (!tensor) Py_RETURN_FALSE;
    Py_INCREF(pass);
    int fits = plain_forward(q);
    View view, before;
    if (fits > 0) fits = look(q, tensor, &view);
    if (fits <= 0) goto decline;
    if (site->block) {
        trunk = PyDict_GetItemWithError(AT(q, pass, PASS_trunks), site->trunk);
        if (!trunk) goto decline;
        Py_INCREF(trunk);
        held = AT(q, trunk, TRUNK_held_activation);
        held = held == Py_None ? NULL : new_reference(held);
        if (held && (fits = as_held(q, held, &view, &before)) <= 0) goto decline;
    } else {
        PyObject *id = PyLong_FromVoidPtr(tensor);
        int known = id ? PyDict_Contains(AT(q, pass, PASS_aliases), id) : -1;
        Py_XDECREF(id);
        if (known) {
            fits = known < 0 ? -1 : 0;
            goto decline;
        }
    }
    int wanted = truth(tensor, s_requires_grad), leaf = truth(tensor, s_is_leaf);
    fits = wanted < 0 || leaf < 0 ? -1 : !(wanted && leaf);
    if (fits <= 0) goto decline;
    int view_itself = wanted ? target_of(site, tensor, &target) == 0 : 0;
    if (wanted && !target) goto decline;
    if ((fits = version_of(tensor, &version)) <= 0) goto decline;
    double moments[MOMENTS];
    if (!measure(&view, moments)) goto decline;
    /* Other threads may have run meanwhile, and closed the watch. */
    if (q->pass != pass || AT(q, pass, PASS_closed) != Py_False) goto decline;
    /* From here on it is done, or fails. */
    PyObject *result = NULL;
    if (note_dtype(q, tensor, view.half)) goto end;
    if (!(slot = made(q, SLOT)) || !(call = made(q, CALL))) goto end;
    put(q, slot, SLOT_site, new_reference(number));
    if (!(values = row(q, moments, q->activation_columns))) goto end;
    put(q, slot, SLOT_values, values);
    PyObject *absent = PyDict_Copy(site->absent);
    if (!absent) goto end;
    put(q, slot, SLOT_absent, absent);
    put(q, slot, SLOT_owner, new_reference(pass));
    if (view_itself) {
        PyObject *writes = writes_of(q, tensor, view.half);
        if (!writes) goto end;
        put(q, slot, SLOT_writes, writes);
        if (PyList_Append(AT(q, pass, PASS_views), slot)) goto end;
    }
    if (trunk) {
        put(q, slot, SLOT_stream, new_reference(Py_True));
        put(q, slot, SLOT_trunk, new_reference(trunk));
    }
    if (keep(q, pass, site, number, tensor, version, slot, call)) goto end;
    if (wanted && hook(q, number, tensor, target, slot)) goto end;
    if (trunk && join(q, trunk, held, &view, &before, number, tensor, version, slot, call)) goto end;
    result = new_reference(Py_True);
end:
    Py_XDECREF(slot);
    Py_XDECREF(call);
    Py_XDECREF(trunk);
    Py_XDECREF(held);
    Py_DECREF(version);
    Py_XDECREF(target);
    Py_DECREF(pass);
    return result;
decline:
    Py_DECREF(pass);
    Py_XDECREF(trunk);
    Py_XDECREF(held);
    Py_XDECREF(version);
    Py_XDECREF(target);
    if (fits < 0 || PyErr_Occurred()) return NULL;
    Py_RETURN_FALSE;
}

PyDoc_STRVAR(skips_doc, "skips(site) -> whether the input of this block is of no interest");

static PyObject *skips(Quick *q, PyObject *number) {
    Py_ssize_t at = PyLong_AsSsize_t(number);
    if (at == -1 && PyErr_Occurred()) return NULL;
    if (!q->pass || at < 0 || at >= q->site_count || !q->sites[at].block) Py_RETURN_FALSE;
    int fits = plain_forward(q);
    if (fits > 0) fits = PyDict_Contains(AT(q, q->pass, PASS_trunks), q->sites[at].trunk);
    if (fits < 0) return NULL;
    return PyBool_FromLong(fits);
}

/* -- backward -------------------------------------------------------------------------------------- */

PyDoc_STRVAR(gradient_doc, "gradient(probe, gradient) -> whether it was measured");

static PyObject *gradient(Quick *q, PyObject *const *args, Py_ssize_t given) {
    if (given != 2) return PyErr_Format(PyExc_TypeError, "gradient(probe, gradient)");
    PyObject *slot = AT(q, args[0], PROBE_slot), *grad = args[1], *id = NULL, *holding = NULL, *version = NULL;
    PyObject *owner = slot ? AT(q, slot, SLOT_owner) : NULL, *held = NULL, *trunk = NULL, *successor = NULL;
    View view, before;
    double moments[MOMENTS], product = 0, distance = 0;
    int fits = 0, pair = 0;
    if (q->slow || !owner || owner == Py_None || AT(q, owner, PASS_closed) != Py_False) Py_RETURN_FALSE;
    if (AT(q, owner, PASS_valid) != Py_None || AT(q, slot, SLOT_backward) != Py_None) Py_RETURN_FALSE;
    int written = was_written(AT(q, slot, SLOT_writes));
    if (written) {
        if (written < 0) return NULL;
        Py_RETURN_FALSE;
    }
    Py_ssize_t at = PyLong_AsSsize_t(AT(q, slot, SLOT_site));
    if (at == -1 && PyErr_Occurred()) return NULL;
    if (at < 0 || at >= q->site_count || !q->sites[at].quick) Py_RETURN_FALSE;
    int modes = under_modes(q);
    if (modes) {
        if (modes < 0) return NULL;
        Py_RETURN_FALSE;
    }
    PyObject *interpreter = PyObject_CallNoArgs(q->interpreter);
    if (!interpreter) return NULL;
    Py_DECREF(interpreter);
    if (interpreter != Py_None) Py_RETURN_FALSE; /* a backward pass under vmap */
    if (!(id = PyObject_CallNoArgs(q->task))) return NULL;
    fits = PySet_Contains(AT(q, owner, PASS_begun), id);
    if (fits > 0) fits = look(q, grad, &view);
    if (fits <= 0) goto decline;
    int stream = AT(q, slot, SLOT_stream) == Py_True && AT(q, slot, SLOT_trunk) != Py_None;
    PyObject *shape = AT(q, args[0], PROBE_shape);
    if (!has_shape(&view, shape) && (stream || !take_shape(&view, shape))) goto decline;
    if (stream) {
        trunk = new_reference(AT(q, slot, SLOT_trunk));
        successor = AT(q, slot, SLOT_successor);
        held = new_reference(AT(q, trunk, TRUNK_held_gradient));
        if (successor != Py_None) {
            if (held == Py_None || PyTuple_GET_ITEM(held, 2) != successor) goto decline;
            fits = PyObject_RichCompareBool(AT(q, successor, SLOT_backward), id, Py_EQ);
            if (fits > 0) fits = as_held(q, held, &view, &before);
            if (fits <= 0) goto decline;
            pair = 1;
        }
    }
    if (!measure(&view, moments)) goto decline;
    /* Other threads may have run meanwhile, and closed the watch. */
    if (AT(q, owner, PASS_closed) != Py_False || AT(q, slot, SLOT_backward) != Py_None) goto decline;
    if (stream && (fits = version_of(grad, &version)) <= 0) goto decline;
    /* From here on it is done, or fails. */
    PyObject *result = NULL;
    Py_INCREF(slot);
    put(q, slot, SLOT_backward, new_reference(id));
    PyObject *arrival = PyIter_Next(q->arrivals);
    if (!arrival) goto end;
    put(q, slot, SLOT_arrival, arrival);
    if (PyDict_GET_SIZE(q->recomputed)) PyDict_Clear(q->recomputed);
    PyObject *values = row(q, moments, q->gradient_columns);
    if (!values) goto end;
    put(q, slot, SLOT_gradient, values);
    PyObject *absent = PyDict_Copy(q->gradient_absent[AT(q, slot, SLOT_stream) == Py_True]);
    if (!absent) goto end;
    put(q, slot, SLOT_gradient_absent, absent);
    if (stream) {
        if (!(holding = to_hold(grad, version, slot))) goto end;
        if (pair) {
            relate(&view, &before, &product, &distance);
            if (set_pair(values, q->gradient_pair, product, distance)) goto end;
        } else {
            for (int i = 0; i < 2; i++)
                if (PyDict_SetItem(absent, q->gradient_pair[i], q->last)) goto end;
        }
        put(q, trunk, TRUNK_held_gradient, holding);
        holding = NULL;
    }
    result = new_reference(Py_True);
end:
    Py_XDECREF(holding);
    Py_XDECREF(held);
    Py_XDECREF(trunk);
    Py_DECREF(slot);
    Py_DECREF(id);
    Py_XDECREF(version);
    return result;
decline:
    Py_XDECREF(held);
    Py_XDECREF(trunk);
    Py_XDECREF(version);
    Py_XDECREF(id);
    if (fits < 0 || PyErr_Occurred()) return NULL;
    Py_RETURN_FALSE;
}

/* -- the object ------------------------------------------------------------------------------------ */

PyDoc_STRVAR(begin_doc, "begin(pass, slow): the forward that runs in this thread from now on");

static PyObject *begin(Quick *q, PyObject *const *args, Py_ssize_t given) {
    if (given != 2) return PyErr_Format(PyExc_TypeError, "begin(pass, slow)");
    if (Py_TYPE(args[0]) != Py_TYPE(q->template[PASS])) return PyErr_Format(PyExc_TypeError, "no pass");
    int slow = PyObject_IsTrue(args[1]);
    if (slow < 0) return NULL;
    Py_XSETREF(q->pass, new_reference(args[0]));
    q->thread = PyThread_get_thread_ident();
    q->slow = slow;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(end_doc, "end(): no forward runs");

static PyObject *end(Quick *q, PyObject *Py_UNUSED(nothing)) {
    Py_CLEAR(q->pass);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(set_slow_doc, "set_slow(slow): whether this step has slow statistics");

static PyObject *set_slow(Quick *q, PyObject *value) {
    int slow = PyObject_IsTrue(value);
    if (slow < 0) return NULL;
    q->slow = slow;
    Py_RETURN_NONE;
}

#define REFERENCES(X)                                                                                     \
    X(recorder) X(arrivals) X(proofs) X(recomputed) X(dtypes) X(on_autocast) X(last) X(array)             \
    X(tensor_type) X(ordered) X(grad_enabled) X(task) X(modes) X(function_modes) X(interpreter) X(tracing) X(autocast)      \
    X(symbolic) X(symbolic_name)

static int quick_traverse(Quick *q, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(q));
    Py_VISIT(q->pass);
    Py_VISIT(q->on_autocast);
    Py_VISIT(q->recomputed);
    return 0;
}

static int quick_clear(Quick *q) {
    Py_CLEAR(q->pass);
    Py_CLEAR(q->on_autocast);
    return 0;
}

static void quick_dealloc(Quick *q) {
    PyTypeObject *type = Py_TYPE(q);
    PyObject_GC_UnTrack(q);
    Py_CLEAR(q->pass);
#define DROP(NAME) Py_CLEAR(q->NAME);
    REFERENCES(DROP)
    for (int i = 0; i < KINDS; i++) Py_CLEAR(q->template[i]);
    for (int i = 0; i < 2; i++) {
        Py_CLEAR(q->gradient_absent[i]);
        Py_CLEAR(q->activation_pair[i]);
        Py_CLEAR(q->gradient_pair[i]);
        Py_CLEAR(q->empty[i]);
    }
    for (Py_ssize_t i = 0; q->sites && i < q->site_count; i++) {
        Py_CLEAR(q->sites[i].trunk);
        Py_CLEAR(q->sites[i].absent);
    }
    PyMem_Free(q->sites);
    type->tp_free(q);
    Py_DECREF(type);
}

/* Where an object of this type keeps a slot; -1 with an error. */
static Py_ssize_t offset_of(PyTypeObject *type, const char *name) {
    PyObject *descriptor = PyObject_GetAttrString((PyObject *)type, name);
    if (!descriptor) return -1;
    Py_ssize_t offset = -1;
    if (Py_TYPE(descriptor) == &PyMemberDescr_Type)
        offset = ((PyMemberDescrObject *)descriptor)->d_member->offset;
    else
        PyErr_Format(PyExc_TypeError, "%s.%s is no slot", type->tp_name, name);
    Py_DECREF(descriptor);
    return offset;
}

static int read_sites(Quick *q, PyObject *sites) {
    q->site_count = PyTuple_GET_SIZE(sites);
    q->sites = PyMem_Calloc((size_t)q->site_count + 1, sizeof *q->sites);
    if (!q->sites) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < q->site_count; i++) {
        Site *s = &q->sites[i];
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(sites, i), "pppnOO!", &s->quick, &s->block, &s->linear, &s->parent,
                              &s->trunk, &PyDict_Type, &s->absent)) {
            s->trunk = s->absent = NULL;
            return -1;
        }
        Py_INCREF(s->trunk);
        Py_INCREF(s->absent);
    }
    return 0;
}

static PyObject *quick_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"sites",     "templates",  "columns",  "pairs",      "gradient_absent", "recorder",
                            "arrivals",  "proofs",     "recomputed", "dtypes",   "on_autocast",     "last",
                            "tensor",    "exchange",   "ordered",  "array",      "functions",       "symbolic",
                            "empty",
                            NULL};
    PyObject *sites, *templates, *functions, *exchange;
    Py_ssize_t columns[2];
    Quick *q = (Quick *)type->tp_alloc(type, 0);
    if (!q) return NULL;
    PyObject *recorder, *arrivals, *proofs, *recomputed, *dtypes, *on_autocast, *last, *tensor, *ordered, *array;
    if (!PyArg_ParseTupleAndKeywords(
            args, keywords, "O!O!(nn)(OOOO)(OO)OOO!O!OOOOOOOO!(OO)(OO)", names, &PyTuple_Type, &sites, &PyTuple_Type,
            &templates, &columns[0], &columns[1], &q->activation_pair[0], &q->activation_pair[1],
            &q->gradient_pair[0], &q->gradient_pair[1], &q->gradient_absent[0], &q->gradient_absent[1], &recorder,
            &arrivals, &PyDict_Type, &proofs, &PyDict_Type, &recomputed, &dtypes, &on_autocast, &last, &tensor,
            &exchange, &ordered, &array, &PyTuple_Type, &functions, &q->symbolic, &q->symbolic_name,
            &q->empty[0], &q->empty[1])) {
        memset((char *)q + sizeof(PyObject), 0, sizeof *q - sizeof(PyObject));
        Py_DECREF(q);
        return NULL;
    }
    for (int i = 0; i < 2; i++) {
        Py_INCREF(q->activation_pair[i]);
        Py_INCREF(q->gradient_pair[i]);
        Py_INCREF(q->gradient_absent[i]);
        Py_INCREF(q->empty[i]);
    }
    Py_INCREF(q->symbolic);
    Py_INCREF(q->symbolic_name);
    q->recorder = new_reference(recorder);
    q->arrivals = new_reference(arrivals);
    q->proofs = new_reference(proofs);
    q->recomputed = new_reference(recomputed);
    q->dtypes = new_reference(dtypes);
    q->on_autocast = new_reference(on_autocast);
    q->last = new_reference(last);
    q->tensor_type = new_reference(tensor);
    q->ordered = new_reference(ordered);
    q->array = new_reference(array);
    q->activation_columns = columns[0];
    q->gradient_columns = columns[1];
    PyObject **const targets[] = {&q->grad_enabled, &q->task,    &q->modes, &q->function_modes,
                                  &q->interpreter,  &q->tracing, &q->autocast};
    if (PyTuple_GET_SIZE(functions) != 7 || PyTuple_GET_SIZE(templates) != KINDS ||
        !PyDict_Check(q->symbolic)) {
        PyErr_SetString(PyExc_TypeError, "not what a sampler gives");
        goto fail;
    }
    for (int i = 0; i < 7; i++) *targets[i] = new_reference(PyTuple_GET_ITEM(functions, i));
    for (int i = 0; i < KINDS; i++) q->template[i] = new_reference(PyTuple_GET_ITEM(templates, i));
    if (!(q->exchange = exchange_of(exchange))) goto fail;
#define FIND(KIND, NAME)                                                              \
    q->offset[KIND##_##NAME] = offset_of(Py_TYPE(q->template[KIND]), #NAME);          \
    if (q->offset[KIND##_##NAME] < 0) goto fail;
    FIELDS(FIND)
    if (read_sites(q, sites)) goto fail;
    return (PyObject *)q;
fail:
    Py_DECREF(q);
    return NULL;
}

#define FAST(NAME) {#NAME, (PyCFunction)(void (*)(void))NAME, METH_FASTCALL, NAME##_doc}

static PyMethodDef quick_methods[] = {FAST(forward),
                                      FAST(gradient),
                                      FAST(begin),
                                      {"skips", (PyCFunction)skips, METH_O, skips_doc},
                                      {"set_slow", (PyCFunction)set_slow, METH_O, set_slow_doc},
                                      {"end", (PyCFunction)end, METH_NOARGS, end_doc},
                                      {NULL, NULL, 0, NULL}};

PyDoc_STRVAR(quick_doc, "The quick way of one sampler; made and described by gradscope.collect.quick.");

static PyType_Slot quick_slots[] = {{Py_tp_new, quick_new},         {Py_tp_dealloc, quick_dealloc},
                                    {Py_tp_traverse, quick_traverse}, {Py_tp_clear, quick_clear},
                                    {Py_tp_methods, quick_methods}, {Py_tp_doc, (void *)quick_doc},
                                    {0, NULL}};

static PyType_Spec quick_spec = {"gradscope.collect._quick.Quick", sizeof(Quick), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, quick_slots};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_quick", "The quick way of the hooks.", -1, NULL,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__quick(void) {
#define INTERN(NAME)                                       \
    if (!(s_##NAME = PyUnicode_InternFromString(#NAME))) return NULL;
    NAMES(INTERN)
    if (prepare_views()) return NULL;
    PyObject *found = PyModule_Create(&module), *type = PyType_FromSpec(&quick_spec);
    if (!found || !type || PyModule_AddObject(found, "Quick", type)) return NULL;
    return found;
}
