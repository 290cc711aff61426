"""From a trained network to pictures: sample and decode. Picture n of a seed is the same on any number of ranks."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastdit.config import Config, DiffusionConfig
from fastdit.data.vae import VAE
from fastdit.diffusion import schedule
from fastdit.model import DiT
from fastdit.runtime import rng
from fastdit.runtime.ranks import World

# Half the natural log of the signal-to-noise ratio where sampling starts. squaredcos_cap_v2 ends at -9.9: there an error in
# epsilon is 20,000 times as large in x0, and a network good to 2 % ruins an unclipped sample. At -4.5 it is 90 times as large,
# and the signal that pure noise stands in for is 1.1 % of x0's amplitude (at the linear schedule's own end it is 0.6 %).
START_LOG_SNR = -4.5

FEW = 8  # steps of a schedule that a network which has learnt jumps takes as jumps
MODULATION_BYTES = 256 << 20  # of modulation computed at once


def compiled(model: DiT, device: torch.device) -> DiT:
    """The model, compiled in place for batches of one size: by a GPU's graphs as a whole, by a CPU block by block.

    A GPU then launches one graph a step, where a small batch would wait for each kernel's launch. The first step takes long.
    """
    if device.type == "cuda":
        model.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)
    else:
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
    return model


def labels(config: Config, first: int, count: int, label: int | None = None) -> Tensor | None:
    """The classes of pictures first … first + count - 1: each in turn, or all `label`; None without classes. int64 [count]"""
    if not config.model.num_classes:
        return None
    numbers = torch.arange(first, first + count)
    return numbers % config.model.num_classes if label is None else torch.full_like(numbers, label)


class Modulations:
    """The modulation of a schedule of sampling times, looked up by time; for labels y [B] on the CPU, None: no classes.

    Modulation depends on the time and the class alone. So one product computes it for many steps and for each class that
    occurs, and reads the projection's weights once; at batch 1 they are a third of the weights that each step would read again.
    """

    def __init__(self, model: DiT, times: list[float], y: Tensor | None, batch: int, device: torch.device):
        self.model, self.times, self.device = model, times, device
        self.lengths = jump_lengths(times, model.config.jumps)
        self.classes: Tensor | None = None
        row = torch.zeros(batch, dtype=torch.int64)
        if y is not None:
            self.classes, row = y.unique(return_inverse=True)
        self.num_classes = 1 if self.classes is None else len(self.classes)
        self.row = row.to(device)
        self.together = max(1, MODULATION_BYTES // (self.num_classes * model.adaLN_modulation.out_features * 4))
        self.known: dict[float, Tensor] = {}  # time → [num_classes, 6·L + 2, D]

    def at(self, time: float) -> Tensor:
        """[B, 6·L + 2, D]. A time outside the schedule is computed on its own."""
        if time not in self.known:
            i = self.times.index(time) if time in self.times else None
            self._compute([time] if i is None else self.times[i : i + self.together])
        return self.known[time].index_select(0, self.row)

    def _compute(self, times: list[float]) -> None:
        t = torch.tensor(times, device=self.device).repeat_interleave(self.num_classes)
        y = None if self.classes is None else self.classes.to(self.device).repeat(len(times))
        lengths = [self.lengths.get(time, 0.0) for time in times]
        jump = torch.tensor(lengths, device=self.device).repeat_interleave(self.num_classes)
        modulation = self.model.condition(t, y, jump).view(len(times), self.num_classes, -1, self.model.config.width)
        self.known = dict(zip(times, modulation, strict=True))


def make(
    model: DiT,
    config: Config,
    vae: VAE | None,
    world: World,
    *,
    first: int,
    count: int,
    seed: int,
    label: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Pictures first … first + count - 1, uint8 [count, C, rows, columns] on the CPU, in config.sample.steps forwards."""
    # What FSDP gathers it keeps for training, which cannot use what was made in inference mode.
    with torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode():
        y = labels(config, first, count, label)
        modulations = ahead(model, config, y, count, world.device)
        x0 = x0_of(model, config, y, modulations, first, count, seed, on_step)
        images = to_uint8(x0 if vae is None else vae.decode(x0))
    return images.clone()  # an ordinary tensor


def ahead(model: DiT, config: Config, y: Tensor | None, count: int, device: torch.device) -> Modulations:
    """The modulation that sampling `count` pictures of labels y will ask for; with guidance for the null class too."""
    guided = config.sample.guidance != 1 and y is not None
    evaluated = torch.cat([y, torch.full_like(y, config.model.num_classes)]) if guided and y is not None else y
    times = sampling_times(config.diffusion, config.sample.steps)
    return Modulations(model, times, evaluated, count * (1 + guided), device)


