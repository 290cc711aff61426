"""Our models as a diffusers pipeline, with diffusers' own schedulers and AutoencoderKL.

    from fastdit.weights.pipeline import FastDiTPipeline
    pipe = FastDiTPipeline.from_pretrained(folder)
    pipe(class_labels=[3, 7], num_inference_steps=20).images

diffusers' own DiffusionPipeline opens no pipeline of others: with custom_pipeline=folder it would run a pipeline.py out of the
folder, which it does only under trust_remote_code=True. So no folder of ours holds code, and the class comes from here.
"""

import inspect
import typing
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from fastdit_kernels.reference import REFERENCE
from torch import Tensor

from fastdit.config import DiffusionConfig, ModelConfig
from fastdit.data.normaliser import Normaliser
from fastdit.given import Given
from fastdit.model import DiT
from fastdit.modulations import jump_lengths
from fastdit.runtime.process import ignored
from fastdit.sampling import guided_output, sampling_times

# diffusers finds out how to load a component by these base classes' names in the component's module.
__all__ = ["FastDiTModel", "FastDiTPipeline", "ModelMixin", "scheduler_of"]

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


class FastDiTModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as each of diffusers' own models is
    """A DiT in diffusers' clothes. `model` holds the fields of ModelConfig."""

    @register_to_config
    def __init__(self, model: dict[str, Any]):
        super().__init__()
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in model.items()}
        self.dit = DiT(ModelConfig(**fields), REFERENCE)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor | None = None, jump: float = 0.0
    ) -> Transformer2DModelOutput:
        """x [B, C, rows, columns] at t [B] or one number, labels [B] → `.sample`, fp32; with learned sigma 2·C channels.

        jump: length of the step that follows, in timesteps, for a model that has learnt jumps.
        """
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(len(hidden_states))
        length = torch.full_like(timestep, jump, dtype=torch.float32)
        return Transformer2DModelOutput(sample=self.dit(hidden_states, timestep, class_labels, jump=length))


