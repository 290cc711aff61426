"""Train a Diffusion Transformer, or go on where a run of the same name was stopped.

`step` is the training step; `train` is what surrounds it, in the order it happens. All progress is counted in images seen.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from fastdit_kernels.attention import eager, sdpa
from fastdit_kernels.cpu import CPU
from fastdit_kernels.reference import REFERENCE
from torch import Tensor

from fastdit import command, pictures, sampling
from fastdit import config as configs
from fastdit.checkpoint import Checkpoints, newest
from fastdit.config import Config, RankError, UserError
from fastdit.data import encoding, vae
from fastdit.diffusion import Drawn, Objective, choose_objective, draw
from fastdit.meter import Meter, summary
from fastdit.model import DiT, choose_ops, on_kernels, residual_dtype, train_flops_per_image
from fastdit.optim import Optimizer, lr_at
from fastdit.planning import memory as footprint
from fastdit.quality import evaluation, references
from fastdit.quality.scores import Judge
from fastdit.runtime import ranks, sharding
from fastdit.runtime.files import write_text
from fastdit.runtime.graph import Graphed, graphs
from fastdit.runtime.hardware import has_bf16, peak_tflops, precision
from fastdit.runtime.profiler import Profiler
from fastdit.runtime.ranks import World
from fastdit.runtime.trackers import require_wandb
from fastdit.weights.folder import locate
from fastdit.weights.start import adopt, start_from


def main() -> None:
    """torchrun fastdit/train.py [RECIPE] [--group.field VALUE …]"""
    rank = int(os.environ.get("RANK", 0))
    description = (__doc__ or "").partition("\n")[0]

    def run() -> int:
        return train(command.parse(sys.argv[1:], "torchrun fastdit/train.py", description))

    command.exit_cleanly(lambda: ranks.as_one(run), rank)


def step(
    model: DiT,
    objective: Objective,
    optimizer: Optimizer,
    pack: encoding.Pack,
    config: Config,
    world: World,
    images_seen: int,
    graph: Graphed | None = None,
) -> tuple[Tensor, Tensor]:
    """One optimizer step on the global batch that follows `images_seen`. Returns this rank's mean loss and the gradient norm.

    Nothing here waits for the device: both results stay on it. `graph` is `update` as one CUDA graph.
    """
    batch, drawn = config.train.batch, []
    for micro in range(config.train.grad_accum):
        first = images_seen + (micro * world.size + world.rank) * batch  # this rank's images of the micro-step, by number
        x0, y = pack.batch(first, batch)
        drawn.append(draw(objective, x0, y if config.model.num_classes else None, config.run.seed, first))
    rates = optimizer.rates(images_seen)
    return graph(drawn, rates) if graph else update(model, objective, optimizer, drawn, rates)


def update(model: DiT, objective: Objective, optimizer: Optimizer, drawn: list[Drawn], rates: Tensor) -> tuple[Tensor, Tensor]:
    """Forward, backward and optimizer on a batch for each micro-step. Reads nothing of the host but these tensors."""
    mean_loss = torch.zeros((), device=rates.device)
    for number, micro in enumerate(drawn, 1):
        sharding.communicate(model, last=number == len(drawn))
        loss = objective.losses_of(model, micro).mean() / len(drawn)
        loss.backward()
        mean_loss += loss.detach()
    return mean_loss, optimizer.step(rates, mean_loss)


def says_what_fits(train: Callable[[Config], int]) -> Callable[[Config], int]:
    """Make memory running out, wherever in a run, a RankError that says which batch would do."""

    @functools.wraps(train)
    def explained(config: Config) -> int:
        try:
            return train(config)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
                raise
        # Beyond the except clause, so that what the step held is free again.
        t, ranks = config.train, config.parallel.shard or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        half = next((t.batch // n for n in range(2, t.batch) if t.batch % n == 0), 1)
        line = f"out of memory at --train.batch {t.batch}"
        if t.batch > 1:
            line += f"; --train.batch {half} --train.grad_accum {t.grad_accum * t.batch // half} trains the same in less"
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            line += f" ({footprint.advice(config, ranks, total)})"
        elif not config.parallel.checkpoint_activations:
            line += ", and --parallel.checkpoint_activations needs less too"
        raise RankError(line)

    return explained


@says_what_fits
def train(config: Config) -> int:
    """The whole run, from wherever it stands to its last image. Returns 0, or 128 + the signal that stopped it."""
    world = ranks.init(config.parallel)
    config, folder = ranks.once(world, lambda: open_run(config))
    choose_ops(config, world.device)  # what cannot be had is said before anything touches the disk
    require_wandb(config.log.wandb)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    batch = config.train.batch * config.train.grad_accum * world.size

    pack = ranks.every(world, lambda: encoding.open_pack(config, world))
    stop = ranks.Stop(world, timeout)  # not before: whatever comes in the hours of an encoding ends it at once
    model = build(config, world, start=ranks.once(world, lambda: newest(folder) is None))
    optimizer = Optimizer(model, config.train, batch, kernel=on_kernels(config, world.device))
    objective = choose_objective(config, world.device)

    checkpoints = Checkpoints(folder / "checkpoints", config.log.keep, timeout=timeout)
    images_seen = resume(checkpoints, optimizer, batch)
    autoencoder = ranks.every(world, lambda: vae.load(config.data, world.device)) if config.data.vae else None
    judge = ranks.every(world, lambda: open_judge(config, world)) if config.eval.every_images else None
    ranks.once(world, lambda: start_run(config, folder))
    meter = Meter(
        folder,
        config.log,
        total_images=config.train.images,
        batch_images=batch,
        flops_per_image=train_flops_per_image(config.model),
        device=world.device,
        rank=world.rank,
        world=world.size,
        local_world=world.local_size,
        resumed_images=images_seen,
        settings=dataclasses.asdict(config),
    )
    describe(config, world, pack, model, images_seen, folder)
    profiler = Profiler(folder / "profile", 0 if world.rank else config.profile, world.device, meter.say)

    def sample() -> None:
        with meter.paused(), optimizer.ema.applied(model):
            path = sample_grid(model, config, autoencoder, world, folder / "samples" / f"{images_seen:09d}.png")
        meter.image(images_seen, path)

    def evaluate() -> None:
        with meter.paused(), optimizer.ema.applied(model):
            images = evaluation.make_pictures(model, config, autoencoder, world, config.eval.num)
            if judge is not None:
                found = evaluation.line(config, images_seen, judge, images)
                evaluation.record(folder, found)
                meter.say(evaluation.say(found))
                meter.trackers.scalars(images_seen, evaluation.scalars(found))

    def save() -> None:
        with meter.paused():
            state = {"images_seen": images_seen, "global_batch": batch}
            checkpoints.save(images_seen, optimizer.tensors(), state, weights=optimizer.ema.full_tensors())

    graph = None
    if graphs(config.parallel, world):
        graph = Graphed(functools.partial(update, model, objective, optimizer), meter.say, optimizer.captured)
    signalled, waited = 0, 0.0
    while images_seen < config.train.images and not (signalled := stop.agreed()):
        loss, grad_norm = step(model, objective, optimizer, pack, config, world, images_seen, graph)
        before, images_seen = images_seen, images_seen + batch
        meter.add(loss, grad_norm, config.train.batch * config.train.grad_accum)
        profiler.step(images_seen)
        done = images_seen >= config.train.images
        saving = done or crosses(before, images_seen, config.log.save_every or config.train.images // 10)
        # A line ends at each save too, so that the lines of a resumed run are those of an uninterrupted one.
        if saving or meter.due(images_seen):
            skipped, in_a_row = map(int, optimizer.adamw.skips.tolist())  # waits for the device, as the line does
            lr, data_wait_s, waited = lr_at(images_seen, config.train), pack.waited_s - waited, pack.waited_s
            meter.report(images_seen, lr=lr, data_wait_s=data_wait_s, skipped=skipped)
            if in_a_row >= config.train.max_skips:
                checkpoints.wait()
                raise UserError(
                    f"{in_a_row} steps in a row had a non-finite gradient{' or a spike' if optimizer.spikes else ''}, "
                    f"the last at {images_seen} images; "
                    f"the newest checkpoint is kept, and a lower --train.lr may help"
                )
        if done or crosses(before, images_seen, config.log.sample_every or config.train.images // 10):
            sample()
        if config.eval.every_images and (done or crosses(before, images_seen, config.eval.every_images)):
            evaluate()
        if saving:
            save()
    if signalled and images_seen:
        save()
    checkpoints.wait()
    profiler.close()
    meter.close()
    pack.close()
    ranks.shutdown()
    if world.rank == 0:
        print(
            f"stopped by signal {signalled} at" if signalled else "finished:", f"{images_seen:,} images, {folder}", flush=True
        )
    return 128 + signalled if signalled else 0


def describe(config: Config, world: World, pack: encoding.Pack, model: DiT, images_seen: int, folder: Path) -> None:
    """What is about to run, once, before it does."""
    if world.rank:
        return
    t, seen = config.train, pack.manifest
    gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if gpu else "CPU"
    chosen = choose_ops(config, world.device)
    numbers = precision(config.parallel.precision, world.device)
    if not has_bf16(world.device):
        numbers += (
            " (no bf16 in this device)" if numbers == "fp32" else " (not in this device's instructions: fp32 is much faster)"
        )
    summary(
        recipe=config.run.name,
        folder=folder,
        devices=f"{world.size} × {name}" + ("" if gpu else f" ({torch.get_num_threads()} threads each)"),
        parameters=sum(p.numel() for p in model.parameters()),
        flops_per_image=train_flops_per_image(config.model),
        batch=t.batch,
        world=world.size,
        grad_accum=t.grad_accum,
        total_images=t.images,
        dataset=f"{seen.count:,} images, {seen.num_classes} classes, {'resident' if pack.resident else 'read ahead from disk'}",
        kernels={REFERENCE.ln_modulate: "PyTorch reference", CPU.ln_modulate: "PyTorch"}.get(chosen.ln_modulate, "Triton"),
        attention="eager" if chosen.attention is eager else "SDPA" if chosen.attention is sdpa else "flash-attn",
        precision=numbers + (", compiled" if sharding.compiles(config.parallel, world.device) else ""),
        peak=peak_tflops(name, config.log.peak_tflops),
        resumed_images=images_seen,
    )


def crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` images lies in (before, after]."""
    return after // max(every, 1) > before // max(every, 1)


