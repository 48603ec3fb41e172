"""Which choices go together. Imports nothing, so that a config is refused at once, by the rules of the parts."""

from __future__ import annotations

STEPS = 1000  # of the discrete schedules


def check_noise(schedule: str, prediction: str, zero_terminal_snr: bool, shift: float = 1.0) -> None:
    """ValueError, with the reason, when a noise process could not be learnt or sampled."""
    flow = schedule == "flow"
    if flow != (prediction == "flow"):
        raise ValueError(
            f"schedule {schedule} does not go with prediction {prediction}: flow goes with flow alone, the discrete"
            " schedules with epsilon, x0 or v"
        )
    if not flow and shift != 1:
        raise ValueError(
            f"shift = {shift:g} moves the timesteps of schedule flow: {schedule} has its own, leave it at 1"
        )
    if flow and zero_terminal_snr:
        raise ValueError("zero_terminal_snr does not go with schedule flow, which ends in pure noise as it is")
    if prediction == "epsilon" and zero_terminal_snr:
        raise ValueError(
            "zero_terminal_snr does not go with prediction epsilon: where all is noise, epsilon is the input itself"
            " and says nothing of the image; use v or x0"
        )


def check_weighting(weighting: str, zero_terminal_snr: bool) -> None:
    """ValueError when a loss's weights would leave out the step at which sampling begins."""
    if weighting == "min_snr" and zero_terminal_snr:
        raise ValueError(
            "weighting min_snr does not go with zero_terminal_snr: where all is noise, its weight is 0, and there"
            " sampling begins: use plain or learned"
        )


def check_width(width: float, name: str) -> None:
    """ValueError, with the field's `name`, when no power-function average has this standard deviation, a share of the
    run."""
    if not 0 < width < 0.28:
        raise ValueError(f"{name} = {width:g}: a power-function average has a width above 0 and below 0.28")


def check_sampler(scheduler: str, steps: int, schedule: str) -> None:
    """ValueError, naming the field, when `scheduler` cannot draw from a model trained on `schedule` in `steps`."""
    flow = schedule == "flow"
    if flow != (scheduler == "euler"):
        raise ValueError(
            f"sample.scheduler: {scheduler} cannot draw from a model trained on the {schedule} schedule: use"
            f" {'euler' if flow else 'ddpm or ddim'}"
        )
    if not flow and steps > STEPS:
        raise ValueError(
            f"sample.steps = {steps}: {scheduler} takes at most {STEPS} steps, one for each timestep of the model"
        )


def usable_guidance(asked: float, *, without_class: float, classes: int) -> tuple[float, str]:
    """The guidance with which a model of `classes` can be drawn from, of which the share `without_class` of the images
    was trained without one, and why it is not the one `asked`, in one line, or nothing.

    ValueError for the unconditional model where it was never trained.
    """
    usable, why = asked, ""
    if without_class == 1:
        usable, why = 0.0, "no class was ever trained (train.label_dropout=1), so the class asked for says nothing"
    elif classes == 1:
        usable, why = 1.0, "there is one class, from which nothing could be told apart"
    elif without_class == 0 and asked == 0:
        raise ValueError(
            "sample.guidance = 0: the null class, which it draws, was never trained (train.label_dropout=0): give 1"
        )
    elif without_class == 0:
        usable, why = 1.0, "the null class, which it takes, was never trained (train.label_dropout=0)"
    return usable, f"sample.guidance = {usable:g}, not {asked:g}: {why}" if usable != asked else ""
