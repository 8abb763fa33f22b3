"""The learning rate as a function of the number of steps done."""

import jax
import jax.numpy as jnp
import optax

from mbv2_jax.training.settings import Schedule


def epochs_to_steps(epochs: float, steps_per_epoch: int) -> int:
    """Converts a duration in epochs, which may be a fraction, to whole steps."""
    return round(epochs * steps_per_epoch)


def warmup_steps(settings: Schedule, steps_per_epoch: int) -> int:
    """Returns the number of steps of linear rise at the beginning."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return epochs_to_steps(settings.warmup_epochs, steps_per_epoch)


def schedule(
    settings: Schedule, batch_size: int, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """Returns the learning rate as a function of the number of steps done.

    `step`, `exponential` and `poly` count from the start of training, the warm-up included. `step`
    changes at the ends of epochs (mmengine's MultiStepLR); `exponential` after every decay_epochs,
    rounded to whole steps (TensorFlow's decay_steps with staircase; at 1.0 mmengine's StepLR by
    epoch. timm's --decay-epochs 2.4 waits for the end of the epoch, the third here). `poly` falls
    step by step as (1 - step / total_steps) ** power (torch's PolynomialLR, TensorFlow's
    polynomial_decay). `cosine` falls step by step over the steps after the warm-up. The warm-up
    multiplies the rate, so that it ends without a jump even where the rate decays meanwhile.

    Args:
      settings: the config's section.
      batch_size: the examples of a step, for settings.reference_batch_size.
      steps_per_epoch, total_steps: the lengths of an epoch and of the run.
    """
    base = settings.base_lr
    if settings.reference_batch_size is not None:
        base *= batch_size / settings.reference_batch_size
    warmup = warmup_steps(settings, steps_per_epoch)
    decay_steps = max(1, epochs_to_steps(settings.decay_epochs, steps_per_epoch))

    def learning_rate(step: jax.Array) -> jax.Array:
        epoch = step // steps_per_epoch
        wide = jnp.result_type(float)  # float32, or float64 where jax is set to use it
        if settings.name == "step":
            passed = sum(jnp.where(epoch >= milestone, 1, 0) for milestone in settings.milestones)
            rate = base * jnp.power(settings.factor, jnp.asarray(passed, wide))
        elif settings.name == "exponential":
            rate = base * jnp.power(settings.factor, (step // decay_steps).astype(wide))
        elif settings.name == "poly":
            left = 1.0 - jnp.clip(step / max(1, total_steps), 0.0, 1.0)
            rate = settings.min_lr + (base - settings.min_lr) * jnp.power(left, settings.power)
        elif settings.name == "cosine":
            done = jnp.clip((step - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
            rate = settings.min_lr + (base - settings.min_lr) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        else:
            rate = jnp.asarray(base)
        risen = jnp.clip(step / max(1, warmup), 0.0, 1.0)
        rise = settings.warmup_start + (1.0 - settings.warmup_start) * risen
        return jnp.asarray(rate * (rise if warmup else 1.0), wide)

    return lambda step: learning_rate(jnp.asarray(step))
