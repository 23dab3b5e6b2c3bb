"""Argument checks and conversions, with which every public function begins.

Errors are raised at trace time, for everything known then: rank, dtype, batch size, the name of a
norm, a Python number. They say what was expected, what was passed, and how to fix it. Problems that
depend on values (labels out of range, NaN, a negative traced eps) are handled row by row in
`perturb` and `attack`, and counted by `evaluate`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.types import Bounds, Eps, Params

__all__ = [
    "accum_dtype",
    "apply",
    "are_examples",
    "at_least",
    "attackable",
    "box",
    "called",
    "examples",
    "expand_like",
    "finite",
    "is_correct",
    "keys",
    "labels",
    "logits_of",
    "losses_of",
    "native",
    "one_key",
    "paired",
    "perturbation",
    "radius",
]


def accum_dtype(dtype: Any) -> Any:
    """Return the dtype for arithmetic on values of `dtype`: float32 or wider."""
    kind = jax.dtypes.canonicalize_dtype(dtype)
    return jnp.dtype(jnp.float32) if jnp.finfo(kind).bits < 32 else kind


def expand_like(a: jax.Array, like: jax.Array) -> jax.Array:
    """Reshape `a` of shape `[B]` to `[B, 1, ...]`, so that it broadcasts against `like`."""
    return a.reshape(a.shape + (1,) * (like.ndim - 1))


def at_least(least: int, name: str, value: Any, cure: str) -> None:
    """Check a count, such as the number of steps, restarts or classes.

    Raises:
      TypeError: if it isn't a static integer (Python's or NumPy's).
      ValueError: if it is less than `least`.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"expected an integer {name}, got {value!r}; {cure}")
    if value < least:
        raise ValueError(f"expected {name} >= {least}, got {value}; {cure}")


def native(a: Any) -> Any:
    """Return a JAX array as it is, and anything else as a NumPy array that JAX accepts.

    JAX accepts only numbers of at most 64 bits in the machine's byte order. Containers indexed by
    row labels (pandas) become plain arrays, indexed by position.
    """
    if isinstance(a, jax.Array) or hasattr(a, "__jax_array__"):
        return jnp.asarray(a)
    a = np.asarray(a)
    dtype = np.dtype(np.float64) if a.dtype == np.longdouble else a.dtype.newbyteorder("=")
    return a.astype(dtype, copy=False)


def examples(x: Any, name: str = "x") -> jax.Array:
    """Check a batch of inputs: floating point, `[B, ...]` with a batch axis and at least one more.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if `x` has no batch axis or its examples have no entries.
    """
    x = native(x)
    are_examples(x, name)
    return jnp.asarray(x)


