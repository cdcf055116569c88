from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from PIL import Image

from ldm_vae.commands import seeds
from ldm_vae.commands.jobs import GenerateConfig as Config
from ldm_vae.commands.jobs import folder_of
from ldm_vae.data.sources import open_source
from ldm_vae.errors import RunError, one_line_errors
from ldm_vae.models.autoencoder import PatchAutoencoderKL
from ldm_vae.models.reconstruction import reconstruct
from ldm_vae.pipeline import LatentDiffusionPipeline, fingerprint_of, load_pipeline
from ldm_vae.runs.config import parse_flags
from ldm_vae.sampling import make_scheduler
from pipelines.generate import main
from tests.processes import launch, run_script

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_pipeline(run: Path, *, classes: tuple[str, ...] | None = None, num_classes: int = 0, seed: int = 0) -> str:
    """A run with an untrained pipeline of 16 x 12 pixels; the name of its directory."""
    torch.manual_seed(seed)
    vae = PatchAutoencoderKL(patch_size=2, block_out_channels=(8, 8), latents_mean=(0.0,) * 4, latents_std=(0.2,) * 4)
    num_classes = len(classes) if classes else num_classes
    unet = UNet2DModel(
        sample_size=(4, 3),
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=num_classes + 1 if num_classes else None,
    )
    names = list(classes) if classes else None
    LatentDiffusionPipeline(vae, unet, make_scheduler("flow", "euler"), class_names=names).save_pretrained(
        run / "pipeline"
    )
    return str(run)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pipeline(tmp_path_factory.mktemp("conditional"), classes=("ant", "T-shirt/top", "bee"))


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pipeline(tmp_path_factory.mktemp("unconditional"))


def config_for(run: str, output: Path, **changes: Any) -> Config:
    return replace(Config(model=run, output=output, num_images=7, steps=2), **changes)


def files(output: Path) -> dict[str, np.ndarray]:
    paths = [p for p in output.rglob("*.png") if p.name != "contact_sheet.png"]
    return {str(p.relative_to(output)): np.asarray(Image.open(p)) for p in paths}


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """To a level of 255: sums in another order may round the other way."""
    assert a.keys() == b.keys()
    for name in a:
        assert np.abs(a[name].astype(int) - b[name]).max() <= 1, name


def test_each_image_is_its_seeds_and_says_how_it_was_made(model: str, tmp_path: Path) -> None:
    main(config_for(model, tmp_path, seed=40, guidance_scale=2.0, guidance_interval=(0.25, 1.0), batch_size=4))
    made = files(tmp_path)
    classes = ["ant", "T-shirt/top", "bee"]
    folders = ["ant", "T-shirt%2Ftop", "bee"]
    assert set(made) == {f"{folders[i % 3]}/{40 + i:08d}.png" for i in range(7)}
    pipeline = load_pipeline(model)
    for i in (0, 4):
        file = f"{folders[i % 3]}/{40 + i:08d}.png"
        options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "guidance_interval": (0.25, 1.0)}
        alone = pipeline(classes[i % 3], generator=40 + i, **options).images[0]
        assert np.abs(np.asarray(alone).astype(int) - made[file]).max() <= 1
        assert Image.open(tmp_path / file).info == {
            "seed": str(40 + i),
            "class": classes[i % 3],
            "model": fingerprint_of(pipeline),
            "steps": "2",
            "scheduler": "FlowMatchEulerDiscreteScheduler",
            "guidance": "2",
            "guidance_interval": "0.25 to 1",
            "precision": "float32",
            "size": "16x12",
        }
    sheet = Image.open(tmp_path / "contact_sheet.png")
    assert sheet.size == (3 * 16 + 4, 3 * (16 + 16 + 4))
    labelled = open_source(str(tmp_path / "ant"))
    assert len(labelled) == 3


def test_a_job_goes_on_with_what_is_missing(model: str, tmp_path: Path) -> None:
    main(config_for(model, tmp_path / "whole", num_images=9))
    whole = files(tmp_path / "whole")
    main(config_for(model, tmp_path / "run"))
    removed, cut = tmp_path / "run" / "ant" / "00000003.png", tmp_path / "run" / "bee" / "00000002.png"
    removed.unlink()
    cut.write_bytes(cut.read_bytes()[:-100])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("0*.png")}
    main(config_for(model, tmp_path / "run", num_images=9, batch_size=2))
    assert_close(files(tmp_path / "run"), whole)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("0*.png")}
    assert {p for p in after if after[p] != before.get(p)} == {
        removed,
        cut,
        *(tmp_path / "run" / f for f in ("T-shirt%2Ftop/00000007.png", "bee/00000008.png")),
    }