# Settings a resumed run may change: where and how it runs, not what it computes. The batch may be split otherwise as long as
# its product with the ranks stays; `resume` checks that.
FREE: tuple[str, ...] = ("run.name", "run.folder", "run.fresh", "log.", "parallel.", "sample.", "eval.", "kernels", "attention")
FREE += ("profile", "data.packs", "data.device_gib", "data.max_bad", "train.batch", "train.grad_accum", "train.max_skips")


def open_run(config: Config) -> tuple[Config, Path]:
    """The run's folder, new or made before by the same config, and the config with its final name. Rank 0 alone calls this.

    Changes nothing on the disk.
    """
    root = Path(config.run.folder)
    folder = root / config.run.name
    number = 2
    while config.run.fresh and folder.exists():
        folder, number = root / f"{config.run.name}-{number}", number + 1
    for path in (folder, *(sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ())):
        if path.is_symlink():
            raise UserError(f"{path} is a symbolic link; a run folder and what is in it must be its own")
    config = configs.replace(config, run={"name": folder.name, "fresh": False})
    config = with_start(config, folder / "config.json")
    if (folder / "config.json").exists():
        free = FREE if config.train.lr_decay == "cosine" else (*FREE, "train.images")  # a cosine ends at the last image
        changed = [d for d in configs.differences(config, configs.load(folder / "config.json")) if not d.startswith(free)]
        if changed:
            raise UserError(
                f"{folder} holds a run of another config ({'; '.join(changed)}); start anew with --run.name or --run.fresh"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no config.json; choose another --run.name")
    return config, folder


def with_start(config: Config, saved: Path) -> Config:
    """The config with what the model that it starts from decides: a new run's source says it, a begun run's config.json."""
    if saved.exists():
        run = configs.load(saved)
        if run.train.init_from and config.train.init_from in ("", run.train.init_from):
            config = adopt(config, run.model, run.train.init_from)
            return configs.replace(config, train={"init_from": run.train.init_from})
    elif config.train.init_from:
        return adopt(config, locate(config.train.init_from).config.model, config.train.init_from)
    return config


def start_run(config: Config, folder: Path) -> None:
    """Make the run's folder, once all that a config can get wrong has gone right. Rank 0 alone calls this."""
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "config.json", configs.to_json(config)
    if not path.exists() or path.read_text() != text:
        write_text(path, text)


def resume(checkpoints: Checkpoints, optimizer: Optimizer, batch: int) -> int:
    """Load the newest good checkpoint into the optimizer's tensors, if there is one. Returns the images seen."""
    images_seen = checkpoints.latest()
    if images_seen is None:
        return 0
    before = checkpoints.load(optimizer.tensors()).get("global_batch")
    sharding.refresh(optimizer.model)
    if before != batch:
        raise UserError(
            f"the run has a global batch of {str(before)[:20]} images, this command {batch}; "
            f"adjust --train.batch or --train.grad_accum so that batch × grad_accum × ranks stays"
        )
    return images_seen


def open_judge(config: Config, world: World) -> Judge | None:
    """What scores the run's pictures, on rank 0 alone."""
    return None if world.rank else references.open_judge(config, config.eval.num, world.device, config.eval.reference)


def sample_grid(model: DiT, config: Config, autoencoder: vae.VAE | None, world: World, path: Path) -> Path:
    """Each rank makes its share of --sample.num pictures, from the same noise each time; rank 0 writes them as one PNG."""
    share = -(-config.sample.num // world.size)
    images = sampling.make(model, config, autoencoder, world, first=world.rank * share, count=share, seed=config.run.seed)
    shares = ranks.gather(world, images)
    if world.rank == 0:
        pictures.save_grid(torch.cat(shares)[: config.sample.num], path)
    return path


def build(config: Config, world: World, start: bool = True) -> DiT:
    """The model on its starting weights, compiled and sharded. start: read --train.init_from, since no checkpoint follows."""
    with torch.device("meta"):
        model = DiT(
            config.model,
            choose_ops(config, world.device),
            residual=residual_dtype(config),
        )
    sharding.checkpoint(model, config.parallel)
    sharding.compile(model, config.parallel, world.device)
    sharding.shard(model, config.parallel, world)
    model.init_weights(config.run.seed)
    if config.train.init_from and start:
        said = ranks.every(world, lambda: start_from(model, config.train.init_from, config))
        if world.rank == 0:
            print(said, flush=True)
    return model


if __name__ == "__main__":
    main()
