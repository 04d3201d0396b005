"""What judges a finished run or draws from it. Training needs none of this.

    python -m common.evaluation RUN                                   # linear probe and kNN, on the run's own data set
    python -m common.evaluation RUN --dataset cifar100                # on another: transfer
    python -m common.evaluation RUN --labels 0.01 0.1 --finetune      # with few labels, frozen and fine-tuned
    python -m common.evaluation RUN --ood patterns DIR                # telling what is not of the data set

Any run of any script: the script METHOD.py beside common/ says what is special to its method.

    build_encoder(args)     the encoder, untrained, of a run's settings: RGB (N, 3, S, S) in [0, 1] to features (N, D).
                            stages() of it: lists of its modules and parameters by depth. keep_data(state), if there:
                            takes from a trained encoder's state what is data, not learnt.
    build_generator(args)   if there: a model of images, untrained, with tokens(RGB), images(tokens), log_prob(tokens)
                            (N,) in nats, sample(n, temperature, top_k, given, rows, generator) of tokens, blocks() by
                            depth, and logits(tokens), which runs them. Raises Refusal where the run trained none.
"""