def test_what_other_settings_made_is_neither_mixed_nor_overwritten(model: str, tmp_path: Path) -> None:
    main(config_for(model, tmp_path / "run", num_images=3))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.png")}
    other = save_pipeline(tmp_path / "other", classes=("ant", "T-shirt/top", "bee"), seed=1)
    for changes, message in (
        ({"steps": 3}, r"made with other settings \(steps: 2 -> 3\): use those to go on, or choose another --output"),
        ({"guidance_scale": 2.0, "num_images": 1, "seed": 100}, "guidance: 1 -> 2"),
        ({"scheduler": "heun"}, "FlowMatchEulerDiscreteScheduler -> FlowMatchHeunDiscreteScheduler"),
        ({"height": 24}, "size: 16x12 -> 24x12"),
        ({"model": other}, "model: "),
    ):
        with pytest.raises(RunError, match=message):
            main(config_for(model, tmp_path / "run", **changes))
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (12, 16)).save(tmp_path / "pictures" / "mine.png")
    with pytest.raises(RunError, match=r"mine\.png was made with other settings"):
        main(config_for(model, tmp_path / "pictures"))
    assert {p: p.read_bytes() for p in before} == before
    main(config_for(model, tmp_path / "solved", num_images=1, scheduler="dpmsolver++"))
    with pytest.raises(RunError, match="scheduler: DPMSolverMultistepScheduler -> DPMSolverMultistepScheduler, SDE"):
        main(config_for(model, tmp_path / "solved", num_images=1, scheduler="sde-dpmsolver++"))


def test_two_processes_make_what_one_makes(model: str, tmp_path: Path) -> None:
    main(config_for(model, tmp_path / "one"))
    main(config_for(model, tmp_path / "two", num_images=2))  # and go on with what is there
    done = launch(main, config_for(model, tmp_path / "two", batch_size=2), processes=2)
    assert done.returncode == 0, done.stderr
    assert "7 images in" in done.stdout
    assert "2 of them there already" in done.stdout
    assert_close(files(tmp_path / "two"), files(tmp_path / "one"))
    assert (tmp_path / "two" / "contact_sheet.png").exists()


def test_a_model_without_classes_fills_one_folder(unconditional: str, tmp_path: Path) -> None:
    main(config_for(unconditional, tmp_path, num_images=23, height=8, width=20, scheduler="heun"))
    made = files(tmp_path)
    assert set(made) == {f"{i:08d}.png" for i in range(23)}
    assert made["00000022.png"].shape == (8, 20, 3)
    sheet = Image.open(tmp_path / "contact_sheet.png")
    assert sheet.size == (10 * (20 + 4) + 4, 3 * (8 + 16 + 4))
    facts = Image.open(tmp_path / "00000000.png").info
    assert (facts["class"], facts["scheduler"]) == ("none", "FlowMatchHeunDiscreteScheduler")


def test_classes_are_chosen_by_name_or_number(tmp_path: Path) -> None:
    named = save_pipeline(tmp_path / "named", classes=("ant", "bee", "cat"))
    main(config_for(named, tmp_path / "a", num_images=3, class_label=("cat", "0")))
    assert set(files(tmp_path / "a")) == {"cat/00000000.png", "ant/00000001.png", "cat/00000002.png"}
    nameless = save_pipeline(tmp_path / "nameless", num_classes=3)
    main(config_for(nameless, tmp_path / "b", num_images=2, class_label=("2",)))
    assert set(files(tmp_path / "b")) == {"0002/00000000.png", "0002/00000001.png"}
    assert [folder_of(n) for n in (".hidden", "..", "50%", "a\\b", "写真")] == [
        *("%2Ehidden", "%2E.", "50%25", "a%5Cb", "写真")
    ]


