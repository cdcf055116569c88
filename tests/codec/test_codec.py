from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from small_vae import make_vae

from ldm_vae.codec import bitstream, network
from ldm_vae.codec.bitstream import Limits
from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.contexts import decode_symbols
from ldm_vae.codec.fit_tables import fit_tables
from ldm_vae.codec.picture import Picture, as_picture
from ldm_vae.codec.search import bits_per_pixel, compress_to
from ldm_vae.codec.tables import load_tables
from ldm_vae.data import large as by_disk
from ldm_vae.data.metadata import Metadata
from ldm_vae.data.sources import open_source
from ldm_vae.errors import (
    ConfigError,
    CorruptError,
    LimitExceededError,
    ModelError,
    ModelMismatchError,
)
from ldm_vae.metrics import psnr


def psnr_of(pixels: np.ndarray, others: np.ndarray) -> float:
    return float(psnr(pixels[None], others[None])[0])


def symbols_in(data: bytes, codec: LatentCodec) -> np.ndarray:
    """Of a file with one tile."""
    contents = bitstream.unpack(data)
    shape = (contents.header.channels, *contents.header.latent_size)
    contexts = codec.tables.contexts_of(contents.header.step)
    return decode_symbols(contents.read(contents.tiles[0]), shape, contexts)


def test_the_file_holds_the_quantised_mean_and_comes_back_as_its_reconstruction(codec: LatentCodec, photo) -> None:
    data = codec.compress(photo, step=0.5)
    with torch.inference_mode():
        images = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 127.5 - 1
        mean = codec.vae.encode(images).latent_dist.mean[0].double().numpy()
        order = list(codec.tables.channels)
        steps = 0.5 * np.sqrt(12) * codec.tables.sigma
        symbols = np.rint((mean - codec.tables.means[:, None, None]) / steps[:, None, None])
        assert np.abs(symbols[order] - symbols_in(data, codec)).max() <= 1  # float32 beside float64
        assert (symbols[order] != symbols_in(data, codec)).mean() < 1e-3
        latents = np.empty_like(symbols)
        latents[order] = symbols_in(data, codec)
        latents = latents * steps[:, None, None] + codec.tables.means[:, None, None]
        reconstruction = codec.vae.decode(torch.from_numpy(latents)[None].float()).sample[0]
    expected = reconstruction.clamp(-1, 1).add(1).mul(127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(expected - np.asarray(codec.decompress(data)).astype(float)).max() <= 1


def test_a_finer_step_takes_more_bytes_and_comes_nearer(codec: LatentCodec, photo) -> None:
    with torch.inference_mode():
        images = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 127.5 - 1
        whole = codec.vae.decode(codec.vae.encode(images).latent_dist.mean).sample[0]
    whole = whole.clamp(-1, 1).add(1).mul(127.5).permute(1, 2, 0).numpy()
    sizes, errors = [], []
    for step in (0.25, 0.5, 1, 2, 4):
        data = codec.compress(photo, step=step)
        sizes.append(len(data))
        errors.append(np.square(np.asarray(codec.decompress(data)).astype(float) - whole).mean())
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (7, 5), (8, 8), (33, 1), (3, 4097), (4097, 3)])
def test_any_size_is_restored(size: tuple[int, int], codec: LatentCodec) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    decoded = codec.decompress_picture(codec.compress(pixels))
    assert decoded.pixels.shape == pixels.shape


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grey_colour_alpha_and_depth_are_kept(channels: int, dtype: type, codec: LatentCodec) -> None:
    top = np.iinfo(dtype).max
    pixels = np.random.default_rng(0).integers(top, size=(20, 30, channels), dtype=dtype, endpoint=True)
    decoded = codec.decompress_picture(codec.compress(pixels))
    assert decoded.whole().shape == pixels.shape
    assert decoded.whole().dtype == dtype
    if channels in (2, 4):
        assert np.array_equal(decoded.alpha, pixels[:, :, -1])  # losslessly
    if dtype == np.uint8:
        assert np.array_equal(np.atleast_3d(np.asarray(codec.decompress(codec.compress(pixels)))), decoded.whole())


