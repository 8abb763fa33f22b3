"""The learning-rate schedule and the optax chain of a config."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mbv2_jax.data.loader import epochs_to_steps
from mbv2_jax.models import mobilenet_v2


def schedule(config: ConfigDict, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of steps done.

    `step` and `exponential` are counted from the start of training, the warm-up included. `step`
    changes at the ends of epochs (mmengine's MultiStepLR); `exponential` after every decay_epochs,
    rounded to whole steps (TensorFlow's decay_steps with staircase; at 1.0 mmengine's StepLR by
    epoch. timm's --decay-epochs 2.4 waits for the end of the epoch, the third here). `cosine` falls
    step by step over what the warm-up leaves. The warm-up multiplies, so that a rate that decays
    meanwhile is joined without a jump.
    """
    c = config.schedule
    base = c.base_lr
    if c.reference_batch_size is not None:
        base *= config.batch_size / c.reference_batch_size
    warmup = epochs_to_steps(c.warmup_epochs, steps_per_epoch)
    decay_steps = max(1, epochs_to_steps(c.decay_epochs, steps_per_epoch))

    def learning_rate(step: jax.Array) -> jax.Array:
        epoch = step // steps_per_epoch
        wide = jnp.result_type(float)  # float32, or float64 where jax computes in it
        if c.name == "step":
            passed = sum(jnp.where(epoch >= milestone, 1, 0) for milestone in c.milestones)
            rate = base * jnp.power(c.factor, jnp.asarray(passed, wide))
        elif c.name == "exponential":
            rate = base * jnp.power(c.factor, (step // decay_steps).astype(wide))
        elif c.name == "cosine":
            done = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
            rate = c.min_lr + (base - c.min_lr) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        else:
            rate = jnp.asarray(base)
        risen = jnp.clip(step / max(1, warmup), 0.0, 1.0)
        rise = c.warmup_start + (1.0 - c.warmup_start) * risen
        return jnp.asarray(rate * (rise if warmup else 1.0), wide)

    return lambda step: learning_rate(jnp.asarray(step))


def create(config: ConfigDict, rate: optax.Schedule, params: Any) -> optax.GradientTransformation:
    """Returns the optimizer of a config.

    Args:
      config: the run's config; `optimizer` and `model.frozen_stages` are read.
      rate: from `schedule`.
      params: the network's parameters, or their shapes: what is decayed, scaled and frozen is
        decided by name.
    """
    c = config.optimizer

    def decayed(tree: Any) -> Any:
        def of(path: Any, leaf: Any) -> bool:
            if leaf.ndim > 1:  # kernels; norms and biases are vectors
                return True
            return c.decay_bias if path[0].key == "classifier" else c.decay_norm

        return jax.tree_util.tree_map_with_path(of, tree)

    decay = optax.add_decayed_weights(c.weight_decay, mask=decayed)
    descend = optax.scale_by_learning_rate(rate)
    nesterov = c.nesterov and c.name == "sgd"
    momentum = optax.trace(c.momentum, nesterov=nesterov) if c.momentum else optax.identity()
    if c.name == "sgd":
        # torch's: the decay joins the gradient before the momentum, the rate comes after both.
        steps = [decay, momentum, descend]
    elif c.name == "rmsprop":
        # TensorFlow's, as the paper's: mean squares start at one, epsilon is under the root, and
        # the rate is inside the momentum.
        rms = optax.scale_by_rms(c.rms_decay, c.epsilon, initial_scale=1.0, eps_in_sqrt=True)
        steps = [decay, rms, descend, momentum]
    else:
        steps = [optax.scale_by_adam(*c.betas, eps=c.epsilon), decay, descend]
    if c.clip_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(c.clip_norm))
    chain = optax.chain(*steps)
    trained = mobilenet_v2.trainable(params, config.model.frozen_stages)
    if not all(jax.tree.leaves(trained)):
        # Without gradient a parameter would still decay: what is frozen is kept out of the chain.
        labels = jax.tree.map(lambda yes: "trained" if yes else "frozen", trained)
        chain = optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)
    if c.lr_multipliers:
        chain = optax.chain(chain, _scale_each(multipliers(params, c.lr_multipliers)))
    return chain


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
