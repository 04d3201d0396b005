# SPDX-License-Identifier: MIT
"""What a script prints, logs and plots while it trains."""
import math
import threading
import time

import torch

from . import pictures
from .linear_probe import WhitenedPixels, feature_std, features, knn, rankme, uniformity

COLLAPSED = 0.01  # a feature standard deviation below this means a single point, up to noise
FIRST_LINE, LATER_LINES = 10.0, 60.0  # seconds after the first step, and between lines
LONG = 3 * 3600  # seconds of training beyond which --small is recommended
SHARE = 0.05  # of the training time, at most, that the monitor takes


class Progress:
    """The means over an epoch, and the lines that report progress: one ten seconds after the first step, one about
    every minute, and one at the end of each epoch. Values stay on the device for at least half a second, so that the
    loop does not wait for the device in every step."""

    def __init__(self, run, epochs, steps, batch_size, metrics):
        """steps: per epoch. metrics: {name: note} for the values passed to `update`; a note is "" or ends in the chance
        level."""
        self.run, self.epochs, self.steps, self.images = run, epochs, steps, steps * batch_size
        self.metrics, self.monitor = metrics | {"feature_std": ""}, None
        self.pending, self.sums, self.seconds, self.last = [], [0.0] * len(self.metrics), 0.0, None
        self.read_at = self.line_at = self.first_at = None                    # set in the first step
        self.done, self.said, self.trained = 0, False, 0.0                    # steps after the first; hint; seconds
        self.timer = threading.Timer(FIRST_LINE, self.recommend_small, (
            f"The first step has not ended after {FIRST_LINE:g} s; if all take as long, the run takes more than",
            FIRST_LINE * epochs * steps))
        self.timer.daemon = True                                              # ends with the program

    @property
    def typical(self):
        """Whether a slow first step is typical of all, as nothing is compiled or loaded in it."""
        return self.run.device.type == "cpu" and not self.run.settings["compile"]

    def begin(self):
        """To be called before the first step, during which, if it takes minutes, --small is recommended already."""
        if self.typical and not self.run.resumed:                             # a resumed run cannot take --small
            self.timer.start()

    def recommend_small(self, text, seconds):
        """Prints the text, the hours and --small, unless the run is short enough, has it, or this was said."""
        small = self.run.settings["small"] or self.run.settings["dataset"] == "shapes"
        if seconds > LONG and not small and not self.said:
            self.run.say(f"{text} {seconds / 3600:,.0f} hours; with --small (smaller images, networks and batches, "
                         f"fewer epochs) it takes about one, or up to two on a CPU without bf16, for 50,000 images on "
                         f"two cores.")
            self.said = True

    def state_dict(self):
        self.read()
        return {"sums": self.sums, "seconds": self.seconds}

    def load_state_dict(self, state):
        self.sums, self.seconds = state["sums"], state["seconds"]

    def now(self):
        """The time in seconds, without the time that the monitor has taken."""
        return time.perf_counter() - (self.monitor.seconds if self.monitor else 0.0)

    def update(self, epoch, step, h, **values):
        """To be called after each step, with h (N, D), the features of its batch, and a scalar tensor for each metric.

        After Ctrl-C or SIGTERM it saves a checkpoint and exits. Raises Refusal if a value is not finite (`read`).
        """
        self.at, values = (epoch, step), {**values, "feature_std": feature_std(h)}
        self.pending.append(torch.stack([values[name].detach().float() for name in self.metrics]))
        if self.first_at is None:
            self.timer.cancel()
            self.read_at = self.run.since
            self.read()
            self.first_at = self.read_at
            self.line_at = FIRST_LINE + (self.run.since if self.typical else self.first_at)
        else:
            self.done += 1
        now = self.now()
        if now > self.line_at:
            self.read()
            # Seconds per step, of all that have been read except the first, which also compiles and allocates.
            seconds = (self.read_at - self.first_at) / self.done if self.done else self.first_at - self.run.since
            left = ((self.epochs - epoch) * self.steps - step - 1) * seconds
            self.run.say(f"epoch {epoch + 1}/{self.epochs}  step {step + 1}/{self.steps}  {self.text(self.last)}  "
                         f"{self.images / self.steps / seconds:,.0f} images/s  {clock(left)} left")
            self.recommend_small("At this speed the run takes", left)
            self.said, self.line_at = True, now + LATER_LINES
        elif now - self.read_at > 0.5 or step + 1 == self.steps:              # so a bad loss is soon noticed
            self.read()
        if self.run.stop_requested():
            self.run.stop(epoch, step + 1)

    def read(self):
        """Fetches the pending values. Raises Refusal if one is not finite, before it can reach a checkpoint."""
        if not self.pending:
            return
        rows = torch.stack(self.pending).cpu().double().tolist()              # MPS has no float64
        epoch, step = self.at
        for at, row in enumerate(rows, step + 2 - len(rows)):                 # up to step + 1, as users count from 1
            if not all(map(math.isfinite, row)):
                raise self.run.not_finite(f"the loss is not finite at step {at} of epoch {epoch + 1}")
            self.sums = [s + v for s, v in zip(self.sums, row)]
        self.pending, self.last, now = [], rows[-1], self.now()
        self.seconds, self.read_at = self.seconds + now - self.read_at, now

    def text(self, values):
        words = [f"{name.replace('_', ' ')} {value:.3f}{f' ({note})' if note else ''}"
                 for (name, note), value in zip(self.metrics.items(), values)]
        return "  ".join(words + ["COLLAPSED: all images have one feature"] * (values[-1] < COLLAPSED))

    def end_epoch(self, epoch, **more):
        """Prints the means of the epoch, logs them and the values in `more`, draws curve.png and saves a checkpoint."""
        means, words = [s / self.steps for s in self.sums], ""
        self.trained += self.seconds
        if self.monitor and (epoch + 1 == self.epochs or self.monitor.due(epoch + 1, self.trained)):
            more |= self.monitor.judge()
            words = "kNN {trained:.1f} % (pixels {pixels:.1f}, untrained {untrained:.1f})  ".format(**self.monitor.knn)
        self.run.say(f"epoch {epoch + 1}/{self.epochs}  {self.text(means)}  {words}"
                     f"{self.images / max(self.seconds, 1e-9):,.0f} images/s  "
                     f"{clock((self.epochs - epoch - 1) * self.seconds)} left")
        self.run.log(epoch=epoch + 1, **dict(zip(self.metrics, means)), **more, seconds=round(self.seconds, 3))
        self.sums, self.seconds = [0.0] * len(self.metrics), 0.0
        self.run.write("curve.png", self.draw)
        self.run.save(epoch + 1, 0)

    def draw(self, path):
        """Plots each loss with its chance level, and kNN with its baselines, over the epochs in the log."""
        def points(name, scale=1):
            return [(entry["epoch"], scale * entry[name]) for entry in self.run.history if name in entry]
        panels = [(f"{name} by epoch", points(name), {"chance": float(note.split()[-1])} if note else {})
                  for name, note in self.metrics.items() if name != "feature_std"]
        if self.monitor and self.monitor.knn:
            levels = {"whitened pixels": self.monitor.knn["pixels"], "untrained encoder": self.monitor.knn["untrained"]}
            knn = [(0, levels["untrained encoder"]), *points("knn", 100)]
            panels.append(("kNN on test images by epoch, %", knn, levels))
        pictures.plot(path, *panels)


