"""Every field there is, with its unit and its default. Not a recipe: recipes start here.

A field that is None by default is optional: its comment says what None means. Read a recipe beside
this file: it sets all that makes it what it is.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Returns the locked config of defaults."""
    config = ConfigDict()
    config.seed = 0  # of initialisation, data order, augmentation and dropout
    config.batch_size = 256  # examples a step, over all devices and processes together
    config.num_epochs = 300.0  # passes over the training split; may be a fraction
    config.label_smoothing = 0.0  # share of the target spread evenly over the classes, 0 to 1
    # Of the Beta distributions from which each step draws how much of a second image is mixed in
    # (mixup) or pasted in (cutmix); 0: never; both above 0: each step does one of them.
    config.mixup_alpha = 0.0
    config.cutmix_alpha = 0.0
    config.model = _model()
    config.data = _data()
    config.optimizer = _optimizer()
    config.schedule = _schedule()
    config.ema = ConfigDict()
    config.ema.decay = config_dict.placeholder(float)  # per update, e.g. 0.9999; None: no average
    config.ema.every_steps = 1  # steps between two updates of the average
    config.checkpoint = _checkpoint()
    config.log = ConfigDict()
    config.log.every_steps = 50  # steps between two lines of metrics.jsonl
    config.log.eval_every_epochs = 1.0  # epochs between evaluations; the last step evaluates too
    # 'FIRST:LAST': steps, counted from 1, of which to write a profiler's trace; None: none.
    config.profile = config_dict.placeholder(str)
    # Folder, or gs:// address, that keeps what is compiled between runs; '': none; None: in the
    # user's cache ($XDG_CACHE_HOME or ~/.cache, then mbv2_jax/compiled).
    config.compilation_cache = config_dict.placeholder(str)
    config.distributed = ConfigDict()  # of runs with several processes
    config.distributed.initialization_timeout = 300  # seconds that the others may take to appear
    config.distributed.heartbeat_timeout = 100  # seconds of silence after which one counts as dead
    return config.lock()


def _model() -> ConfigDict:
    model = ConfigDict()
    model.width = config_dict.placeholder(float)  # width multiplier; None: the --checkpoint's, or 1
    model.num_classes = config_dict.placeholder(int)  # None: as many as the data has
    # None in the next six: the --checkpoint's, or (without one) the page's.
    model.dropout = config_dict.placeholder(float)  # probability, before the classifier
    model.strides = config_dict.placeholder(tuple)  # of the stem and layer1..layer7
    model.padding = config_dict.placeholder(str)  # 'torch' (symmetric) | 'same' (TensorFlow's)
    model.bn_epsilon = config_dict.placeholder(float)  # added to the variance; torch's is 1e-5
    model.bn_momentum = config_dict.placeholder(float)  # share of the old average kept each step
    # Which examples share statistics in training: 0: the global batch; 'device': each device's
    # share of it; N: each N consecutive ones. Running statistics are the groups' mean. Fastest is
    # 'device', which depends on the number of devices; with 0, or N spanning devices, every layer
    # waits for an exchange between them; N below a device's share moves more bytes.
    model.bn_group_size = config_dict.FieldReference(0, field_type=object)
    model.dtype = "float32"  # of the computation; parameters and statistics stay float32
    model.remat = False  # recompute each block in the backward pass: less memory, more work
    model.frozen_stages = -1  # 0: the stem is frozen; k: layer1..layer<k> too; -1: nothing
    model.norm_eval = False  # train with the running statistics, which then stay as they are
    return model


def _data() -> ConfigDict:
    data = ConfigDict()
    data.source = "imagenet2012"  # a TFDS builder's name, or folder:PATH
    data.data_dir = config_dict.placeholder(str)  # where TFDS keeps its data; None: its default
    data.train_split = "train"  # a split's name, or a part of one: train[:90%]
    data.eval_split = "validation"
    data.image_size = config_dict.placeholder(int)  # pixels; None: the --checkpoint's, or 224
    data.train_transforms = "random_resized_crop(size)|random_flip(0.5)"  # `size` is image_size
    data.eval_transforms = config_dict.placeholder(str)  # None: the --checkpoint's, or the page's
    data.mean = config_dict.placeholder(tuple)  # of R, G, B, 0-255; None: the --checkpoint's, or
    data.std = config_dict.placeholder(tuple)  # ImageNet's; what the network sees is (x-mean)/std
    data.workers = 0  # processes that decode; 0: threads of this process
    data.last_batch = "fill"  # of an epoch: 'fill' up with its first examples | 'drop'
    data.repeats = 1  # times that an epoch's batches hold an example, each augmented anew
    data.train_decode = "exact"  # 'exact' (mmpretrain's pixels) | 'fast' (near them)
    data.corrupt = "raise"  # unreadable training images: 'raise' | 'skip' (counted, reported)
    return data


def _optimizer() -> ConfigDict:
    optimizer = ConfigDict()
    optimizer.name = "sgd"  # 'sgd' (torch's semantics) | 'rmsprop' (TensorFlow's) | 'adamw'
    optimizer.momentum = 0.9  # sgd, rmsprop; 0: none
    optimizer.nesterov = False  # sgd
    optimizer.rms_decay = 0.9  # rmsprop: share of the old mean square kept each step
    optimizer.betas = (0.9, 0.999)  # adamw: shares of the old first and second moment kept
    optimizer.epsilon = 1e-8  # adamw: added to the root; rmsprop: added under it
    optimizer.weight_decay = 0.0  # sgd, rmsprop: added to the gradient (x parameter); adamw: apart
    optimizer.decay_norm = True  # whether BatchNorm's scales and biases decay, too
    optimizer.decay_bias = True  # whether the classifier's bias does
    optimizer.clip_norm = config_dict.placeholder(float)  # largest global gradient norm; None: any
    # ((regular expression, factor), ...): the first that matches a parameter's path from its
    # beginning ('classifier/bias', 'layer7_0/expand/conv/kernel') scales its learning rate.
    optimizer.lr_multipliers = ()
    return optimizer


def _schedule() -> ConfigDict:
    schedule = ConfigDict()
    schedule.name = "constant"  # 'constant' | 'step' | 'exponential' | 'cosine'
    schedule.base_lr = 0.045  # learning rate, for a batch of reference_batch_size
    # lr = base_lr * batch_size / reference_batch_size; None: base_lr whatever the batch.
    schedule.reference_batch_size = config_dict.placeholder(int)
    schedule.warmup_epochs = 0.0  # epochs of linear rise before the schedule proper
    schedule.warmup_start = 0.0  # share of the learning rate at step 0 of the warm-up
    schedule.milestones = ()  # step: epochs after which the rate is multiplied by factor
    schedule.factor = 1.0  # step: at each milestone; exponential: after every decay_epochs
    schedule.decay_epochs = 1.0  # exponential: epochs between two falls; may be a fraction
    schedule.min_lr = 0.0  # cosine: the rate at the end
    return schedule


def _checkpoint() -> ConfigDict:
    checkpoint = ConfigDict()
    checkpoint.every_epochs = 1.0  # epochs between two checkpoints; the last step is saved too
    checkpoint.every_steps = config_dict.placeholder(int)  # steps; None: every_epochs decides
    checkpoint.keep_last = 3  # how many of the newest are kept
    checkpoint.keep_best = 1  # how many of the best by best_metric are kept besides
    checkpoint.best_metric = "top1"  # of the evaluation: 'top1' | 'top5' | 'loss'
    return checkpoint
