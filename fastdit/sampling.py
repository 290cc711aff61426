"""From a trained network to pictures: sample and decode. Picture n of a seed is the same on any number of ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastdit.config import Config, DiffusionConfig
from fastdit.data.normaliser import Normaliser
from fastdit.data.vae import VAE
from fastdit.diffusion import schedule
from fastdit.embeddings import within
from fastdit.given import Given, check
from fastdit.model import DiT
from fastdit.modulations import Modulations, jump_lengths
from fastdit.runtime import rng
from fastdit.runtime.process import ignored
from fastdit.runtime.ranks import World

# Half the natural log of the signal-to-noise ratio where sampling starts. squaredcos_cap_v2 ends at -9.9: there an error in
# epsilon is 20,000 times as large in x0, and a network good to 2 % ruins an unclipped sample. At -4.5 it is 90 times as large,
# and the signal that pure noise stands in for is 1.1 % of x0's amplitude (at the linear schedule's own end it is 0.6 %).
START_LOG_SNR = -4.5


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


def make(
    model: DiT,
    config: Config,
    decoder: VAE | Normaliser | None,
    world: World,
    *,
    first: int,
    count: int,
    seed: int,
    label: int | None = None,
    given: Given | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Pictures first … first + count - 1, uint8 [count, C, rows, columns] on the CPU, in config.sample.steps forwards.

    Of a model of arrays: fp32 [count, C, *size] in the normaliser's physical units, 0 beyond each length. given: classes,
    conditions in physical units and lengths of these samples, instead of label. Raises UserError where they do not fit.
    """
    # What FSDP gathers it keeps for training, which cannot use what was made in inference mode.
    with torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode():
        given = prepared(given or Given(labels(config, first, count, label)), config, decoder, count)
        modulations = ahead(model, config, given, count, world.device)
        made = decoded(x0_of(model, config, given, modulations, first, count, seed, on_step), given, decoder)
        made = made.cpu() if config.data.kind == "arrays" else to_uint8(made)
    return made.clone()  # an ordinary tensor


def prepared(given: Given, config: Config, decoder: VAE | Normaliser | None, count: int) -> Given:
    """What a user gave, as the network takes it: checked, and its condition normalised. Raises UserError."""
    check(given, config.model, count)
    if isinstance(decoder, Normaliser) and decoder.condition is not None and given.condition is not None:
        return given._replace(condition=decoder.condition.normalise(given.condition))
    return given


def decoded(x0: Tensor, given: Given, decoder: VAE | Normaliser | None) -> Tensor:
    """x0 [B, C, *size] as pixels of about [-1, 1], or in physical units; what is beyond a sample's length is 0."""
    if isinstance(decoder, VAE):
        return decoder.decode(x0)
    x0 = x0 if decoder is None else decoder.x.physical(x0)
    return x0 if given.length is None else torch.where(within(x0, given.length.to(x0.device)), x0, 0)


def ahead(model: DiT, config: Config, given: Given, count: int, device: torch.device) -> Modulations:
    """The modulation that sampling `count` pictures of what is given will ask for; with guidance for the null class too."""
    guided = config.sample.guidance != 1 and given.told(config.model.num_classes) is not None
    times = sampling_times(config.diffusion, config.sample.steps)
    evaluated = given.twice(config.model.num_classes) if guided else given
    return Modulations(model, times, evaluated, count * (1 + guided), device)


def x0_of(
    model: DiT,
    config: Config,
    given: Given,
    modulations: Modulations,
    first: int,
    count: int,
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """sample() as a run's config says: x0 [count, C, rows, columns] fp32, pixels or latents."""
    m, s = config.model, config.sample
    y, condition, length = given.each(lambda part: part.to(modulations.device))
    return sample(
        model,
        config.diffusion,
        (count, m.channels, *m.input_size),
        y,
        condition=condition,
        length=length,
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


@torch.no_grad()
def sample(
    model: Callable[..., Tensor],
    config: DiffusionConfig,
    shape: tuple[int, ...],
    y: Tensor | None = None,
    *,
    condition: Tensor | None = None,
    length: Tensor | None = None,
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
    than 1 runs the forwards at t inside guidance_interval of the process (arXiv 2404.07724) on twice the batch, the second half
    with null_class and the null condition; the others run on the batch alone. modulation: what the model's `condition` returns
    at a time. on_step gets the number of forwards done and the x0 they predict. Image n is the same whatever batch or rank
    makes it. y, condition and length: as given.py has them.
    Raises ValueError for what does not go together.
    """
    device = torch.device(device)
    if sampler == "auto":
        sampler = "euler" if config.kind == "flow" else "dpm++"
    if sampler not in (("euler",) if config.kind == "flow" else ("ddpm", "ddim", "dpm++")):
        raise ValueError(
            f"sampler {sampler!r} does not sample {config.kind}; euler samples flow, ddpm, ddim and dpm++ sample ddpm"
        )
    given = Given(y, condition, length)
    if guidance != 1 and (null_class is None or (y is None and condition is None)):
        raise ValueError(f"guidance {guidance:g} needs labels or conditions, and a null class")
    B, C = shape[:2]
    times = sampling_times(config, steps)
    lengths = jump_lengths(times, jumps)
    to_x0 = _x0_from_prediction(config, times)

    def network(x: Tensor, time: float, given: Given) -> Tensor:
        t = torch.full((len(x),), time, device=x.device)
        if modulation is None:
            of_jump = {"jump": torch.full_like(t, lengths[time])} if jumps else {}
            return model(x, t, given.y, **given.beside, **of_jump).float()
        # Of the modulation the labelled half where a step is not guided.
        of_length = {} if given.length is None else {"length": given.length}
        out = model(x, t, given.y, modulation=modulation(time)[: len(x)], **of_length)
        return out.float().clone()  # a graph's output lasts until its next run, a solver's history longer

    advance = _solver(
        config, sampler, times, learn_sigma, [rng.generator(device, seed, "ancestral noise", first + n) for n in range(B)]
    )
    x = rng.normal(tuple(shape[1:]), seed, "sample noise", first, B, device)
    for i, time in enumerate(times):
        guided = guidance_interval[0] <= time / config.timesteps <= guidance_interval[1]
        out = guided_output(network, x, time, given, guidance if guided else 1, null_class)
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
    network: Callable[[Tensor, float, Given], Tensor],
    x: Tensor,
    time: float,
    given: Given,
    guidance: float,
    null_class: int | None,
) -> Tensor:
    """The network's output for x [B, C, *size] with classifier-free guidance, of all C channels.

    DiT's own sampler guides the first three of its four latent channels. Outputs at scale 4 then differ by 17 %.
    """
    if guidance == 1:
        return network(x, time, given)
    assert null_class is not None
    C = x.shape[1]
    labelled, unlabelled = network(torch.cat([x, x]), time, given.twice(null_class)).chunk(2)
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
    with ignored("__array", DeprecationWarning):  # diffusers 0.42 hands NumPy a tensor the old way
        solver.set_timesteps(timesteps=whole)
    solver.set_begin_index(0)
    return lambda i, x0, x: solver.step(x0, whole[i], x).prev_sample


def to_uint8(images: Tensor) -> Tensor:
    """Images of about [-1, 1], clipped to it, as uint8 on the CPU: [B, 3, H, W], grey ones [B, 1, H, W] with equal channels."""
    found = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    return found.expand(-1, 3, -1, -1) if images.shape[1] == 1 else found