def x0_of(
    model: DiT,
    config: Config,
    y: Tensor | None,
    modulations: Modulations,
    first: int,
    count: int,
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """sample() as a run's config says: x0 [count, C, rows, columns] fp32, pixels or latents."""
    m, s = config.model, config.sample
    return sample(
        model,
        config.diffusion,
        (count, m.channels, *m.input_size),
        None if y is None else y.to(modulations.device),
        sampler=s.sampler,
        steps=s.steps,
        guidance=s.guidance,
        guidance_interval=s.guidance_interval,
        seed=seed,
        first=first,
        device=modulations.device,
        null_class=m.num_classes if m.class_dropout else None,
        learn_sigma=m.learn_sigma,
        modulation=modulations.at,
        jumps=m.jumps,
        on_step=None if on_step is None else lambda step, _: on_step(step),
    )


def sampling_times(config: DiffusionConfig, steps: int) -> list[float]:
    """The t of each network evaluation, descending, in training steps; whole numbers under DDPM.

    Flow: evenly from timesteps down to timesteps / steps. DDPM: quadratic, as in arXiv 2010.02502 §D.2, from START_LOG_SNR on,
    since detail is decided at small t. On a mixture of Gaussians with the exact predictor, 20 steps under squaredcos_cap_v2 end
    at Wasserstein-1 0.0026 from the data by dpm++ (even spacing 0.0198), 0.0227 by ddim (0.0266), 0.038 by ddpm (0.040).
    """
    if config.kind == "flow":
        return [config.timesteps * (steps - i) / steps for i in range(steps)]
    if steps > config.timesteps:
        raise ValueError(f"{steps} steps are more than the {config.timesteps} the process has")
    alphas_cumprod = schedule(config)[1].double()
    log_snr = 0.5 * (alphas_cumprod / (1 - alphas_cumprod)).log()
    start = max(int((log_snr >= START_LOG_SNR).sum()) - 1, 0)
    times: list[int] = []
    for i in range(1, steps + 1):
        times.append(max(round(start * (i / steps) ** 2), times[-1] + 1 if times else 0))
    # Many steps fill the low end one by one; those of a short process may have to end above the start.
    return [float(t) for t in reversed(times)]


def jump_lengths(times: list[float], jumps: bool) -> dict[float, float]:
    """The length of the step from each time, as the network is given it: 0 in a longer schedule, which follows plain flow."""
    few = jumps and len(times) <= FEW
    return {t: t - after if few else 0.0 for t, after in itertools.pairwise([*times, 0.0])}


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    config: DiffusionConfig,
    shape: tuple[int, ...],
    y: Tensor | None = None,
    *,
    sampler: str = "auto",
    steps: int = 20,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    first: int = 0,
    device: torch.device | str = "cpu",
    null_class: int | None = None,
    learn_sigma: bool = False,
    modulation: Callable[[float], Tensor] | None = None,
    jumps: bool = False,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Images first … first + B - 1 of a seed: x0 [B, C, *size] fp32, in `steps` forwards.

    sampler: ddpm (ancestral), ddim or dpm++ (2M, arXiv 2211.01095), euler under flow; auto is dpm++ or euler. guidance other
    than 1 runs the forwards at t inside guidance_interval of the process (arXiv 2404.07724) on twice the batch, the
    second half with null_class; the others run on the batch alone. modulation: what the model's `condition` returns at a time.
    on_step gets the number of forwards done and the x0 they predict. Image n is the same whatever batch or rank makes it.
    Raises ValueError for what does not go together.
    """
    device = torch.device(device)
    if sampler == "auto":
        sampler = "euler" if config.kind == "flow" else "dpm++"
    if sampler not in (("euler",) if config.kind == "flow" else ("ddpm", "ddim", "dpm++")):
        raise ValueError(
            f"sampler {sampler!r} does not sample {config.kind}; euler samples flow, ddpm, ddim and dpm++ sample ddpm"
        )
    if guidance != 1 and (y is None or null_class is None):
        raise ValueError(f"guidance {guidance:g} needs labels and a null class")
    B, C = shape[:2]
    times = sampling_times(config, steps)
    lengths = jump_lengths(times, jumps)
    to_x0 = _x0_from_prediction(config, times)

    def network(x: Tensor, time: float, y: Tensor | None) -> Tensor:
        t = torch.full((len(x),), time, device=x.device)
        if modulation is None:
            given = {"jump": torch.full_like(t, lengths[time])} if jumps else {}
            return model(x, t, y, **given).float()
        out = model(x, t, y, modulation=modulation(time)[: len(x)])  # the labelled half where a step is not guided
        return out.float().clone()  # a graph's output lasts until its next run, a solver's history longer

    advance = _solver(
        config, sampler, times, learn_sigma, [rng.generator(device, seed, "ancestral noise", first + n) for n in range(B)]
    )
    x = rng.normal(tuple(shape[1:]), seed, "sample noise", first, B, device)
    for i, time in enumerate(times):
        guided = guidance_interval[0] <= time / config.timesteps <= guidance_interval[1]
        out = guided_output(network, x, time, y, guidance if guided else 1, null_class)
        if out.shape[1] != (2 * C if learn_sigma else C):
            raise ValueError(f"the network returned {out.shape[1]} channels; expected {2 * C if learn_sigma else C}")
        prediction, variance = out[:, :C], out[:, C:]
        x0 = to_x0(i, x, prediction)
        if config.clip_x0:
            x0 = x0.clamp(-1, 1)
        if on_step is not None:
            on_step(i + 1, x0)
        if i + 1 < steps:
            x = advance(i, torch.cat([x0, variance], dim=1) if learn_sigma and sampler == "ddpm" else x0, x)
    return x0  # every solver's last step goes to t = 0 without noise, which is x0 itself


def guided_output(
    network: Callable[[Tensor, float, Tensor | None], Tensor],
    x: Tensor,
    time: float,
    y: Tensor | None,
    guidance: float,
    null_class: int | None,
) -> Tensor:
    """The network's output for x [B, C, *size] with classifier-free guidance, of all C channels.

    DiT's own sampler guides the first three of its four latent channels. Outputs at scale 4 then differ by 17 %.
    """
    if guidance == 1:
        return network(x, time, y)
    assert y is not None
    assert null_class is not None
    C = x.shape[1]
    labelled, unlabelled = network(torch.cat([x, x]), time, torch.cat([y, torch.full_like(y, null_class)])).chunk(2)
    guided = unlabelled[:, :C] + guidance * (labelled[:, :C] - unlabelled[:, :C])
    return torch.cat([guided, labelled[:, C:]], dim=1)  # guidance is about the mean; the variance stays the labelled one's


def _x0_from_prediction(config: DiffusionConfig, times: list[float]) -> Callable[[int, Tensor, Tensor], Tensor]:
    """The function of (step, x_t, prediction) that returns x0. Its coefficients are host numbers: no step reads the device."""
    if config.prediction == "x0":
        return lambda i, x, x0: x0
    if config.kind == "flow":
        return lambda i, x, velocity: x - times[i] / config.timesteps * velocity
    alphas_cumprod = schedule(config)[1].double()[[int(t) for t in times]]
    signal, noise_level = alphas_cumprod.sqrt().tolist(), (1 - alphas_cumprod).sqrt().tolist()
    if config.prediction == "epsilon":
        return lambda i, x, eps: (x - noise_level[i] * eps) / signal[i]
    return lambda i, x, v: signal[i] * x - noise_level[i] * v


def _solver(
    config: DiffusionConfig, sampler: str, times: list[float], learn_sigma: bool, generators: list[torch.Generator]
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """The function of (step, x0, x_t) that returns x at the next step's t. Under ddpm x0 may carry the variance's channels."""
    if sampler == "euler":  # x moves along the straight line through x_t and x0
        return lambda i, x0, x: x0 + times[i + 1] / times[i] * (x - x0)
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    # They are handed x0, not what the network predicts: one clipping rule for all (dpm++ has none of its own).
    given: dict[str, Any] = {
        "num_train_timesteps": config.timesteps,
        "beta_schedule": config.beta_schedule,
        "prediction_type": "sample",
    }
    whole = [int(t) for t in times]
    if sampler == "ddpm":
        ddpm: Any = DDPMScheduler(**given, clip_sample=False, variance_type="learned_range" if learn_sigma else "fixed_small")
        ddpm.set_timesteps(timesteps=whole)
        return lambda i, x0, x: ddpm.step(x0, whole[i], x, generator=generators).prev_sample
    # DDIM is DPM-Solver++ of order 1 (arXiv 2211.01095, §4). DDIMScheduler itself always jumps by timesteps // steps, which is
    # wrong for any spacing but an even one.
    solver: Any = DPMSolverMultistepScheduler(**given, solver_order=2 if sampler == "dpm++" else 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # diffusers 0.42 hands NumPy a tensor the old way
        solver.set_timesteps(timesteps=whole)
    solver.set_begin_index(0)
    return lambda i, x0, x: solver.step(x0, whole[i], x).prev_sample


def to_uint8(images: Tensor) -> Tensor:
    """Images of about [-1, 1], clipped to it, as uint8 on the CPU: [B, 3, H, W], grey ones [B, 1, H, W] with equal channels."""
    found = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    return found.expand(-1, 3, -1, -1) if images.shape[1] == 1 else found
