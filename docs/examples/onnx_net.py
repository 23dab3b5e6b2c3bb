"""Attack a net from an ONNX file, one that finds upside-down text: python onnx_net.py NET.onnx."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

import jaxadv


# -- the operators of this net
def conv(x, w, b=None, *, strides, pads, dilations, group, kernel_shape):
    padding = list(zip(pads[:2], pads[2:], strict=True))
    if group == 1:
        x = jax.lax.conv_general_dilated(x, w, strides, padding, rhs_dilation=dilations)
    else:  # one filter per channel, by shifts: XLA's grouped convolutions are slow on CPU
        x = jnp.pad(x, [(0, 0), (0, 0), *padding])
        rows, columns = (n - k + 1 for n, k in zip(x.shape[2:], kernel_shape, strict=True))
        x = sum(
            x[:, :, i : i + rows : strides[0], j : j + columns : strides[1]] * w[:, :, i, j, None]
            for i, j in np.ndindex(*kernel_shape)
        )
    return x if b is None else x + b[:, None, None]


def batch_norm(x, scale, bias, mean, var, *, epsilon, momentum):
    normalised = (x - mean[:, None, None]) / jnp.sqrt(var + epsilon)[:, None, None]
    return normalised * scale[:, None, None] + bias[:, None, None]


def max_pool(x, *, kernel_shape, strides, pads, ceil_mode):
    window, moves = (1, 1, *kernel_shape), (1, 1, *strides)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, moves, "VALID")


OPERATORS = {  # operators on shapes use NumPy, so that shapes are static under jit
    "Add": lambda x, y: x + y,
    "BatchNormalization": batch_norm,
    "Cast": lambda x, to: x.astype(onnx.helper.tensor_dtype_to_np_dtype(to)),
    "Clip": jnp.clip,
    "Concat": lambda *xs, axis: np.concatenate(xs, axis),
    "Conv": conv,
    "Div": lambda x, y: x / y,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdims=True),
    "HardSigmoid": lambda x, alpha, beta: jnp.clip(alpha * x + beta, 0, 1),
    "MatMul": jnp.matmul,
    "MaxPool": max_pool,
    "Mul": lambda x, y: x * y,
    "Relu": jax.nn.relu,
    "Reshape": jnp.reshape,
    "Shape": lambda x: np.array(x.shape),
    "Slice": lambda x, starts, ends, axes, steps: x[starts[0] : ends[0] : steps[0]],
}


# -- the net, in JAX and in the original runtime
def load(path):
    model = onnx.load(path)
    graph, constants, nodes = model.graph, {}, []
    (softmax,) = (i for i, node in enumerate(graph.node) if node.op_type == "Softmax")
    image, logits = graph.input[0].name, graph.node[softmax].input[0]
    for node in graph.node[:softmax]:  # up to the logits, without the softmax
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            constants[node.output[0]] = onnx.numpy_helper.to_array(attributes["value"])
        else:
            nodes.append((OPERATORS[node.op_type], attributes, node.input, node.output[0]))
    params = {name: jnp.asarray(c) for name, c in constants.items() if c.dtype == np.float32}

    def apply_fn(params, x):  # x: pixels in 0..1, [B, 3, 48, 192]
        values = constants | params | {image: 2 * x - 1}
        for operator, attributes, inputs, output in nodes:
            values[output] = operator(*(values[name] for name in inputs), **attributes)
        return values[logits]

    graph.output.insert(0, onnx.ValueInfoProto(name=logits))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return apply_fn, params, lambda x: session.run([logits], {image: 2 * np.asarray(x) - 1})[0]


# -- images for it
def lines_of_text(n):
    font, words = ImageFont.load_default(size=34), ("Robust", "classifiers", "of images", "in JAX")
    images = []
    for i in range(n):  # every other image is upside down
        image = Image.new("RGB", (192, 48), "white")
        text = f"{words[i // 2 % 4]} {i}"
        ImageDraw.Draw(image).text((8, 4), text, "black", font)
        images.append(np.asarray(image.rotate(180 * (i % 2))))
    return np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / 255, np.arange(n) % 2


# -- compare, attack, verify
def main(path):
    apply_fn, params, original = load(path)
    x, y = lines_of_text(20)
    np.testing.assert_allclose(apply_fn(params, x), original(x), atol=1e-3, rtol=1e-3)
    pgd = partial(jaxadv.attack.pgd, norm="linf", steps=10)
    found = jaxadv.evaluate.attack_and_score(
        apply_fn, params, x, y, pgd, eps=4 / 255, bounds=(0.0, 1.0)
    )
    adversarial = x + np.asarray(found.r)
    stored = np.rint(255 * adversarial).astype(np.uint8)  # as an image file stores them
    claimed = jaxadv.evaluate.accuracy(found.outcome.robust)
    print(f"accuracy under PGD: {claimed:.3f}; in the original runtime:", end=" ")
    for images in (x, adversarial, stored.astype(np.float32) / 255):
        print(f"{(original(images).argmax(1) == y).mean():.3f}", end=" ")
    print("on clean images, on adversarial ones, and on these in 8 bits")


if __name__ == "__main__":
    main(sys.argv[1])
