"""Train a Diffusion Transformer, or go on where a run of the same name was stopped.

`step` is the training step; `train` is what surrounds it, in the order it happens. All progress is counted in images seen.
"""

import fastdit  # noqa: F401  # isort: skip  before torch
from fastdit import command  # isort: skip

if command.is_program("train", __name__):  # and not after the seconds that torch takes to import
    command.at_once(lambda argv: command.parse_run(argv, "python fastdit/train.py", __doc__ or ""), "starting: loading PyTorch")

import functools
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastdit import consistency, panel, pictures, sampling
from fastdit.checkpoint import Checkpoints
from fastdit.config import Config, UserError, plain
from fastdit.data import classes, encoding, vae
from fastdit.data.manifest import identity, require_same
from fastdit.data.normaliser import Normaliser
from fastdit.diffusion import Drawn, Objective, choose_objective, draw
from fastdit.ema import PostHoc
from fastdit.given import Given
from fastdit.meter import Meter
from fastdit.model import DiT, choose_ops, on_kernels
from fastdit.optim import Optimizer, lr_at
from fastdit.planning import memory
from fastdit.planning.flops import mean_flops_per_image, train_flops_per_image
from fastdit.posthoc import averaged_images
from fastdit.quality import evaluation, references
from fastdit.quality.scores import Judge
from fastdit.runtime import ranks, saved, sharding
from fastdit.runtime.graph import Graphed, graphs
from fastdit.runtime.lock import Lock
from fastdit.runtime.profiler import Profiler
from fastdit.runtime.ranks import World
from fastdit.runtime.resuming import has_worked, open_run, start_run, warn
from fastdit.runtime.run import CONFIG, LOCK, place
from fastdit.runtime.trackers import require_wandb
from fastdit.runtime.validation import fit
from fastdit.tokendrop import drops
from fastdit.weights.start import adopted, build