def are_examples(x: Any, name: str = "x") -> None:
    """Check as `examples` does, without moving the array to the device.

    Raises:
      As `examples`.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        cure = (
            "cast pixels first, e.g. x.astype(jnp.float32) / 255; tokens have no gradient: pass "
            "their embeddings as x, and the rest of the net as apply_fn"
        )
        cure = cure if name == "x" else f"cast it, e.g. {name}.astype(jnp.float32)"
        raise TypeError(f"expected {name} of a floating-point dtype, got {x.dtype}; {cure}")
    if x.ndim < 2 or math.prod(x.shape[1:]) == 0:
        raise ValueError(
            f"expected {name} of shape [B, ...], a batch of non-empty examples, got {x.shape}; "
            f"make a single example a batch of one with {name}[None]"
        )


def perturbation(r: Any, x: Any, name: str = "r", *, rounded: bool = False) -> Any:
    """Check perturbations of x, from a method or a user, without moving them to the device.

    Args:
      r: the perturbations.
      x: the examples, `[B, ...]`.
      name: what messages call them.
      rounded: whether they are rounded to x's dtype later, so that theirs may be another.

    Raises:
      TypeError: if they aren't a floating-point array; if x + r would be of another dtype than x,
        and the net would run in it.
      ValueError: if they aren't of x's shape.
    """
    if r is None:
        raise TypeError(f"expected {name}, an array like x, got None; return the perturbation")
    r = native(r)
    if r.shape != x.shape:
        raise ValueError(
            f"expected {name} of x's shape {x.shape}, got {r.shape}; pass one perturbation per "
            "example"
        )
    are_examples(r, name)
    own, wanted = (jax.dtypes.canonicalize_dtype(a.dtype) for a in (r, x))
    if not rounded and jnp.promote_types(own, wanted) != wanted:
        raise TypeError(
            f"expected {name} of x's dtype {wanted}, got {own}; convert it with "
            f"{name}.astype(x.dtype)"
        )
    return r


def labels(y: Any, n: int) -> jax.Array:
    """Check integer class labels, `[n]`.

    Raises:
      TypeError: if `y` is None, or not of an integer dtype.
      ValueError: if `y` is not of shape `[n]`.
    """
    if y is None:
        raise TypeError("expected integer labels [B], got None; pass y")
    y = native(y)
    if y.shape == (n, 1):  # its argmax would be class 0 for every row
        cure = "turn a column of labels into [B] with y[:, 0]"
    elif y.ndim == 1:
        cure = "cast class numbers with y.astype(int); turn names into numbers with np.unique"
    else:
        cure = "turn one-hot or soft labels into integers with jnp.argmax(y, axis=-1)"
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"expected integer labels [B], got {y.dtype} of shape {y.shape}; {cure}")
    if y.ndim != 1:
        raise ValueError(f"expected integer labels of shape [{n}], got {y.shape}; {cure}")
    if y.shape[0] != n:
        raise ValueError(
            f"expected as many labels as examples, got {y.shape[0]} labels for {n} examples; "
            "pass the labels of this batch"
        )
    return jnp.asarray(as_classes(y)).astype(jnp.int32)


def paired(x: jax.Array, y: Any) -> jax.Array:
    """Check that there is one label for each example, of any kind, for instance soft labels.

    Raises:
      ValueError: if there is not.
    """
    y = native(y)
    if y.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"expected as many labels as examples, got y of shape {y.shape} for {x.shape[0]} "
            "examples; pass the labels of this batch"
        )
    return jnp.asarray(as_classes(y) if jnp.issubdtype(y.dtype, jnp.integer) else y)


def as_classes(y: Any) -> Any:
    """Clip wide integers to the range of int32: a cast would turn the label 2^32 into class 0."""
    least = 0 if jnp.issubdtype(y.dtype, jnp.unsignedinteger) else -1
    return y.clip(least, 2**31 - 1) if y.dtype.itemsize > 4 else y


def called(apply_fn: Any, params: Params, x: Any, *key: Any) -> Any:
    """Call a net; add a note to its errors with the shape and dtype of x and a likely fix."""
    try:
        return apply_fn(params, x, *key)
    except Exception as error:
        with_key = ", key" if key else ""
        error.add_note(
            f"raised by apply_fn(params, x{with_key}) for x of shape {x.shape} and dtype {x.dtype}."
            " If the net takes other inputs, pass a function that converts x. A net that draws"
            " random numbers, (params, x, key), needs attack.pgd or attack.apgd with samples=1 or"
            " more; any other net needs samples=0."
        )
        raise


def apply(apply_fn: Any, params: Params, x: jax.Array, *key: jax.Array) -> jax.Array:
    """Call a classifier and check its logits with `logits_of`."""
    return logits_of(called(apply_fn, params, x, *key), x.shape[0])


def logits_of(logits: Any, n: int) -> jax.Array:
    """Check that a classifier returned logits `[n, K]`; they keep their dtype.

    Raises:
      TypeError: if it returned anything but one floating-point array.
      ValueError: if the array is not `[n, K]` with K of at least 2.
    """
    if not isinstance(logits, jax.Array | np.ndarray):
        raise TypeError(
            f"expected apply_fn to return logits, one array, got {type(logits).__name__}; wrap it "
            "so that it returns only these, e.g. lambda params, x: apply_fn(params, x)[0], or "
            '["logits"]'
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"expected apply_fn to return floating-point logits, got {logits.dtype}; "
            "return the scores before argmax or rounding"
        )
    if logits.ndim != 2 or logits.shape[0] != n:
        raise ValueError(
            f"expected apply_fn to return logits of shape [{n}, K], got {logits.shape}; "
            "it takes a batch [B, ...] and returns one row of K logits for each example"
        )
    if logits.shape[1] < 2:
        raise ValueError(
            f"expected logits of at least 2 classes, got shape {logits.shape}; wrap a binary net "
            "that has one logit with jaxadv.nets.two_logits(apply_fn)"
        )
    return jnp.asarray(logits)


def losses_of(losses: jax.Array, n: int) -> jax.Array:
    """Check that a loss function returned one loss per example, `[n]`.

    Raises:
      ValueError: if it returned anything else, for example the mean over the batch.
    """
    if losses.shape != (n,):
        raise ValueError(
            f"expected loss_fn to return one loss per example, [{n}], got shape {losses.shape}; "
            "leave out the mean over the batch"
        )
    return losses


def finite(x: jax.Array, logits: jax.Array, eps: jax.Array | None = None) -> jax.Array:
    """Return which rows are sound, `[B]`: x is finite, and no logit is NaN or +inf.

    If `eps` is given (it may be traced), it must be finite too.
    """
    sound = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim))) & jnp.all(logits < jnp.inf, 1)
    return sound if eps is None else sound & jnp.isfinite(eps)


def is_correct(logits: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return which rows are sound, not wholly masked, and classified correctly, `[B]`."""
    masked = jnp.all(jnp.isneginf(logits), axis=1)  # argmax would return class 0
    return (jnp.argmax(logits, axis=1) == y) & finite(x, logits) & ~masked


