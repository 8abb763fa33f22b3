"""The optimizers against torch.optim in float64, RMSProp against TensorFlow's formula in numpy."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from mbv2_jax.training.settings import Optimizer
from tests.support import peers
from tests.support.optimizer_steps import (
    RATES,
    SHAPES,
    STEPS,
    Arrays,
    assert_same,
    draw,
    gradients,
    run_ours,
)

NORMS_AND_BIASES = ("stem/norm/scale", "stem/norm/bias", "classifier/bias")
TORCH: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.04),
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.04),
}


def run_torch(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    params: Arrays,
    grads: list[Arrays],
    *,
    group: Callable[[str], Mapping[str, float]] = lambda name: {},
    factor: Callable[[str], float] = lambda name: 1.0,
    clip_norm: float | None = None,
) -> list[Arrays]:
    """Returns the parameters after each step.

    Args:
      make: returns the optimizer of parameter groups, of which each parameter has one.
      params: the parameters at first.
      grads: the gradients of each step.
      group: returns the options of a parameter's group.
      factor: returns the factor of a parameter's learning rate.
      clip_norm: the norm for clip_grad_norm_; None: it is not called.
    """
    tensors = {name: torch.nn.Parameter(torch.from_numpy(v.copy())) for name, v in params.items()}
    names = list(tensors)
    descent = make([{"params": [tensors[name]], **group(name)} for name in names])
    history = []
    for rate, gradient in zip(RATES, grads, strict=True):
        for name, options in zip(names, descent.param_groups, strict=True):
            tensors[name].grad = torch.from_numpy(gradient[name].copy())
            options["lr"] = rate * factor(name)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip_norm)
        descent.step()
        history.append({name: t.detach().numpy().copy() for name, t in tensors.items()})
    return history


@pytest.mark.parametrize("weight_decay", [0.0, 0.04])
@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)], ids=str
)
def test_sgd_is_torchs(momentum, nesterov, weight_decay):
    settings = Optimizer(momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    theirs = run_torch(
        lambda groups: torch.optim.SGD(
            groups, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
        ),
        draw(0),
        gradients(),
    )
    assert_same(run_ours(settings, draw(0), gradients()), theirs)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_is_torchs(weight_decay):
    # Epsilon is so large that it matters where it is added.
    settings = Optimizer("adamw", betas=(0.8, 0.95), epsilon=1e-3, weight_decay=weight_decay)
    theirs = run_torch(
        lambda groups: torch.optim.AdamW(
            groups, betas=(0.8, 0.95), eps=1e-3, weight_decay=weight_decay
        ),
        draw(0),
        gradients(),
    )
    assert_same(run_ours(settings, draw(0), gradients()), theirs)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_decay_spares_norms_and_the_bias_only_if_asked(name, norm, bias):
    settings = Optimizer(name, weight_decay=0.04, decay_norm=norm, decay_bias=bias)

    def group(parameter: str) -> dict[str, float]:
        decays = bias if parameter == "classifier/bias" else norm
        spared = parameter in NORMS_AND_BIASES and not decays
        return {"weight_decay": 0.0 if spared else 0.04}

    theirs = run_torch(TORCH[name], draw(0), gradients(), group=group)
    assert_same(run_ours(settings, draw(0), gradients()), theirs)


def test_clipping_by_global_norm_comes_before_the_decay():
    settings = Optimizer(clip_norm=250.0, weight_decay=0.04)
    # Every second gradient is longer than clip_norm, the others are shorter.
    grads = [draw(seed, 40.0 if seed % 2 else 10.0) for seed in range(STEPS)]
    norms = [np.sqrt(sum((g**2).sum() for g in gradient.values())) for gradient in grads]
    assert max(norms[::2]) < 250.0 < min(norms[1::2])

    theirs = run_torch(TORCH["sgd"], draw(0), grads, clip_norm=250.0)
    # torch divides by the norm + 1e-6, which changes it by 4e-9 at most; parameters move by 100.
    assert_same(run_ours(settings, draw(0), grads), theirs, rtol=0.0, atol=4e-7)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_learning_rate_per_part_is_that_of_torchs_parameter_groups(name):
    rules = (("classifier", 2.5), (".*/norm", 0.0), (".*", 0.1))
    settings = Optimizer(name, weight_decay=0.04, lr_multipliers=rules)

    def factor(parameter: str) -> float:
        if parameter.startswith("classifier"):
            return 2.5
        return 0.0 if "/norm/" in parameter else 0.1

    theirs = run_torch(TORCH[name], draw(0), gradients(), factor=factor)
    assert_same(run_ours(settings, draw(0), gradients()), theirs)


def test_gradients_of_frozen_stages_do_not_count_for_the_clipping():
    settings = Optimizer(clip_norm=250.0, weight_decay=0.04)
    grads = gradients(scale=40.0)
    trained = [name for name in SHAPES if not name.startswith("stem")]

    theirs = run_torch(
        TORCH["sgd"],
        {name: draw(0)[name] for name in trained},
        [{name: gradient[name] for name in trained} for gradient in grads],
        clip_norm=250.0,
    )
    ours = run_ours(settings, draw(0), grads, frozen_stages=0)  # the stem
    ours_trained = [{name: after[name] for name in trained} for after in ours]
    assert_same(ours_trained, theirs, rtol=0.0, atol=4e-7)  # as in the test before


def test_clipping_by_unit_is_timms():
    timm_utils = peers.timm().utils
    settings = Optimizer(clip_units=0.3, momentum=0.0)
    grads = [draw(seed, 3.0 if seed % 2 else 0.1) for seed in range(STEPS)]

    def channels_first(array: np.ndarray) -> np.ndarray:  # in torch, a row is an output's kernel
        return np.ascontiguousarray(np.moveaxis(array, -1, 0)) if array.ndim > 1 else array

    tensors = {
        name: torch.nn.Parameter(torch.from_numpy(channels_first(value).copy()))
        for name, value in draw(0).items()
    }
    descent = torch.optim.SGD(tensors.values(), lr=1.0)
    theirs = []
    for rate, gradient in zip(RATES, grads, strict=True):
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(channels_first(gradient[name]).copy())
        timm_utils.adaptive_clip_grad(list(tensors.values()), clip_factor=0.3)
        descent.param_groups[0]["lr"] = rate
        descent.step()
        values = {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
        theirs.append(
            {name: np.moveaxis(v, 0, -1) if v.ndim > 1 else v for name, v in values.items()}
        )
    assert_same(run_ours(settings, draw(0), grads), theirs)
    # Both kinds of gradients occur: the first is below the limit, and the second is clipped.
    unclipped = run_ours(Optimizer(momentum=0.0), draw(0), grads)
    kernel = "classifier/kernel"
    np.testing.assert_allclose(unclipped[0][kernel], theirs[0][kernel], rtol=1e-6)  # float32
    assert not np.allclose(
        theirs[1][kernel] - theirs[0][kernel], unclipped[1][kernel] - unclipped[0][kernel]
    )