def main() -> None:
    """torchrun fastdit/train.py [RECIPE | RUN] [--group.field VALUE …]"""

    def parse(argv: Sequence[str]) -> tuple[Config, bool]:
        return command.parse_run(argv, "python fastdit/train.py", __doc__ or "")

    command.run(lambda asked: train(*asked), parse, lambda asked: memory.no_memory(asked[0]))


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
    batch, drawn, jumps = config.train.batch, [], consistency.on(config, images_seen)
    cells = tuple(side // 2 for side in config.model.grid) if drops(config, images_seen) and not jumps else None
    for micro in range(config.train.grad_accum):
        first = images_seen + (micro * world.size + world.rank) * batch  # this rank's images of the micro-step, by number
        x0, y, *beside = pack.batch(first, batch)
        given = Given(y if config.model.num_classes else None, *beside)
        drawn.append(draw(objective, x0, given, config.run.seed, first, jumps, cells))
    if consistency.begins(config, images_seen, optimizer.global_batch):
        optimizer.begin("jump_embedder")
    rates = optimizer.rates(images_seen)
    done = graph(drawn, rates) if graph else update(model, objective, optimizer, drawn, rates)
    optimizer.follow(images_seen + optimizer.global_batch)
    return done


def update(model: DiT, objective: Objective, optimizer: Optimizer, drawn: list[Drawn], rates: Tensor) -> tuple[Tensor, Tensor]:
    """Forward, backward and optimizer on a batch for each micro-step. Reads nothing of the host but these tensors."""
    mean_loss = torch.zeros((), device=rates.device)
    for number, micro in enumerate(drawn, 1):
        sharding.communicate(model, last=number == len(drawn))
        network = model if micro.corners is None else functools.partial(model, corners=micro.corners)
        loss = objective.losses_of(network, micro).mean() / len(drawn)
        loss.backward()
        mean_loss += loss.detach()
    return mean_loss, optimizer.step(rates, mean_loss)


class Run(NamedTuple):
    """The parts of a run, as `train` has set them up."""

    config: Config
    folder: Path
    world: World
    batch: int  # images a step, over all ranks and micro-steps
    pack: encoding.Pack
    model: DiT
    optimizer: Optimizer
    objective: Objective
    checkpoints: Checkpoints
    snapshots: Checkpoints | None  # of post-hoc averages; all are kept
    decoder: vae.VAE | Normaliser | None  # of latents, or of normalised arrays
    judge: Judge | None  # on rank 0 alone
    meter: Meter


def train(config: Config, on_purpose: bool = False) -> int:
    """The whole run, from wherever it stands to its last image. Returns 0, or 128 + the signal that stopped it.

    on_purpose: the user named the run's folder, and what differs from its config.json is meant as a change.
    """
    world = ranks.init(config.parallel)
    config, folder, changed = ranks.once(world, lambda: open_run(config, on_purpose, adopted))
    lock = Lock(folder / LOCK)  # of rank 0
    ranks.once(world, lambda: warn(lock.take()) if (folder / CONFIG).exists() else None)
    choose_ops(config, world.device)  # what cannot be had is said before anything touches the disk
    require_wandb(config.log.wandb)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    batch = config.train.batch * config.train.grad_accum * world.size

    # The data, which say what the network sees.
    pack = ranks.every(world, lambda: encoding.open_pack(config, world))
    config = fit(config, *pack.manifest.fits)
    if not ranks.once(world, lambda: has_worked(folder, config, world.size)):
        ranks.every(world, lambda: memory.require(config, world, pack.manifest.count))
    stop = ranks.Stop(world, timeout)  # not before: whatever comes in the hours of an encoding ends it at once

    # The network, its optimizer and its loss.
    kept = place(folder, config)
    model = build(config, world, start=ranks.once(world, lambda: saved.newest(kept) is None))
    optimizer = Optimizer(model, config.train, batch, kernel=on_kernels(config, world.device))
    objective = choose_objective(config, world.device)

    # Where the run stands.
    checkpoints = Checkpoints(kept, config.log.keep, timeout=timeout, alone=lambda: lock.file is not None)
    images_seen, window = resume(checkpoints, optimizer, pack, batch, folder)
    snapshots = None
    if isinstance(optimizer.ema, PostHoc):
        snapshots = Checkpoints(kept / saved.AVERAGES, sys.maxsize, timeout=timeout)
        snapshots.forget_after(images_seen)

    # What it reports.
    decoder = ranks.every(world, lambda: vae.decoder(config, world.device, pack.manifest.vae_sha256, pack.normaliser))
    scored = config.eval.every_images is not None and world.rank == 0
    judge = ranks.every(world, lambda: references.of(config, world.device) if scored else None)
    ranks.once(world, lambda: start_run(config, folder, changed, images_seen, lock))
    ranks.once(world, lambda: pack.describe(folder))
    flops, parameters = mean_flops_per_image(config), sum(map(torch.numel, model.parameters()))
    meter = Meter(folder, config, world, batch_images=batch, flops_per_image=flops, resumed_images=images_seen)
    meter.restore(window)
    run = Run(config, folder, world, batch, pack, model, optimizer, objective, checkpoints, snapshots, decoder, judge, meter)
    if world.rank == 0:
        panel.show(panel.facts(config, folder, world, pack, parameters, flops, images_seen))
    profiler = Profiler(folder / "profile", 0 if world.rank else config.profile, world.device, meter.say)

    updated = functools.partial(update, model, objective, optimizer)
    graph = Graphed(updated, meter.say, optimizer.captured) if graphs(config.parallel, world) else None
    signalled, tenth = 0, max(1, config.train.images // 10)
    while images_seen < config.train.images and not (signalled := stop.agreed()):
        loss, grad_norm = step(model, objective, optimizer, pack, config, world, images_seen, graph)
        images_seen += batch
        meter.add(loss, grad_norm, config.train.batch * config.train.grad_accum)
        profiler.step(images_seen)

        # Once in a while:
        saving = due(run, images_seen, config.log.save_every or tenth)
        if saving or meter.due(images_seen):  # so that the lines of a resumed run are those of an uninterrupted one
            report(run, images_seen)
        if due(run, images_seen, config.log.sample_every or tenth):
            sample(run, images_seen)
        if config.eval.every_images and due(run, images_seen, config.eval.every_images):
            evaluate(run, images_seen)
        if saving:
            snapshot(run, images_seen)
            save(run, images_seen)

    if signalled and images_seen:
        save(run, images_seen)
    checkpoints.wait()
    profiler.close()
    meter.close()
    pack.close()
    lock.release()
    ranks.shutdown()
    if world.rank == 0:
        end = f"stopped by signal {signalled} at" if signalled else "finished:"
        print(f"{end} {images_seen:,} images, {plain(folder)}", flush=True)
    return 128 + signalled if signalled else 0


# --- once in a while ---


def due(run: Run, images_seen: int, every: int) -> bool:
    """Whether the last step passed a multiple of `every` images, or the run's end."""
    return images_seen // every > (images_seen - run.batch) // every or images_seen >= run.config.train.images


def report(run: Run, images_seen: int) -> None:
    """A line of metrics. Waits for the device. Raises UserError where too many steps in a row were skipped."""
    skipped, in_a_row = map(int, run.optimizer.adamw.skips.tolist())
    if run.config.model.token_drop:
        run.meter.flops_per_image = train_flops_per_image(run.config.model, drops(run.config, images_seen - run.batch))
    run.meter.report(images_seen, lr=lr_at(images_seen, run.config.train), data_wait_s=run.pack.waited(), skipped=skipped)
    if in_a_row >= run.config.train.max_skips:
        run.checkpoints.wait()
        wrong = "a non-finite gradient" + (" or a spike" if run.optimizer.spikes else "")
        raise UserError(
            f"{in_a_row} steps in a row had {wrong}, the last at {images_seen} images; "
            f"the newest checkpoint is kept, and a lower --train.lr may help"
        )


def sample(run: Run, images_seen: int) -> None:
    """A grid of pictures by the averaged weights, from the same noise each time; each rank makes its share."""
    config, world = run.config, run.world
    path = run.folder / "samples" / f"{images_seen:09d}.png"
    share = -(-config.sample.num // world.size)
    with run.meter.paused(), run.optimizer.ema.applied(run.model):
        first = world.rank * share
        given = run.pack.examples(first, share, config.model.num_classes > 0)
        made = sampling.make(run.model, config, run.decoder, world, first=first, count=share, seed=config.run.seed, given=given)
        shares = ranks.gather(world, made)
        if world.rank == 0:
            given = run.pack.examples(0, config.sample.num, config.model.num_classes > 0)
            y = given.y if given else sampling.labels(config, 0, config.sample.num)
            captions = classes.captions(run.pack.manifest.class_names, None if y is None else y.tolist())
            pictures.save(torch.cat(shares)[: config.sample.num], path, captions)
    run.meter.image(images_seen, path)


def evaluate(run: Run, images_seen: int) -> None:
    """The offline metric of pictures by the averaged weights."""
    config = run.config
    with run.meter.paused(), run.optimizer.ema.applied(run.model):
        images = evaluation.make_pictures(run.model, config, run.decoder, run.world, config.eval.num)
        if run.judge is not None:
            figures = evaluation.line(config, images_seen, run.judge, images)
            evaluation.record(run.folder, figures)
            run.meter.say(evaluation.say(figures))
            run.meter.trackers.scalars(images_seen, evaluation.scalars(figures))


def snapshot(run: Run, images_seen: int) -> None:
    """Keep the post-hoc averages for good. On the disk before the checkpoint is, so that a resumed run lacks none."""
    if run.snapshots is not None:
        with run.meter.paused():
            state = {"averaged_images": averaged_images(images_seen, run.batch)}
            run.snapshots.save(images_seen, run.optimizer.ema.saved(), state)
            run.snapshots.wait()


def save(run: Run, images_seen: int) -> None:
    with run.meter.paused():
        state = {"images_seen": images_seen, "global_batch": run.batch, "data": identity(run.pack.manifest)}
        # Where a signal stopped the run between two lines: what the next line has of each rank so far.
        state["window"] = ranks.gather(run.world, run.meter.window.tolist())
        run.checkpoints.save(images_seen, run.optimizer.tensors(), state, weights=run.optimizer.ema.full_tensors())


# --- setting up ---


def resume(
    checkpoints: Checkpoints, optimizer: Optimizer, pack: encoding.Pack, batch: int, folder: Path
) -> tuple[int, list[list[float]]]:
    """Load the newest good checkpoint into the optimizer's tensors, if there is one.

    Returns the images seen, and the meter's window of each rank that saved it.
    """
    images_seen = checkpoints.latest()
    if images_seen is None:
        return 0, []
    state = checkpoints.load(optimizer.tensors())
    sharding.refresh(optimizer.model)
    if state.get("global_batch") != batch:
        raise UserError(
            f"the run has a global batch of {str(state.get('global_batch'))[:20]} images, this command {batch}; "
            f"adjust --train.batch or --train.grad_accum so that batch × grad_accum × ranks stays"
        )
    require_same(state.get("data"), pack.manifest, folder)
    return images_seen, state.get("window", [])


if __name__ == "__main__":
    main()
