"""The optimizer of a config, as a chain of optax transformations."""

import re
from typing import Any

import jax
import optax

from mbv2_jax.models import mobilenet_v2
from mbv2_jax.training.settings import Optimizer


def create(
    settings: Optimizer, rate: optax.Schedule, params: Any, frozen_stages: int
) -> optax.GradientTransformation:
    """Returns the optimizer of a config.

    Args:
      settings: the config's section.
      rate: the learning rate, from schedule.py.
      params: the network's parameters, or their shapes: their names decide which are decayed,
        scaled and frozen.
      frozen_stages: see spec.TrainingMode.
    """
    decay = optax.add_decayed_weights(
        settings.weight_decay, mask=lambda tree: _decayed(tree, settings)
    )
    descend = optax.scale_by_learning_rate(rate)
    nesterov = settings.nesterov and settings.name == "sgd"
    momentum = (
        optax.trace(settings.momentum, nesterov=nesterov) if settings.momentum else optax.identity()
    )
    if settings.name == "sgd":
        # torch's: the decay joins the gradient before the momentum, the rate comes after both.
        steps = [decay, momentum, descend]
    elif settings.name == "rmsprop":
        # TensorFlow's, as the paper's: mean squares start at one, epsilon is under the root, and
        # the rate is inside the momentum.
        rms = optax.scale_by_rms(
            settings.rms_decay, settings.epsilon, initial_scale=1.0, eps_in_sqrt=True
        )
        steps = [decay, rms, descend, momentum]
    else:
        steps = [optax.scale_by_adam(*settings.betas, eps=settings.epsilon), decay, descend]
    if settings.clip_units is not None:
        # A channel that is constant on ImageNet's photos has a variance near 0. Where BatchNorm's
        # statistics are frozen, its gradient is up to 300 times as large as others', and without
        # this limit ends the training at chance.
        steps.insert(0, optax.adaptive_grad_clip(settings.clip_units))
    if settings.clip_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(settings.clip_norm))
    chain = optax.chain(*steps)
    trained = mobilenet_v2.trainable(params, frozen_stages)
    if not all(jax.tree.leaves(trained)):
        # Frozen parameters skip the chain: weight decay would change them even without a gradient.
        labels = jax.tree.map(lambda moves: "trained" if moves else "frozen", trained)
        chain = optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)
    if settings.lr_multipliers:
        chain = optax.chain(chain, _scale_each(multipliers(params, settings.lr_multipliers)))
    return chain


def _decayed(tree: Any, settings: Optimizer) -> Any:
    """Returns which parameters decay: kernels always, vectors according to the settings."""

    def decays(path: Any, leaf: Any) -> bool:
        if leaf.ndim > 1:
            return True
        # A vector is BatchNorm's scale or bias (`norm/scale`), or the bias of a head's layer.
        return settings.decay_norm if path[-2].key == "norm" else settings.decay_bias

    return jax.tree_util.tree_map_with_path(decays, tree)


def multipliers(params: Any, rules: tuple[tuple[str, float], ...]) -> Any:
    """Returns the learning-rate factor of each parameter: the first rule that matches, else 1."""

    def factor(path: Any, leaf: Any) -> float:
        del leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next((float(value) for rule, value in rules if re.match(rule, name)), 1.0)

    return jax.tree_util.tree_map_with_path(factor, params)


def _scale_each(factors: Any) -> optax.GradientTransformation:
    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda update, factor: update * factor, updates, factors)

    return optax.stateless(scale)