def test_images_start_from_images_and_bad_ones_are_listed(
    unconditional: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.png"))[:4]):
        Image.open(path).crop((0, 0, 30, 20 + 5 * (i % 2))).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"damage")
    vae = load_pipeline(unconditional).vae
    main(config_for(unconditional, tmp_path / "same", num_images=None, image=str(folder), strength=0.0))
    made = files(tmp_path / "same")
    assert set(made) == {f"0000000{i}.png" for i in (0, 1, 3)}
    for i in (0, 1, 3):
        pixels = np.asarray(Image.open(folder / f"{i}.png"))
        with torch.no_grad():
            back = reconstruct(vae, torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1)
        expected = ((back[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
        assert np.abs(made[f"0000000{i}.png"] - expected).max() <= 0.51
    assert "2.png,cannot be decoded" in (tmp_path / "same" / "bad_images.csv").read_text()
    assert "3 images are there, 1 left out: see" in capsys.readouterr().out

    mask = Image.new("L", (30, 20))
    mask.paste(255, (10, 4, 20, 12))
    mask.save(tmp_path / "mask.png")
    photo = str(folder / "0.png")
    painted = config_for(
        unconditional, tmp_path / "painted", num_images=2, image=photo, mask=tmp_path / "mask.png", strength=1.0
    )
    main(painted)
    white = np.asarray(mask) > 0
    results = files(tmp_path / "painted")
    for result in results.values():
        assert np.abs(result[~white].astype(int) - made["00000000.png"][~white]).max() <= 1
        assert np.abs(result[white].astype(int) - made["00000000.png"][white]).max() > 1
    assert not np.array_equal(results["00000000.png"], results["00000001.png"])
    with pytest.raises(RunError, match=r"strength: 1 -> 0\.5"):
        main(config_for(unconditional, tmp_path / "painted", image=photo, mask=tmp_path / "mask.png", strength=0.5))


def test_bf16_is_close_to_float32(unconditional: str, tmp_path: Path) -> None:
    main(config_for(unconditional, tmp_path / "no", num_images=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    main(config_for(unconditional, tmp_path / "bf16", num_images=2, mixed_precision="bf16"))
    with pytest.raises(RunError, match="precision: float32 -> bf16"):
        main(config_for(unconditional, tmp_path / "no", mixed_precision="bf16"))
    a, b = files(tmp_path / "no"), files(tmp_path / "bf16")
    assert max(np.abs(a[k].astype(int) - b[k]).max() for k in a) < 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "{tmp}/missing"], "no such model: "),
        (["--model", "{tmp}"], "has no readable model_index.json"),
        (["--class-label", "wasp"], "there is no class wasp: try ant, T-shirt/top, bee"),
        (["--class-label", "7"], "there is no class 7: the model's are 0 to 2"),
        (["--model", "{unconditional}", "--class-label", "0"], "the model has no classes"),
        (["--height", "250"], "height 250 is not a multiple of 4: try 248"),
        (["--num-images", "0"], "--num-images is 0"),
        (["--num-images", "None"], "how many images?"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--steps", "0"], "--steps is 0"),
        (["--scheduler", "ddim"], "scheduler ddim does not fit flow: try dpmsolver++, sde-dpmsolver++, euler"),
        (["--strength", "2"], "strength is 2.0"),
        (["--mask", "{tmp}/no.png"], "--mask needs the --image"),
        (["--image", "{tmp}/no.png"], "no such folder or file"),
        (["--image", "{tmp}#train"], "is inside --image"),
        (
            ["--image", "{tmp}/bad.png"],
            "no usable image: all 1 that were tried are bad, such as bad.png: cannot be dec",
        ),
        (["--image", "{tmp}/grey.png", "--mask", "{tmp}/bad.png"], "cannot identify image file"),
        (["--image", "{tmp}/grey.png", "--mask", "{tmp}/small.png"], "a mask of 8x8 was given for an image of 16x12"),
        (["--image", "{tmp}/grey.png", "--width", "8"], "are the image's own"),
        (["--image", "procedural:dead-leaves", "--num-images", "None"], "has no end"),
        (["--output", "{tmp}/bad.png/out"], "cannot write to"),
        (["--guidance-interval", "1", "0"], "guidance_interval is 1.0 to 0.0"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    model: str,
    unconditional: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.png").write_bytes(b"damage")
    Image.new("L", (12, 16)).save(tmp_path / "grey.png")
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    given = ["--model", model, "--output", str(tmp_path / "out"), "--num-images", "2", "--steps", "2"]
    given += [w.format(tmp=tmp_path, unconditional=unconditional) for w in words]
    with pytest.raises(SystemExit) as ended, one_line_errors():
        main(parse_flags(Config, description="", args=given))
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not list((tmp_path / "out").rglob("*.png"))


def test_many_channels_are_no_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "channels_of", lambda vae: 13)
    with pytest.raises(ValueError, match="13 channels cannot be PIL images or PNG"):
        main(config_for(save_pipeline(tmp_path / "run"), tmp_path / "out"))


def test_the_script_itself_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    words = ["--model", str(tmp_path / "no"), "--output", str(tmp_path / "out"), "--num-images", "1"]
    done = launch(run_script, "pipelines/generate.py", *words)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line] == [f"error: no such model: {tmp_path}/no"]
