"""What is on the terminal, or in a log file, while a script trains."""
import math
import time

import torch
import torch.nn.functional as F

from . import Refusal

COLLAPSED = 0.01  # a feature standard deviation below this is one point up to noise
FIRST_LINE, LATER_LINES = 10.0, 60.0  # seconds after the first step, and between lines
LONG = 3 * 3600  # seconds of training after which a run is told of --small


class Progress:
    """The epoch's means, and the lines that show how training goes on: one ten seconds after the first step, one about
    each minute, and one at the end of each epoch.

    Values stay on the device until a line is due, so the loop does not wait for the device each step.
    """

    def __init__(self, run, epochs, steps, batch_size, metrics):
        """steps: of an epoch. metrics: {name: note} of what `update` is given, the note a chance level or ""."""
        self.run, self.epochs, self.steps, self.images = run, epochs, steps, steps * batch_size
        self.metrics = metrics | {"feature_std": ""}
        self.pending, self.sums, self.seconds, self.last = [], [0.0] * len(self.metrics), 0.0, None
        self.read_at = self.line_at = self.first_at = None                    # set by the first step
        self.first_seconds, self.done, self.lines = 0.0, 0, 0                 # of the first step; steps after it

    def state_dict(self):
        self.read()
        return {"sums": self.sums, "seconds": self.seconds}

    def load_state_dict(self, state):
        self.sums, self.seconds = state["sums"], state["seconds"]

    def update(self, epoch, step, h, **values):
        """After a step: h (N, D), the features of its batch, and a scalar tensor for each of the metrics.

        After Ctrl-C or SIGTERM it saves a checkpoint and exits. Raises Refusal where a value is not finite (`read`).
        """
        self.at, values = (epoch, step), {**values, "feature_std": feature_std(h)}
        self.pending.append(torch.stack([values[name].detach().float() for name in self.metrics]))
        if self.first_at is None:
            self.read_at = self.run.since
            self.read()
            self.first_at, self.first_seconds = self.read_at, self.read_at - self.run.since
            # Where nothing is compiled or loaded in it, a slow first step is as slow as the next and said at once.
            like_others = self.run.device.type == "cpu" and not self.run.settings["compile"]
            self.line_at = FIRST_LINE + (self.run.since if like_others else self.first_at)
        else:
            self.done += 1
        now = time.perf_counter()
        if now > self.line_at:
            self.read()
            self.run.say(f"epoch {epoch + 1}/{self.epochs}  step {step + 1}/{self.steps}  {self.text(self.last)}  "
                         f"{self.images / self.steps / self.step_seconds():,.0f} images/s  {clock(self.left())} left")
            if not self.lines:
                self.warn_if_long()
            self.lines, self.line_at = self.lines + 1, now + LATER_LINES
        elif now - self.read_at > 0.5 or step + 1 == self.steps:              # a loss that is not finite is seen soon
            self.read()
        if self.run.stop_requested():
            self.run.stop(epoch, step + 1)

    def read(self):
        """Fetches the pending values. Raises Refusal where one is not finite, before any checkpoint takes it."""
        if not self.pending:
            return
        rows = torch.stack(self.pending).cpu().double().tolist()           # MPS has no float64
        epoch, step = self.at
        for at, row in enumerate(rows, step + 2 - len(rows)):
            if not all(map(math.isfinite, row)):
                kept = f"the last good checkpoint is kept in {self.run.folder}" if self.run.saved() else \
                    "nothing was saved yet"
                raise Refusal(f"the loss is not finite at step {at} of epoch {epoch + 1}: lower --lr ({kept})")
            self.sums = [s + v for s, v in zip(self.sums, row)]
        self.pending, self.last = [], rows[-1]
        now = time.perf_counter()
        self.seconds += now - self.read_at
        self.read_at = now

    def text(self, values):
        words = [f"{name.replace('_', ' ')} {value:.3f}{f' ({note})' if note else ''}"
                 for (name, note), value in zip(self.metrics.items(), values)]
        return "  ".join(words + ["COLLAPSED: all images have one feature"] * (values[-1] < COLLAPSED))

    def step_seconds(self):
        """The mean of the steps that are read but the first, which also compiles and allocates."""
        return (self.read_at - self.first_at) / self.done if self.done else self.first_seconds

    def left(self):
        """Seconds to the end of training, at the speed so far."""
        epoch, step = self.at
        return ((self.epochs - epoch) * self.steps - step - 1) * self.step_seconds()

    def warn_if_long(self):
        """Tells who trains at the defaults of a real data set without a GPU that there is --small."""
        if self.left() > LONG and not self.run.settings["small"] and self.run.settings["dataset"] != "shapes":
            self.run.say(f"At this speed the run takes {self.left() / 3600:,.0f} hours; with --small (smaller images, "
                         f"networks and batches, fewer epochs) it takes about one, for 50,000 images on two CPU cores.")

    def end_epoch(self, epoch, **more):
        """Prints the epoch's means, logs them with whatever more there is, and saves a checkpoint."""
        means = [s / self.steps for s in self.sums]
        self.run.say(f"epoch {epoch + 1}/{self.epochs}  {self.text(means)}  "
                     f"{self.images / max(self.seconds, 1e-9):,.0f} images/s  "
                     f"{clock((self.epochs - epoch - 1) * self.seconds)} left")
        self.run.log(epoch=epoch + 1, **dict(zip(self.metrics, means)), **more, seconds=round(self.seconds, 3))
        self.sums, self.seconds = [0.0] * len(self.metrics), 0.0
        self.run.save(epoch + 1, 0)


def feature_std(h):
    """The standard deviation of unit features: of h (N, D), the root mean square distance of h / |h| from its mean, a
    scalar tensor in [0, 1].

    0 where all images have one direction (collapse), near 1 where directions fill the sphere. sqrt(D) times the mean
    over the dimensions that SimSiam (Chen & He 2020, 2011.10566) plots, if all dimensions vary alike.
    """
    h = F.normalize(h.detach().float(), dim=1)
    return (1 - h.mean(dim=0).square().sum()).clamp(min=0).sqrt()


def clock(seconds):
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
