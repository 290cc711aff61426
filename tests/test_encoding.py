"""Encoding: latents exact to bf16 rounding, the same bytes on any number of ranks and after any kill, bad input in one line."""

import fcntl
import hashlib
import io
import itertools
import json
import os
import resource
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdit.config import Config, UserError, replace
from fastdit.data import chunks, encoding, images
from fastdit.data import pack as packs
from fastdit.data.decode import TRANSFORMS
from fastdit.encode import report
from fastdit.recipes import RECIPES
from fastdit.runtime.ranks import World
from fastdit.runtime.validation import fit

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
NUM = 43


def quiet(line: str) -> None:
    pass


def picture(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    """43 pictures of 16×24 in 3 classes; images 7 and 30 are no pictures."""
    for n in range(NUM):
        file = tmp_path / "pictures" / f"class{n * 3 // NUM}" / f"{n:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        out = io.BytesIO()
        Image.fromarray(picture(n)).save(out, "PNG")
        file.write_bytes(b"damaged" if n in (7, 30) else out.getvalue())
    return tmp_path / "pictures"


GOOD = [n for n in range(NUM) if n not in (7, 30)]


@pytest.fixture
def config(folder, tmp_path) -> Config:
    data = {"path": str(folder), "image_size": (16, 24), "packs": str(tmp_path / "packs"), "max_bad": 0.1}
    return replace(RECIPES["cats"], data=data, model={"input_size": (16, 24), "num_classes": 3})


@pytest.fixture
def latent_config(config, tmp_path) -> Config:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(
        **blocks, block_out_channels=[8, 16], norm_num_groups=4, latent_channels=3, scaling_factor=0.5, shift_factor=0.125
    ).save_pretrained(tmp_path / "vae")
    return replace(config, data={"vae": str(tmp_path / "vae")}, model={"input_size": (8, 12)})


def encode(config: Config, chunk: int, kill_at: int = -1, kill_rank: int = 0) -> tuple[str, int]:
    """As one rank: encode in small chunks, dying by SIGKILL at the n-th step of writing. → hash of the data, chunks encoded."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world = World(rank, size, rank, size, torch.device("cpu")) if torch.distributed.is_initialized() else ALONE
    steps, encoded = itertools.count(), []

    def step() -> None:
        if next(steps) == kill_at and rank == kill_rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def writing(path, blocks, sync=True):
        def stepping():
            for block in blocks:
                step()
                yield block[: len(block) // 2]
                step()
                yield block[len(block) // 2 :]

        step()
        write(path, stepping(), sync)
        encoded.append(path.suffix == ".bin" and path.stem.isdigit())

    with pytest.MonkeyPatch.context() as patch:
        write = chunks.write
        patch.setattr(chunks, "CHUNK", chunk)
        patch.setattr(chunks, "write", writing)
        path = encoding.ensure(config, world, quiet)
    return hashlib.sha256((path / "data.bin").read_bytes()).hexdigest(), sum(encoded)


# --- what is written ---


def test_pixels_are_packed_as_they_are(config):
    path = encoding.ensure(config, ALONE, quiet)
    manifest = packs.verify(path)
    assert (manifest.count, manifest.shape, manifest.dtype) == (41, [3, 16, 24], "uint8")
    assert manifest.class_names == ["class0", "class1", "class2"]
    reason = "not an image in a known format"
    assert manifest.skipped == [["class0/07.png", reason], ["class2/30.png", reason]]
    truth = np.stack([picture(n) for n in GOOD]).transpose(0, 3, 1, 2)
    labels = np.array([n * 3 // NUM for n in GOOD], np.int64)
    assert (path / "data.bin").read_bytes() == truth.tobytes() + labels.tobytes()
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing is left beside it


def test_latents_of_both_flips_are_exact_to_bf16_rounding(latent_config):
    path = encoding.ensure(latent_config, ALONE, quiet)
    manifest = packs.verify(path)
    assert (manifest.count, manifest.shape, manifest.dtype) == (41, [2, 6, 8, 12], "bfloat16")
    assert (manifest.scale, manifest.shift, manifest.image_shape) == (0.5, 0.125, (3, 8, 12))
    rows = torch.frombuffer(bytearray((path / "data.bin").read_bytes()[: 41 * manifest.row_bytes]), dtype=torch.bfloat16)
    images = torch.from_numpy(np.stack([picture(n) for n in GOOD])).permute(0, 3, 1, 2).double() / 127.5 - 1
    autoencoder = AutoencoderKL.from_pretrained(latent_config.data.vae, low_cpu_mem_usage=False).double()
    with torch.no_grad():
        truth = torch.stack([autoencoder.encode(x).latent_dist.parameters for x in (images, images.flip(-1))], dim=1)
    half_ulp = torch.ldexp(torch.ones_like(truth), truth.frexp().exponent - 9)  # bf16 keeps 8 bits
    error = (rows.view(truth.shape).double() - truth).abs()
    assert (error <= half_ulp + 1e-6 * truth.abs().max()).all()


def test_a_batch_of_an_encoded_pack_is_what_the_autoencoder_says(latent_config):
    pack = encoding.open_pack(latent_config, ALONE, quiet)
    assert pack.stride == latent_config.train.batch
    x0, y, *_ = pack.batch(0, 41)
    assert x0.shape == (41, 3, 8, 12)
    assert sorted(y.tolist()) == sorted(n * 3 // NUM for n in GOOD)


def test_the_second_time_nothing_is_encoded(config, monkeypatch):
    path = encoding.ensure(config, ALONE, quiet)
    monkeypatch.setattr(encoding, "encode", None)
    assert encoding.ensure(config, ALONE, quiet) == path


def test_progress_and_log_tell_what_happens(config, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 10)
    lines, seen = [], []
    path = encoding.ensure(config, ALONE, lines.append, lambda *progress: seen.append(progress))
    assert seen == [(10, 43, 1), (20, 43, 1), (30, 43, 1), (40, 43, 2), (43, 43, 2)]
    assert lines[0].startswith("encoding ")
    assert lines[0].endswith(f"into {path}; 0 of 5 chunks are there already")
    assert lines[-1].startswith("encoded 41 images in ")
    assert lines[-1].endswith("2 skipped")


def grey(folder: Path, but: int = -1) -> None:
    """Make the good pictures grey, each in a mode of its own, but one."""
    for n in GOOD:
        (file,) = folder.glob(f"*/{n:02d}.png")
        pixels = np.dstack([picture(n)[..., 0]] * 3)
        pixels[3, 4, 2] ^= n == but
        Image.fromarray(pixels if n % 2 or n == but else pixels[..., 0]).save(file)


def test_grey_pictures_keep_one_channel(config, folder):
    grey(folder)
    path = encoding.ensure(config, ALONE, quiet)
    manifest = packs.verify(path)
    assert (manifest.count, manifest.shape, manifest.image_shape) == (41, [1, 16, 24], (1, 16, 24))
    truth = np.stack([picture(n)[..., 0] for n in GOOD])
    assert (path / "data.bin").read_bytes()[: truth.nbytes] == truth.tobytes()
    assert encoding.open_pack(config, ALONE, quiet).batch(0, 5).x0.shape == (5, 1, 16, 24)
    assert fit(config, manifest.image_shape, manifest.num_classes).model.channels == 1


def test_one_coloured_pixel_is_a_picture_in_colour(config, folder):
    grey(folder, but=21)
    assert packs.verify(encoding.ensure(config, ALONE, quiet)).shape == [3, 16, 24]


def test_grey_pictures_have_the_latents_they_always_had(latent_config, folder):
    grey(folder)
    assert packs.verify(encoding.ensure(latent_config, ALONE, quiet)).shape == [2, 6, 8, 12]


def test_the_manifest_says_how_pictures_were_cropped(config):
    said = {
        crop: packs.read_manifest(encoding.ensure(replace(config, data={"crop": crop}), ALONE, quiet)).transform
        for crop in TRANSFORMS
    }
    assert said == TRANSFORMS
    assert len({encoding.folder(replace(config, data={"crop": crop}).data) for crop in TRANSFORMS}) == 3


def test_drawn_cats_are_packed_alike_whatever_the_crop(tmp_path):
    packed = set()
    for crop in TRANSFORMS:
        data = {"crop": crop, "num_images": 40, "packs": str(tmp_path / crop)}
        path = encoding.ensure(replace(RECIPES["cats"], data=data), ALONE, quiet)
        packed.add((path.name, *((path / name).read_bytes() for name in ("data.bin", "manifest.json"))))
    assert len(packed) == 1


def test_a_pack_may_be_the_path(config, tmp_path):
    path = encoding.ensure(config, ALONE, quiet)
    own = replace(config, data={"path": str(path), "packs": str(tmp_path / "none")})
    assert encoding.ensure(own, ALONE, quiet) == path
    for name in ("manifest.json", "data.bin"):
        (path / name).chmod(0o444)
    read = list(images.open_images(own.data).read(0, 99))
    assert [e.label for e in read] == [n * 3 // NUM for n in GOOD]
    for n, example in zip(GOOD, read, strict=True):
        np.testing.assert_array_equal(example.image, picture(n))
    with pytest.raises(UserError, match=r"holds pixels, and --data\.vae is tiny"):
        encoding.ensure(replace(own, data={"vae": "tiny"}), ALONE, quiet)
    assert not (tmp_path / "none").exists()


def test_a_pack_of_latents_needs_its_vae(latent_config):
    path = encoding.ensure(latent_config, ALONE, quiet)
    own = replace(latent_config, data={"path": str(path)})
    assert encoding.ensure(own, ALONE, quiet) == path
    with pytest.raises(UserError, match=r"holds latents of .*vae; name it by --data\.vae"):
        encoding.ensure(replace(own, data={"vae": ""}), ALONE, quiet)
    with pytest.raises(UserError, match=r"is a pack of latents, and the images themselves are not in it"):
        images.open_images(own.data)


# --- what changes between two starts ---


def test_what_changed_is_said(config, latent_config, folder, tmp_path):
    def identity(config: Config) -> dict[str, str]:
        return packs.identity(packs.read_manifest(encoding.ensure(config, ALONE, quiet)))

    before, latents = identity(config), identity(latent_config)
    moved = replace(config, data={"path": str(folder.rename(tmp_path / "moved"))})
    assert packs.changes(before, identity(moved)) == []
    Image.fromarray(picture(99)).save(tmp_path / "moved" / "class1" / "99.png")
    assert packs.changes(before, identity(moved)) == ["images: 41 before, 42 now"]
    (tmp_path / "moved" / "class1" / "99.png").unlink()
    (tmp_path / "moved" / "class0" / "00.png").write_bytes((tmp_path / "moved" / "class0" / "01.png").read_bytes())
    assert packs.changes(before, identity(moved)) == ["the pictures, their labels or their order"]
    (tmp_path / "moved" / "another").mkdir()
    Image.fromarray(picture(0)).save(tmp_path / "moved" / "another" / "0.png")
    assert packs.changes(before, identity(replace(moved, model={"num_classes": 4}))) == [
        "images: 41 before, 42 now",
        "classes: 3 (class0, class1, class2) before, 4 (another, class0, class1, class2) now",
    ]
    Path(moved.data.path).rename(folder)
    Image.fromarray(picture(0)).save(folder / "class0" / "00.png")
    (folder / "another" / "0.png").unlink()
    (folder / "another").rmdir()
    weights = Path(latent_config.data.vae) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.startswith("decoder"))  # the moments are those they were
    save_file({**tensors, name: tensors[name] + 1}, weights, metadata={"format": "pt"})
    [line] = packs.changes(latents, identity(latent_config))
    assert line == f"VAE: {latents['VAE']} before, {identity(latent_config)['VAE']} now"


# --- ranks and kills ---


def test_any_number_of_ranks_writes_the_same_bytes(latent_config, tmp_path, run_ranks):
    found = []
    for world in (1, 2, 4):
        own = replace(latent_config, data={"packs": str(tmp_path / f"packs{world}")})
        found += [digest for digest, _ in run_ranks(world, encode, own, 6)]
    assert len(set(found)) == 1


def test_killed_anywhere_it_goes_on_to_the_same_bytes(config, tmp_path, run_ranks):
    """SIGKILL at 12 points of writing chunks, joining and committing; each is resumed in this process."""
    truth, total = encode(replace(config, data={"packs": str(tmp_path / "whole")}), 10)
    assert total == 5
    for point in [0, 1, 2, 5, 9, 13, 20, 25, 28, 31, 34, 37]:
        own = replace(config, data={"packs": str(tmp_path / f"killed{point}")})
        (end,) = run_ranks.outcomes(1, encode, own, 10, point)
        assert end.code == -signal.SIGKILL, end.error
        assert not encoding.folder(own.data).exists()
        done = len(list(encoding.folder(own.data).with_suffix(".partial").parent.glob("*.partial/*.json")))
        assert encode(own, 10) == (truth, total - done)


def test_what_a_kill_after_the_last_step_leaves_is_cleared(config):
    path = encoding.ensure(config, ALONE, quiet)
    left = path.with_name(path.name + ".partial")
    left.mkdir()
    (left / "0000000.bin").write_bytes(b"rows")
    assert encoding.ensure(config, ALONE, quiet) == path
    assert not left.exists()


def test_one_of_two_ranks_killed_and_resumed_by_another_number(config, tmp_path, run_ranks):
    truth, _ = encode(replace(config, data={"packs": str(tmp_path / "whole")}), 4)
    for resume in (1, 3):
        own = replace(config, data={"packs": str(tmp_path / f"killed{resume}")})
        ends = run_ranks.outcomes(2, encode, own, 4, 20, 1)
        assert [end.code != 0 for end in ends] == [True, True]
        ends = run_ranks(resume, encode, own, 4)
        assert {digest for digest, _ in ends} == {truth}
        assert 0 < sum(encoded for _, encoded in ends) < 11  # some chunks were there


def refused(config: Config, full_rank: int = -1) -> str:
    """As one rank: the line that encoding ends with. On `full_rank` the disk is full."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def full(path, blocks, sync=True):
        raise OSError(28, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", 4)
        if rank == full_rank:
            patch.setattr(chunks, "write", full)
        with pytest.raises(UserError) as caught:
            encoding.ensure(config, World(rank, size, rank, size, torch.device("cpu")), quiet)
    return str(caught.value)


def test_every_rank_ends_with_the_same_line(config, run_ranks):
    few = replace(config, data={"max_bad": 0.01})
    for own, full_rank, words in [
        (few, -1, "cannot be used"),
        (config, 1, "No space left"),
        (replace(config, data={"path": "x"}), -1, "no such"),
    ]:
        lines = run_ranks(2, refused, own, full_rank)
        assert len(set(lines)) == 1
        assert words in lines[0]


# --- bad input ---


def test_too_many_bad_images_fail_with_a_report(config):
    own = replace(config, data={"max_bad": 0.04})
    with pytest.raises(
        UserError, match=r"2 of 43 images cannot be used; 4\.0% are allowed; mend or remove them \('class0/07\.png': not an"
    ) as caught:
        encoding.ensure(own, ALONE, quiet)
    assert "\n" not in str(caught.value)
    (report,) = Path(own.data.packs).glob("*.rejected.txt")
    assert [line.split(":")[0] for line in report.read_text().splitlines()] == ["'class0/07.png'", "'class2/30.png'"]
    encoding.ensure(config, ALONE, quiet)  # allowing more, it goes on


def test_a_folder_of_nothing_but_damage_fails(config, folder):
    for n, file in enumerate(folder.rglob("*.png")):
        file.write_bytes(bytes([n]))
    with pytest.raises(UserError, match="43 of 43 images cannot be used"):
        encoding.ensure(replace(config, data={"max_bad": 1.0}), ALONE, quiet)


@pytest.mark.parametrize("left", ["nothing", "a part"])
def test_a_chunk_whose_rows_are_gone_is_encoded_anew(config, tmp_path, monkeypatch, left):
    """Its NUMBER.json is there and says that it is whole."""
    truth, _ = encode(replace(config, data={"packs": str(tmp_path / "whole")}), 10)
    monkeypatch.setattr(chunks, "join", None)
    with pytest.raises(TypeError):
        encode(config, 10)
    monkeypatch.undo()
    (chunk,) = Path(config.data.packs).glob("*.partial/0000002.bin")
    if left == "nothing":
        chunk.unlink()
    else:
        os.truncate(chunk, 100)
    assert encode(config, 10) == (truth, 1)


@pytest.mark.parametrize("there", ["5", "[]", "null", '{"bytes": 0}', "[" * 100_000])
def test_a_commit_that_says_nothing_is_written_anew(config, tmp_path, there):
    truth, _ = encode(replace(config, data={"packs": str(tmp_path / "whole")}), 10)
    staging = chunks.staging_of(encoding.folder(config.data))
    staging.mkdir(parents=True)
    (staging / "0000000.bin").touch()
    (staging / "0000000.json").write_text(there)
    assert encode(config, 10) == (truth, 5)


def test_a_disk_that_takes_no_more_is_named_with_the_file(config):
    """The system's own error has no name in it; a limit on the size of files stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match=r"partial/0000000\.bin: File too large"):
            encoding.ensure(config, ALONE, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    encoding.ensure(config, ALONE, quiet)


def test_names_from_outside_are_printable(config, tmp_path):
    """Names of folders and files that hold escape sequences and line ends, in the log, in the report and in errors."""
    evil = "a\x1b[2J\nerror: forged\x07"
    for n in range(3):
        file = tmp_path / evil / (evil + str(n % 2)) / f"{n}{evil}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(n)).save(file)
    (file.parent / f"x{evil}.png").write_bytes(b"")
    lines: list[str] = []
    own = replace(config, data={"path": str(tmp_path / evil), "max_bad": 0.5}, model={"num_classes": 2})
    path = encoding.ensure(own, ALONE, lines.append)
    lines += report(path)
    manifest = packs.read_manifest(path)
    assert manifest.class_names == [evil + "0", evil + "1"]
    lines += packs.changes({}, packs.identity(manifest))
    images.open_images(own.data)
    for wrong in (
        {"max_bad": 0.1, "num_images": 4},
        {"path": str(tmp_path / evil / "none")},
        {"vae": evil},
    ):
        with pytest.raises(UserError) as caught:
            encoding.ensure(
                replace(own, data={"packs": str(tmp_path / "more"), **wrong}, model={"num_classes": 5}), ALONE, lines.append
            )
        lines.append(str(caught.value))
    Image.fromarray(picture(0)).save(tmp_path / evil / "beside.png")
    with pytest.raises(UserError) as caught:
        images.open_images(own.data)
    lines.append(str(caught.value))
    assert len(lines) > 12
    assert [line for line in lines if not line.isprintable()] == []


@pytest.mark.parametrize("num", [1, 3])
def test_fewer_images_than_ranks(tmp_path, run_ranks, num):
    (tmp_path / "few").mkdir()
    for n in range(num):
        Image.fromarray(np.full((16, 24, 3), 7, np.uint8)).save(tmp_path / "few" / f"{n}.png")  # constant pictures, too
    data = {"path": str(tmp_path / "few"), "image_size": (16, 24), "packs": str(tmp_path / "packs")}
    config = replace(RECIPES["cats"], data=data, model={"input_size": (16, 24), "num_classes": 0, "channels": 1})
    found = run_ranks(4, encode, config, 2)
    assert {digest for digest, _ in found} == {hashlib.sha256(bytes([7]) * (16 * 24 * num)).hexdigest()}
    x0, y, *_ = encoding.open_pack(config, ALONE, quiet).batch(0, 64)
    assert x0.shape == (64, 1, 16, 24)
    assert (x0 == (2 * 7 - 255) / 255).all()
    assert y is None


def reading_only(config: Config) -> tuple[bool, float]:
    """As a user who may read the pack's folder and not write to it: whether that is so, and the sum of a batch."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    pack = encoding.open_pack(config, ALONE, quiet)
    found = os.access(config.data.path, os.W_OK, effective_ids=True), pack.batch(0, 41).x0.double().sum().item()
    os.seteuid(user)
    return found


def test_a_pack_that_may_only_be_read_trains(config, run_ranks):
    with tempfile.TemporaryDirectory() as shared:
        own = replace(config, data={"packs": shared})
        path = encoding.ensure(own, ALONE, quiet)
        own = replace(own, data={"path": str(path)})  # by its own name, for the pictures are in a private folder
        truth = encoding.open_pack(own, ALONE, quiet).batch(0, 41).x0.double().sum().item()
        for file in path.iterdir():
            file.chmod(0o444)
        path.chmod(0o555)
        Path(shared).chmod(0o555)
        try:
            assert run_ranks(1, reading_only, own) == [(False, truth)]
        finally:
            Path(shared).chmod(0o755)
            path.chmod(0o755)


def test_a_chunk_damaged_since_is_encoded_anew(config, tmp_path, monkeypatch):
    truth, _ = encode(replace(config, data={"packs": str(tmp_path / "whole")}), 10)
    monkeypatch.setattr(chunks, "join", None)
    with pytest.raises(TypeError):
        encode(config, 10)
    monkeypatch.undo()
    (chunk,) = Path(config.data.packs).glob("*.partial/0000002.bin")
    chunk.write_bytes(bytes(chunk.stat().st_size))
    (commit,) = Path(config.data.packs).glob("*.partial/0000003.json")
    commit.write_text("")  # as a power cut may leave it
    with pytest.raises(UserError, match=r"0000002\.bin was damaged since it was written; run again"):
        encode(config, 10)
    assert encode(config, 10) == (truth, 1)


def test_two_processes_do_not_write_one_pack(config):
    staging = encoding.folder(config.data).with_name(encoding.folder(config.data).name + ".partial")
    staging.mkdir(parents=True)
    with (staging / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is encoding into"):
            encoding.ensure(config, ALONE, quiet)
    encoding.ensure(config, ALONE, quiet)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch": 5}, r"--model\.patch 5 does not divide the network's input of 16×24"),
        ({"num_heads": 5}, r"5 attention heads do not divide --model\.width 192"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_encoding(config, fields, message):
    with pytest.raises(UserError, match=message):
        encoding.ensure(replace(config, model=fields), ALONE, quiet)
    assert not any(Path(config.data.packs).glob("*"))


def test_the_model_follows_from_the_data(config, folder):
    manifest = packs.read_manifest(encoding.ensure(config, ALONE, quiet))
    model = fit(config, manifest.image_shape, manifest.num_classes).model
    assert (model.channels, model.input_size, model.num_classes) == (3, (16, 24), 3)
    unlabelled = replace(config, data={"label_column": None})
    assert fit(unlabelled, manifest.image_shape, manifest.num_classes).model.num_classes == 0
    assert encoding.open_pack(unlabelled, ALONE, quiet).batch(0, 4).y is None
    for file in folder.rglob("*.png"):
        file.rename(folder / file.name)
    assert packs.read_manifest(encoding.ensure(config, ALONE, quiet)).num_classes == 0


def test_an_image_size_the_vae_cannot_take_is_refused(latent_config):
    with pytest.raises(UserError, match=r"--data\.image_size 15×24: .*vae needs multiples of 2"):
        encoding.ensure(replace(latent_config, data={"image_size": (15, 24)}), ALONE, quiet)


def test_a_pack_cut_short_is_refused(config):
    path = encoding.ensure(config, ALONE, quiet)
    os.truncate(path / "data.bin", 5000)
    with pytest.raises(UserError, match=r"data\.bin: 5,000 bytes, expected 47,560; delete"):
        encoding.open_pack(config, ALONE, quiet)
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: not the manifest of a pack"):
        encoding.ensure(config, ALONE, quiet)


def test_a_packs_name_follows_from_its_content(config, latent_config, folder):
    names = [encoding.folder(c.data).name for c in (config, latent_config)]
    assert names[0].startswith("pictures-16x24-")
    assert names[1].startswith("pictures-16x24-vae-")
    for same in ({"hflip": False}, {"max_bad": 0.5}, {"packs": config.data.packs}):
        assert encoding.folder(replace(config, data=same).data).name == names[0]
    hub = [{"path": f"a/b{rest}"} for rest in ("", "@v2", ":test", ":test@v2")]
    others = ({"image_size": (16, 16)}, {"num_images": 3}, {"label_column": "kind"}, {"crop": "none"}, *hub)
    assert len({encoding.folder(replace(config, data=other).data).name for other in others} | {names[0]}) == 9
    (folder / "class0" / "00.png").write_bytes(b"another")
    assert encoding.folder(config.data).name != names[0]
    (folder / "etc …a b\n;rm").mkdir()
    odd = replace(config, data={"path": str(folder / "etc …a b\n;rm"), "packs": "packs"})
    assert encoding.folder(odd.data).parent == Path("packs")
    assert encoding.folder(odd.data).name.startswith("etc-a-b-rm-16x24-")


def test_the_manifest_is_json_that_anyone_can_read(config):
    path = encoding.ensure(config, ALONE, quiet)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["dataset"] == str(Path(config.data.path).resolve())
    assert manifest["count"] == sum(rows for rows, _ in manifest["chunks"]) == 41
