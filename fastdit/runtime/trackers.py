"""Curves and sample grids in a browser: TensorBoard where it is installed, Weights & Biases where a project is named."""

import importlib.util
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastdit.config import UserError, plain


def require_wandb(project: str | None) -> None:
    """Raise UserError where a project is named and the package is missing. Every rank asks, so that none waits for rank 0."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError("--log.wandb needs the wandb package: pip install 'fastdit[track]'")


class Trackers:
    """Both, either or none. settings are the run's, which Weights & Biases keeps with it; its key stays in the environment.

    TensorBoard was not asked for, so one that is installed but broken costs a line by `say`, and not the run.
    """

    def __init__(
        self,
        folder: Path,
        project: str | None,
        resumed_images: int,
        settings: Mapping[str, Any],
        say: Callable[[str], None] = print,
    ):
        self.tensorboard = None
        try:
            self.tensorboard = _tensorboard(folder, resumed_images)
        except Exception as error:  # whatever its own imports raise
            say(f"no TensorBoard: {type(error).__name__}: {plain(error, 200)}")
        self.wandb = _wandb(folder, project, settings) if project else None

    def scalars(self, images_seen: int, values: Mapping[str, float]) -> None:
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, images_seen)
        if self.wandb is not None:
            self.wandb.log({"images": images_seen, **values})

    def image(self, images_seen: int, path: Path) -> None:
        if self.tensorboard is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as grid:
                self.tensorboard.add_image("samples", np.asarray(grid.convert("RGB")), images_seen, dataformats="HWC")
        if self.wandb is not None:
            import wandb

            self.wandb.log({"images": images_seen, "samples": wandb.Image(str(path))})

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _tensorboard(folder: Path, resumed_images: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resumed_images + 1)  # hides what a killed run logged beyond its checkpoint


def _wandb(folder: Path, project: str, settings: Mapping[str, Any]) -> Any:
    import wandb

    id_file = folder / "wandb.id"  # a resumed run goes on where it was
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8), encoding="utf-8")
    try:
        run = wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            config=dict(settings),
        )
    except wandb.Error as error:
        raise UserError(f"--log.wandb {project}: {str(error).splitlines()[0]}") from None
    run.define_metric("*", step_metric="images")
    return run
