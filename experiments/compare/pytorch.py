"""Our nets in PyTorch, and a hand-written training step on them.

pip install -e ".[bench]"
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.lib import options


def need(*modules: str) -> None:
    """Check that these modules can be imported, before doing work that needs them.

    Raises:
      UnavailableError: if some can't be; it names them.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise options.UnavailableError(
            f"expected {', '.join(modules)}, got no {', '.join(missing)}; the first lines of "
            "--help show how to install them"
        )


def torch_net(params: Mapping[str, Any]) -> Any:
    """Return a `torch.nn.Module` from images `[B, C, H, W]` to logits, with these parameters."""
    import torch
    from torch import nn
    from torch.nn import functional

    layers = sorted(params["params"])  # convs_0_0, ..., hidden_0, ..., logits: in forward order

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in layers:
                kernel = torch.from_numpy(np.array(params["params"][name]["kernel"]))
                bias = torch.from_numpy(np.array(params["params"][name]["bias"]))
                if name.startswith("convs"):
                    kernel = kernel.permute(3, 2, 0, 1).contiguous()
                self.register_parameter(f"{name}_kernel", nn.Parameter(kernel))
                self.register_parameter(f"{name}_bias", nn.Parameter(bias))

        def forward(self, x: Any) -> Any:
            for name, following in itertools.pairwise([*layers, ""]):
                kernel, bias = getattr(self, f"{name}_kernel"), getattr(self, f"{name}_bias")
                if name.startswith("convs"):
                    padding = 0 if kernel.shape[-1] == 5 else 1
                    x = functional.relu(functional.conv2d(x, kernel, bias, padding=padding))
                    if following.rpartition("_")[0] != name.rpartition("_")[0]:  # ends its block
                        x = functional.max_pool2d(x, 2)
                    continue
                if x.ndim == 4 and len(kernel) == x.shape[1] < x[0].numel():  # a pooled net
                    x = x.mean((2, 3))
                elif x.ndim == 4:
                    x = x.permute(0, 2, 3, 1).reshape(len(x), -1)
                x = torch.addmm(bias, x, kernel)
                if name != "logits":
                    x = functional.relu(x)
            return x

    return Net()


def params_of(state: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
    """Convert the parameters of a PyTorch net to those of a net of `experiments.lib.models`.

    Args:
      state: the arrays of a `state_dict`, in the order of the layers: `NAME.weight` and `NAME.bias`
        of 3x3 convolutions, each followed by a 2x2 max pool, then of dense layers.

    Raises:
      ValueError: if the first dense layer doesn't fit square images.
    """
    names = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    convs = [name for name in names if state[f"{name}.weight"].ndim == 4]
    dense = [name for name in names if state[f"{name}.weight"].ndim == 2]
    layers = {}
    for i, name in enumerate(convs):
        kernel = state[f"{name}.weight"].transpose(2, 3, 1, 0)
        layers[f"convs_{i}_0"] = kernel, state[f"{name}.bias"]
    for i, name in enumerate(dense):
        kernel = state[f"{name}.weight"].T
        if i == 0 and convs:  # PyTorch flattens channels first
            channels = state[f"{convs[-1]}.bias"].size
            side = math.isqrt(len(kernel) // channels)
            if side * side * channels != len(kernel):
                raise ValueError(
                    f"expected a dense layer after {channels} square channels, got {name} with "
                    f"{len(kernel)} inputs; pass the state of a net for square images"
                )
            kernel = kernel.reshape(channels, side, side, -1).transpose(1, 2, 0, 3)
            kernel = kernel.reshape(side * side * channels, -1)
        label = "logits" if i == len(dense) - 1 else f"hidden_{i}"
        layers[label] = kernel, state[f"{name}.bias"]
    return {
        "params": {
            label: {"kernel": np.ascontiguousarray(kernel), "bias": np.array(bias)}
            for label, (kernel, bias) in layers.items()
        }
    }


def fixed_net(params: Mapping[str, Any]) -> Any:
    """Return the net for attacks: backward passes skip the gradients of its weights."""
    return torch_net(params).eval().requires_grad_(False)


def images(x: NDArray[np.float32]) -> Any:
    """Return images `[B, H, W, C]` as a PyTorch tensor `[B, C, H, W]`."""
    import torch

    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous()


def training(
    params: Mapping[str, Any],
    x: NDArray[np.float32],
    y: NDArray[np.int32],
    *,
    eps: float | None,
    device: str = "cpu",
) -> Callable[[], Any]:
    """Return a training step of SGD with momentum: plain, or LWA with Adv_Loss at l2 size eps."""
    import torch
    from torch.nn import functional

    net = torch_net(params).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    batch, labels = images(x).to(device), torch.from_numpy(y.astype(np.int64)).to(device)

    def step() -> Any:
        at = batch
        if eps is not None:
            at = batch.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(functional.cross_entropy(net(at), labels), at)
            norms = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
            at = at.detach() + eps * gradient / norms
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(at), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
