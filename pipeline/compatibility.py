"""Rules about which settings can be combined. Imports nothing, so that a wrong config is rejected at once."""

from __future__ import annotations

STEPS = 1000  # timesteps of the discrete schedules
SAMPLERS = ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpm++", "unipc")


def check_noise(schedule: str, prediction: str, zero_terminal_snr: bool, shift: float = 1.0) -> None:
    """Raise ValueError, with the reason, if a noise process cannot be trained or sampled."""
    flow = schedule == "flow"
    if flow != (prediction == "flow"):
        raise ValueError(
            f"schedule {schedule} does not work with prediction {prediction}: use prediction flow with schedule flow,"
            " and epsilon, x0 or v with the discrete schedules"
        )
    if not flow and shift != 1:
        raise ValueError(f"shift = {shift:g} is only for schedule flow: with {schedule} leave it at 1")
    if flow and zero_terminal_snr:
        raise ValueError("zero_terminal_snr does not work with schedule flow, which already ends in pure noise")
    if prediction == "epsilon" and zero_terminal_snr:
        raise ValueError(
            "zero_terminal_snr does not work with prediction epsilon: at pure noise, epsilon is the input itself and"
            " contains no information about the image; use v or x0"
        )


def check_weighting(weighting: str, zero_terminal_snr: bool) -> None:
    """Raise ValueError if the loss weight is 0 at the step where sampling starts."""
    if weighting == "min_snr" and zero_terminal_snr:
        raise ValueError(
            "weighting min_snr does not work with zero_terminal_snr: its weight is 0 at pure noise, where sampling"
            " starts: use plain or learned"
        )


def check_width(width: float, name: str) -> None:
    """Raise ValueError, with the field's `name`, if no power-function average has this standard deviation, which is a
    fraction of the run."""
    if not 0 < width < 0.28:
        raise ValueError(f"{name} = {width:g}: give a width above 0 and below 0.28 for a power-function average")


def check_sampler(
    scheduler: str, schedule: str, *, steps: int, start: float = 1.0, shift: float | None = None, form: str = "cfg"
) -> None:
    """Raise ValueError, naming the field, if a sampler with these settings cannot draw from a model that was trained on
    the noise schedule `schedule`; `form` is that of guidance."""
    if schedule == "flow":
        if scheduler in ("ddpm", "ddim"):
            instead = "euler" if scheduler == "ddim" else "euler_ancestral"
            raise ValueError(
                f"sample.scheduler: {scheduler} cannot sample a model trained on the flow schedule: use {instead},"
                " which is the same for it"
            )
        return
    most = round(start * STEPS)
    if steps > most:
        raise ValueError(
            f"sample.steps = {steps}: a model trained on the {schedule} schedule takes at most {most} steps, one for"
            " each timestep"
        )
    if shift is not None:
        raise ValueError(f"sample.shift = {shift:g} is only for schedule flow: with {schedule} leave it at null")
    if form == "cfg_zero":
        raise ValueError(
            "sample.guidance_form = cfg_zero is only for models trained on the flow schedule: use cfg or apg"
        )


def check_sampler_options(scheduler: str, *, eta: float, form: str) -> None:
    """Raise ValueError if a sampler does not accept `eta` or the form of guidance `form`."""
    if eta and scheduler not in ("ddim", "euler"):
        raise ValueError(f"eta = {eta:g} is only for ddim and euler: with {scheduler} leave it at 0")
    if form == "cfg++" and scheduler in ("heun", "dpm++", "unipc"):
        raise ValueError(
            f"guidance_form = cfg++ does not work with scheduler {scheduler}: use ddim, euler, euler_ancestral or ddpm"
        )


def usable_guidance(requested: float, form: str, *, without_class: float, classes: int) -> tuple[float, str]:
    """Return the guidance scale that a trained model supports, and one line that says why it is not the requested one.

    `classes` is the number of classes, `without_class` the fraction of images that were trained with the null class.
    The line is empty if the requested scale is used. ValueError for scale 0, and for the form cfg++ at any scale, if
    the null class was never trained.
    """
    usable, why = requested, ""
    untrained = "needs the null class, which was never trained (train.label_dropout=0)"
    if without_class == 0 and form == "cfg++":
        raise ValueError(f"sample.guidance_form = cfg++ {untrained}: use cfg")
    if without_class == 1:
        usable, why = 0.0, "no class was ever trained (train.label_dropout=1), so a class has no effect"
    elif classes == 1:
        usable, why = 1.0, "there is only one class, so guidance has no effect"
    elif without_class == 0 and requested == 0:
        raise ValueError(f"sample.guidance = 0: it {untrained}: give 1")
    elif without_class == 0:
        usable, why = 1.0, f"it {untrained}"
    return usable, f"sample.guidance = {usable:g}, not {requested:g}: {why}" if usable != requested else ""
