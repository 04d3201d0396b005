# SPDX-License-Identifier: MIT
"""Evaluation of finished runs, and sampling from them. Training does not need this package.

    encoder = common.evaluation.load("RUN")      # in your own code: RGB (N, 3, S, S) in [0, 1] to features (N, D)
    python -m common.evaluation RUN              # linear probe and kNN; --help lists everything else

A run can be of any script: METHOD.py, next to common/, provides what is specific to its method.

    build_encoder(args)     the untrained encoder for a run's settings. It may have stages(), lists of its modules and
                            parameters by depth, and keep_data(state), which copies from a trained encoder's state what
                            is data and not learnt.
    build_generator(args)   optional: an untrained model of images, with tokens(RGB), images(tokens), log_prob(tokens),
                            (N,) in nats, sample(n, temperature, top_k, given, rows, generator) of tokens, and
                            logits(tokens). Raises Refusal if the run has not trained one.
"""
from .. import cli
from . import runs


def load(run, device="cpu"):
    """The encoder of the run in this folder, in eval mode. Its attribute image_size is the S that it was trained at.
    device: as for --device. Raises Refusal if there is no such run."""
    settings, encoder = runs.load_encoder(run, cli.pick_device(device))
    encoder.image_size = settings.image_size
    return encoder