class Monitor:
    """Evaluates the encoder during training: kNN accuracy and its two baselines, on at most 10,000 labelled and 2,000
    test images (the table at the end uses all images). It draws no random numbers, so the weights of a run are bitwise
    the same with and without it."""

    def __init__(self, images, encoders, autocast, every=None):
        """images: `data.Data` with labels. encoders: {"untrained": Module, "trained": Module}; "pixels" is added once
        it is fitted. every: number of epochs, or None: as often as the `SHARE` of the time allows."""
        self.parts = [(part, part.random_indices(most).sort().values)
                      for part, most in ((images.labelled, 10_000), (images.test, 2_000))]
        self.encoders, self.autocast, self.every, self.knn = encoders, autocast, every, {}    # {row: percent}
        self.seconds, self.cost = 0.0, 0.0                                    # in all; for one encoder

    def due(self, epoch, trained):
        """Whether to evaluate now, after this number of epochs and seconds of training."""
        return epoch % self.every == 0 if self.every else self.seconds + self.cost <= SHARE * trained

    def judge(self):
        """{"knn": accuracy, "uniformity": , "rankme": } of the current encoder. The first call adds the baselines."""
        start, rows = time.perf_counter(), ("trained",) if self.knn else ("pixels", "untrained", "trained")
        if not self.knn:
            self.encoders["pixels"] = WhitenedPixels(self.parts[0][0])
        y, test_y = (part.labels[index.to(part.device)] for part, index in self.parts)
        for row in rows:
            x, test_x = (features(self.encoders[row], part, self.autocast, index=index) for part, index in self.parts)
            accuracy = knn(x, y, test_x, test_y)
            self.knn[row] = 100 * accuracy
        found = {"knn": accuracy, "uniformity": uniformity(test_x).item(), "rankme": rankme(test_x).item()}
        taken = time.perf_counter() - start
        self.seconds, self.cost = self.seconds + taken, taken / len(rows)
        return found


def clock(seconds):
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