def test_16_bits_come_back_with_more_than_8(codec: LatentCodec) -> None:
    pixels = (np.mgrid[:40, :60][0] * 500)[:, :, None].repeat(3, axis=2).astype(np.uint16)
    decoded = codec.decompress_picture(codec.compress(pixels, step=0.5)).pixels
    assert len(np.unique(decoded % 257)) > 100  # 8 bits would be multiples of 257
    eight = codec.decompress_picture(codec.compress((pixels // 257).astype(np.uint8), step=0.5)).pixels
    assert np.abs(decoded / 257 - eight).mean() < 1.5


def test_profile_and_exif_are_kept_unless_stripped(codec: LatentCodec, photo) -> None:
    picture = Picture(pixels=photo, metadata=Metadata(icc=b"profile" * 100, exif=b"II*\0\x08\0\0\0\0\0"))
    decoded = codec.decompress_picture(codec.compress(picture))
    assert decoded.metadata == picture.metadata
    bare = codec.decompress_picture(codec.compress(picture, strip=True))
    assert bare.metadata == Metadata()


@pytest.fixture(scope="module")
def large(codec: LatentCodec) -> tuple[np.ndarray, bytes]:
    """Six tiles, of 512 x 512 pixels each but for the last row and column."""
    y, x = np.mgrid[:600, :1100]
    pixels = np.stack([(x // 3 + y // 5) % 256, (x * y // 400) % 256, (x // 2) % 256], axis=2).astype(np.uint8)
    return pixels, codec.compress(pixels)


def test_a_region_is_the_crop_of_the_whole(codec: LatentCodec, large) -> None:
    _, data = large
    assert len(bitstream.unpack(data).tiles) == 6
    whole = codec.decompress_picture(data).pixels
    for left, top, width, height in ((0, 0, 1, 1), (500, 500, 37, 29), (1099, 599, 1, 1), (3, 0, 1000, 64)):
        part = codec.decompress_picture(data, region=(left, top, width, height)).pixels.astype(int)
        assert np.abs(part - whole[top : top + height, left : left + width]).max() <= 1  # rounding
        assert (part != whole[top : top + height, left : left + width]).mean() < 1e-3


def test_several_threads_write_and_read_the_same(codec: LatentCodec, large) -> None:
    pixels, data = large
    parallel = LatentCodec(codec.vae, codec.tables, workers=2)
    assert parallel.compress(pixels) == data
    assert np.array_equal(parallel.decompress_picture(data).pixels, codec.decompress_picture(data).pixels)
    damaged = bytearray(data)
    part = bitstream.unpack(data).tiles[3]
    payload = bytearray(data[part.begin : part.end])
    payload[-1] ^= 1
    damaged[part.begin : part.end] = payload
    at = bytes(damaged).index(part.crc.to_bytes(4, "little"))
    damaged[at : at + 4] = crc32(payload).to_bytes(4, "little")
    end = bitstream.unpack(data).tiles[0].begin - 4
    damaged[end : end + 4] = crc32(damaged[:end]).to_bytes(4, "little")
    for either in (codec, parallel):  # the checksums are right: the coder itself finds it
        with pytest.raises(CorruptError, match="tile 3"):
            either.decompress_picture(bytes(damaged))


def test_a_region_reads_its_own_tiles_alone(codec: LatentCodec, large) -> None:
    _, data = large
    part = bitstream.unpack(data).tiles[5]
    damaged = bytearray(data)
    damaged[part.begin + 9] ^= 1
    codec.decompress_picture(bytes(damaged), region=(0, 0, 400, 400))
    with pytest.raises(CorruptError, match="tile 5"):
        codec.decompress_picture(bytes(damaged), region=(1060, 560, 40, 40))


@pytest.mark.parametrize("region", [(-1, 0, 5, 5), (0, 0, 0, 5), (0, 0, 1101, 5), (0, 596, 5, 5)])
def test_a_region_outside_is_refused(region: tuple[int, int, int, int], codec: LatentCodec, large) -> None:
    with pytest.raises(ConfigError, match="1100x600"):
        codec.decompress_picture(large[1], region=region)


def test_salvage_marks_what_is_damaged_and_keeps_the_rest(codec: LatentCodec, large) -> None:
    _, data = large
    whole = codec.decompress_picture(data).pixels
    damaged = bytearray(data)
    damaged[bitstream.unpack(data).tiles[1].begin + 9] ^= 1
    said: list[str] = []
    decoded = codec.decompress_picture(bytes(damaged), damage=said).pixels
    assert len(said) == 1
    assert "tile 1" in said[0]
    reach = 4 * codec.vae.decoder_halo  # what the bad tile made wrong around it is marked, too
    marked = (decoded == (255, 0, 255)).all(axis=2)
    assert marked[: 512 + reach, 512 - reach : 1024 + reach].all()
    marked[: 512 + reach, 512 - reach : 1024 + reach] = False
    assert not marked.any()
    assert np.array_equal(decoded[:512, : 512 - reach], whole[:512, : 512 - reach])
    assert np.array_equal(decoded[512 + reach :], whole[512 + reach :])
    cut: list[str] = []
    decoded = codec.decompress_picture(data[:-10], damage=cut).pixels
    assert [m.split(":")[0] for m in cut] == ["tile 5"]
    assert np.array_equal(decoded[:400, :400], whole[:400, :400])


def test_symbols_do_not_depend_on_threads_or_precision(codec: LatentCodec, photo, tmp_path: Path) -> None:
    """A file written with one number of threads in float32 is read with another, and in bfloat16."""
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    again = codec.compress(photo)
    torch.set_num_threads(before)
    assert (symbols_in(again, codec) != symbols_in(codec.compress(photo), codec)).mean() < 1e-3
    data = codec.compress(photo)
    codec.tables.save(tmp_path)
    (tmp_path / "file").write_bytes(data)
    code = (
        "import sys, torch, numpy as np; torch.set_num_threads(1); torch.set_default_dtype(torch.float64);"
        "from pathlib import Path; from ldm_vae.codec import bitstream, contexts, tables;"
        "t = tables.load_tables(Path(sys.argv[1])); c = bitstream.unpack((Path(sys.argv[1]) / 'file').read_bytes());"
        "h = c.header; s = contexts.decode_symbols(c.read(c.tiles[0]), (h.channels, *h.latent_size),"
        "t.contexts_of(h.step)); np.save(Path(sys.argv[1]) / 'symbols.npy', s)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert np.array_equal(np.load(tmp_path / "symbols.npy"), symbols_in(data, codec))
    half = LatentCodec(make_vae(), codec.tables, dtype=torch.bfloat16)
    assert half.digest == codec.digest
    decoded = half.decompress_picture(data).pixels.astype(float)
    assert np.abs(decoded - np.asarray(codec.decompress(data))).mean() < 2
    codec.decompress(half.compress(photo))


def test_another_model_or_other_tables_are_named(codec: LatentCodec, photo) -> None:
    data = codec.compress(photo)
    other = make_vae(seed=1)
    source = open_source("procedural:dead-leaves", channels=3, resolution=96)
    others = LatentCodec(other, fit_tables(other, source, num_images=2, steps=(1,)))
    with pytest.raises(ModelMismatchError) as error:
        others.decompress(data)
    assert codec.digest.hex() in str(error.value)
    assert others.digest.hex() in str(error.value)
    changed = dataclasses.replace(codec.tables, sigma=codec.tables.sigma * 1.0001)
    with pytest.raises(ModelMismatchError, match="another model"):
        LatentCodec(codec.vae, changed).decompress(data)
    with pytest.raises(ModelMismatchError, match="fitted for"):
        LatentCodec(other, codec.tables)


def test_limits_hold_before_anything_is_decoded(codec: LatentCodec, photo) -> None:
    with pytest.raises(LimitExceededError):
        codec.decompress_picture(codec.compress(photo), limits=Limits(max_pixels=100))


def test_tables_are_saved_and_loaded_whole(codec: LatentCodec, tmp_path: Path) -> None:
    codec.tables.save(tmp_path)
    assert load_tables(tmp_path).digest == codec.tables.digest
    file = tmp_path / "tables.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(ModelError):
            load_tables(tmp_path)
    with pytest.raises(ModelError, match="fit-codec"):
        load_tables(tmp_path / "nowhere")


def test_sigma_is_the_rms_of_the_posterior_deviation(codec: LatentCodec) -> None:
    source = open_source("procedural:dead-leaves", channels=3, resolution=96)
    from ldm_vae.data.order import index_at

    variances = []
    with torch.inference_mode():
        for position in range(6):
            pixels = source[index_at(position, size=len(source), seed=0)].pixels
            images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1
            variances.append(codec.vae.encode(images).latent_dist.var.double().mean(dim=(0, 2, 3)))
    expected = torch.stack(variances).mean(dim=0).sqrt().numpy()
    assert np.allclose(codec.tables.sigma, expected, rtol=1e-5)
    assert np.allclose(
        codec.tables.channel_steps(512), 2 * np.sqrt(12) * expected[list(codec.tables.channels)], rtol=1e-5
    )


@pytest.mark.parametrize("sides", [(64, 96), (50, 41)])
def test_diffusers_own_autoencoder_is_a_codec(sides: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).eval()
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -6
    vae.save_pretrained(tmp_path)
    source = open_source("procedural:dead-leaves", channels=3, resolution=64)
    (tmp_path / "codec").mkdir()
    fit_tables(vae, source, num_images=3, steps=(1 / 16, 1)).save(tmp_path / "codec")
    codec = LatentCodec.from_pretrained(str(tmp_path))
    pixels = np.random.default_rng(0).integers(256, size=(*sides, 3), dtype=np.uint8)
    data = codec.compress(pixels, step=1 / 16)
    whole = np.asarray(codec.decompress(data))
    assert whole.shape == pixels.shape
    part = codec.decompress_picture(data, region=(5, 7, 20, 30)).pixels
    assert np.array_equal(part, whole[7:37, 5:25])
    with torch.inference_mode():
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        pad = torch.nn.functional.pad(images, (0, -sides[1] % 2, 0, -sides[0] % 2), mode="replicate")
        mean = vae.encode(pad).latent_dist.mean
        reconstruction = vae.decode(mean).sample[0, :, : sides[0], : sides[1]].clamp(-1, 1).add(1).mul(127.5)
    assert np.abs(reconstruction.permute(1, 2, 0).numpy() - whole).mean() < 1  # the quantiser's error, at a fine step


def test_an_autoencoder_without_a_posterior_is_refused() -> None:
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    with pytest.raises(ModelError, match="posterior"):
        fit_tables(vae, open_source("procedural:shapes", channels=3, resolution=32), num_images=1)


def test_targets_are_met_as_closely_as_a_step_can(codec: LatentCodec, photo) -> None:
    picture = Picture(pixels=photo)
    sizes = [8 * len(codec.compress(photo, step=q)) / photo[:, :, 0].size for q in (0.5, 2)]
    target = float(np.mean(sizes))
    data = compress_to(codec, picture, target_bpp=target)
    assert bits_per_pixel(data, picture.pixels) <= target
    finer = (bitstream.unpack(data).header.step - 1) / 256
    assert 8 * len(codec.compress(photo, step=finer)) / photo[:, :, 0].size > target
    fine, coarse = (psnr_of(photo, np.asarray(codec.decompress(codec.compress(photo, step=q)))) for q in (0.5, 2))
    target_psnr = (fine + coarse) / 2
    assert fine > coarse
    data = compress_to(codec, picture, target_psnr=target_psnr)
    assert psnr_of(photo, np.asarray(codec.decompress(data))) >= target_psnr
    coarser = (bitstream.unpack(data).header.step + 1) / 256
    assert psnr_of(photo, np.asarray(codec.decompress(codec.compress(photo, step=coarser)))) < target_psnr
    for impossible in ({"target_bpp": 1e-3}, {"target_psnr": 90.0}):
        with pytest.raises(ConfigError, match="cannot be reached"):
            compress_to(codec, picture, **impossible)
    with pytest.raises(ConfigError, match="nan"):
        compress_to(codec, picture, target_psnr=float("nan"))


@pytest.mark.parametrize("target", [{"target_psnr": 12.0}, {"target_bpp": 2.0}])
def test_targets_of_large_pictures_are_met_by_way_of_the_disk(
    codec: LatentCodec, photo, target: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Picture(pixels=photo)
    monkeypatch.setattr(codec, "log2_tile", 3)
    whole = compress_to(codec, picture, **target)
    monkeypatch.setattr(network, "BATCH", 1)
    monkeypatch.setattr(by_disk, "LARGE", 100)
    boxes = []
    encode = codec.network.encode
    monkeypatch.setattr(codec.network, "encode", lambda pixels, box: boxes.append(box) or encode(pixels, box))
    assert compress_to(codec, picture, **target, scratch=tmp_path) == whole
    assert max(bottom - top for top, _, bottom, _ in boxes) == 8  # never all latents in memory
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_that_the_same_limits_would_not_read(codec: LatentCodec) -> None:
    wide = np.zeros((1, 2**15 + 1, 3), np.uint8)
    with pytest.raises(LimitExceededError):
        codec.compress(wide)
    limits = bitstream.Limits(max_side=2**16)
    data = codec.compress(wide, limits=limits)
    assert codec.decompress(data, limits=limits).size == (2**15 + 1, 1)
    assert compress_to(codec, as_picture(wide), target_psnr=5.0)


@pytest.mark.parametrize("step", [0, -1, 1e-9, 80, 256, float("nan"), float("inf")])
def test_a_step_that_cannot_be_is_refused(step: float, codec: LatentCodec, photo) -> None:
    with pytest.raises(ConfigError, match="step"):
        codec.compress(photo, step=step)


def test_a_picture_of_other_channels_than_the_models_is_refused(codec: LatentCodec) -> None:
    with pytest.raises(ModelError, match="channels"):
        codec.compress(np.zeros((8, 8, 7), np.uint8))
