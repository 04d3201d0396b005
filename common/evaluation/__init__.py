# SPDX-License-Identifier: MIT
"""What evaluates a finished run, or draws from it. Training needs none of this.

    encoder = common.evaluation.load("RUN")      # in your own code: RGB (N, 3, S, S) in [0, 1] to features (N, D)
    python -m common.evaluation RUN              # linear probe and kNN; --help lists what else there is

It may be a run of any script: METHOD.py, beside common/, offers what is special to its method.

    build_encoder(args)     the encoder, untrained, of a run's settings. stages() of it, if there: lists of its modules
                            and parameters by depth. keep_data(state), if there: takes from a trained encoder's state
                            what is data, not learnt.
    build_generator(args)   if there: a model of images, untrained, with tokens(RGB), images(tokens), log_prob(tokens)
                            (N,) in nats, sample(n, temperature, top_k, given, rows, generator) of tokens, and
                            logits(tokens). Raises Refusal where the run trained none.
"""
from .. import cli
from . import runs


def load(run, device="cpu"):
    """The encoder of the run in this folder, in eval mode, with image_size, the S that it was trained at. device: as
    --device. Raises Refusal where there is none."""
    settings, encoder = runs.load_encoder(run, cli.pick_device(device))
    encoder.image_size = settings.image_size
    return encoder