class FastDiTPipeline(DiffusionPipeline):
    """Pictures from a FastDiTModel, one network evaluation per step unless guidance is asked for.

    vae: None for a model of pixels. steps: evaluations of a picture where a call does not say, as the run sampled.
    normaliser: as normaliser.json has it, of latents normalised per channel; None: by the autoencoder's one scale and shift.
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(
        self,
        transformer: FastDiTModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL,
        steps: int = 20,
        normaliser: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(steps=steps, normaliser=normaliser)
        self._units = None if normaliser is None else Normaliser.from_dict(normaliser).x

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | None = None,
        num_images: int = 1,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image per label; num_images of them from a model without classes.

        The steps lie where `fastdit.sampling.sampling_times` puts them if the scheduler takes a list of times. If not, it puts
        them into the part of the process that those would lie in. guidance_scale: of all channels; DiT's own sampler and
        diffusers' DiTPipeline guide three of four. latents: the noise to start from, [B, C, rows, columns], of deviation 1.
        output_type: pil, np or pt (0 … 1, [B, 3, rows, columns]). Raises ValueError.
        """
        config, device = self.transformer.dit.config, self._execution_device
        if (class_labels is None) == bool(config.num_classes):
            classes = f"has classes 0 … {config.num_classes - 1}: give class_labels" if config.num_classes else "has no classes"
            raise ValueError(f"the model {classes}")
        if class_labels is not None and not all(0 <= label < config.num_classes for label in class_labels):
            raise ValueError(f"class_labels are {class_labels}; the model has classes 0 … {config.num_classes - 1}")
        guided = guidance_scale != 1
        if guided and not config.class_dropout:
            raise ValueError(f"guidance_scale is {guidance_scale}; the model was trained without a null class, so only 1 works")
        y = None if class_labels is None else torch.tensor(class_labels, device=device)
        shape = (num_images if y is None else len(y), config.channels, *config.input_size)
        x = randn_tensor(shape, generator=generator, device=device) if latents is None else latents.to(device)
        if x.shape != shape:
            raise ValueError(f"latents have the shape {tuple(x.shape)}; expected {shape}")
        steps = num_inference_steps or self.config["steps"]
        scheduler: Any = self._scheduler_of(steps, device)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        lengths = jump_lengths(scheduler.timesteps.tolist(), config.jumps)

        def network(x: Tensor, t: Any, given: Given) -> Tensor:
            x = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            return self.transformer(x, t, given.y, jump=lengths[float(t)]).sample

        for t in self.progress_bar(scheduler.timesteps):
            out = guided_output(network, x, t, Given(y), guidance_scale, config.num_classes)
            out = out[:, : config.channels]  # no variance
            x = scheduler.step(self._velocity(out, t, x), t, x).prev_sample
        if self.vae is not None:
            about = self.vae.config
            shift = about.get("shift_factor") or 0.0
            x = x / about.scaling_factor + shift if self._units is None else self._units.physical(x)
            x = self.vae.decode(x.to(self.vae.dtype)).sample
        images: Any = ((x.float() + 1) / 2).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, out: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """What diffusers' flow scheduler steps by, where our network predicts x0; the network's own answer everywhere else."""
        about = self.scheduler.config
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler) or about.get("prediction_type") != "sample":
            return out
        x0 = out.clamp(-1, 1) if about.get("clip_sample") else out
        return (x - x0) / (t / about.num_train_timesteps)

    def _scheduler_of(self, steps: int, device: torch.device) -> SchedulerMixin:
        """The scheduler with its times set: the pipeline's own, or a shortened copy where it takes no list of times."""
        scheduler: Any = self.scheduler
        about, takes = scheduler.config, inspect.signature(scheduler.set_timesteps).parameters
        timesteps, schedule = about.num_train_timesteps, about.get("beta_schedule")
        with ignored("__array", DeprecationWarning):  # diffusers 0.42 hands NumPy a tensor the old way
            if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
                times = sampling_times(DiffusionConfig(kind="flow", timesteps=timesteps), steps)
                scheduler.set_timesteps(sigmas=[t / timesteps for t in times], device=device)
                return scheduler
            if schedule not in typing.get_args(typing.get_type_hints(DiffusionConfig)["beta_schedule"]):
                scheduler.set_timesteps(steps, device=device)
                return scheduler
            process = DiffusionConfig(beta_schedule=schedule, timesteps=timesteps)
            if "timesteps" in takes:
                scheduler.set_timesteps(timesteps=[int(t) for t in sampling_times(process, steps)], device=device)
                return scheduler
            # The end of squaredcos_cap_v2 holds no signal, and an error there is 20,000 times as large in x0: a copy of the
            # scheduler whose process ends where our own sampling starts. Its t count as before.
            end = int(sampling_times(process, 1)[0]) + 1
            copy = type(scheduler).from_config(about, trained_betas=scheduler.betas[:end].tolist(), num_train_timesteps=end)
            copy.set_timesteps(steps, device=device)
            return copy


def scheduler_of(config: DiffusionConfig) -> SchedulerMixin:
    """The diffusers scheduler that samples as sample.py does by default: DPM-Solver++ (2M), or Euler under flow."""
    if config.kind == "flow":
        flow = FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.timesteps)
        if config.prediction == "x0":  # diffusers' flow schedulers know velocities alone: FastDiTPipeline reads this
            flow.register_to_config(prediction_type="sample", clip_sample=config.clip_x0)
        return flow
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=config.timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=PREDICTIONS[config.prediction],
        thresholding=config.clip_x0,  # with sample_max_value 1 it clips predicted x0 to ±1
        # Where DiTPipeline starts, which sets no times: the linear schedule ends at -5.07, squaredcos_cap_v2 at -9.9.
        lambda_min_clipped=-5.1,
    )
    # Read by DDIM and DDPM, should a user change to them; their default would clip latents.
    scheduler.register_to_config(clip_sample=config.clip_x0)
    return scheduler