def attackable(logits: jax.Array, y: jax.Array | None) -> jax.Array:
    """Return which rows can be attacked, `[B]`: y and another class have finite logits.

    Without labels (`y` is None), any two classes with finite logits are enough.
    """
    candidates = logits > -jnp.inf
    several = jnp.sum(candidates, axis=1) > 1
    if y is None:
        return several
    is_y = jax.nn.one_hot(y, logits.shape[1], dtype=bool)  # all False for a label out of range
    return several & jnp.any(candidates & is_y, axis=1)


def radius(eps: Eps, x: Any, name: str = "eps") -> jax.Array:
    """Broadcast `eps`, or a size of another name, to `[B]` in the dtype of x's norms.

    Negative traced values become 0.

    Raises:
      TypeError: if `eps` is not a number or an array of numbers.
      ValueError: if a Python or NumPy `eps` is negative or not finite, or if the shape is neither
        `()` nor `[B]`.
    """
    if isinstance(eps, int | float | np.ndarray | np.generic):
        if not np.all(np.isfinite(eps)) or np.any(np.less(eps, 0)):
            raise ValueError(
                f"expected a finite {name} >= 0, got {eps}; {name} is a size, not a signed step"
            )
    elif not isinstance(eps, jax.Array):
        raise TypeError(
            f"expected {name} to be a number or an array, got {type(eps).__name__}; pass a scalar "
            "or one size per example, [B]"
        )
    if np.shape(eps) not in ((), (x.shape[0],)):
        raise ValueError(
            f"expected {name} of shape () or [{x.shape[0]}], got {np.shape(eps)}; "
            "pass one size, or one for each example of the batch"
        )
    eps = jnp.maximum(jnp.asarray(eps).astype(accum_dtype(x.dtype)), 0)
    return jnp.broadcast_to(eps, (x.shape[0],))


def box(bounds: Bounds, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Broadcast `bounds` to x's shape, rounded to x's dtype but stored in the dtype of norms.

    Raises:
      ValueError: if `bounds` is not a pair, if Python or NumPy bounds are not lo <= hi, or if they
        do not broadcast to `x`.
    """
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise ValueError(f"expected bounds=(lo, hi), got {bounds!r}; pass a pair, e.g. (0.0, 1.0)")
    if any(b is None for b in bounds):
        raise ValueError(
            f"expected two bounds, got {tuple(bounds)}; pass -jnp.inf or jnp.inf for an open end"
        )
    try:
        lo, hi = (
            jnp.broadcast_to(jnp.asarray(b).astype(x.dtype), x.shape).astype(accum_dtype(x.dtype))
            for b in bounds
        )
    except ValueError as error:
        raise ValueError(
            f"expected bounds that broadcast to shape {x.shape}, got shapes {np.shape(bounds[0])} "
            f"and {np.shape(bounds[1])}; pass numbers, or arrays of one example's shape"
        ) from error
    if not any(isinstance(b, jax.Array) for b in bounds) and not np.all(np.less_equal(*bounds)):
        raise ValueError(f"expected bounds (lo, hi) with lo <= hi, got {bounds!r}; swap them")
    return lo, hi


def keys(key: jax.Array | None, n: int, name: str) -> jax.Array:
    """Return one key per example, `[n]`: the keys given, or one key split.

    Raises:
      TypeError: if `key` isn't a key (but for example a seed).
      ValueError: if `key` is None, or neither one key nor `n` keys.
    """
    if key is None:
        raise ValueError(
            f"expected a key: {name} draws random numbers; pass key=jax.random.key(0), "
            "or one key per example"
        )
    cure = "pass jax.random.key(seed), or one key per example, jax.random.split(key, batch_size)"
    key = _typed(key, cure)
    if key.shape == (n,):
        return key
    if key.shape == ():
        return jax.random.split(key, n)
    raise ValueError(
        f"expected one key or {n} keys, one per example, got keys of shape {key.shape}; {cure}"
    )


def one_key(key: Any) -> None:
    """Check that `key` is a single key.

    Raises:
      TypeError: if it isn't a key (but a seed, for example).
      ValueError: if it is several keys.
    """
    cure = "pass jax.random.key(seed)"
    typed = _typed(key, cure)
    if typed.shape != ():
        raise ValueError(f"expected one key, got keys of shape {typed.shape}; {cure}")


def _typed(key: Any, cure: str) -> jax.Array:
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    width = jax.random.key_data(jax.random.key(0)).shape
    if getattr(key, "dtype", None) != jnp.uint32 or np.shape(key)[-1:] != width:
        raise TypeError(f"expected a key, got {key!r}; {cure}")
    return jax.random.wrap_key_data(key)
