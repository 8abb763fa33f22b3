"""The recipes' schedules against those of the peers that they follow."""

import numpy as np
import torch

from tests.support import peers
from tests.support.recipes import rates, recipe


def test_torchvisions_schedule_is_theirs_at_the_beginning_of_each_epoch():
    """Their rate is constant within an epoch; the two calls are those of its train.py."""
    config = recipe("mobilenet_v2_torchvision_v2")
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.5)
    rise = torch.optim.lr_scheduler.LinearLR(sgd, start_factor=0.01, total_iters=5)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=600 - 5)
    scheduler = torch.optim.lr_scheduler.SequentialLR(sgd, [rise, fall], milestones=[5])
    theirs = []
    for _ in range(600):
        theirs.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    # float64; theirs is a product of 600 factors.
    np.testing.assert_allclose(rates(config, 1251 * np.arange(600)), theirs, rtol=1e-9)
    # It is never far from theirs: within the first epoch the rate rises by a fifth of 0.5.
    assert rates(config, [1250])[0] < theirs[1]


def test_timms_schedule_is_theirs_at_the_beginning_of_each_epoch_after_the_warm_up():
    peers.timm()
    from timm.scheduler import StepLRScheduler

    config = recipe("mobilenet_v2_timm_ra")
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.048)
    # The flag --warmup-prefix came later; train.py leaves it off.
    scheduler = StepLRScheduler(
        sgd, 2.4, 0.97, warmup_t=3, warmup_lr_init=1e-6, warmup_prefix=False
    )
    theirs = []
    for epoch in range(450):
        scheduler.step(epoch)
        theirs.append(sgd.param_groups[0]["lr"])
    ours = rates(config, 1668 * np.arange(450))
    np.testing.assert_allclose(ours[3:], theirs[3:], rtol=1e-12)
    # Within the warm-up ours falls once, 2.4 epochs after its beginning, later than these three.
    np.testing.assert_allclose(ours[:3], theirs[:3], rtol=1e-12)
