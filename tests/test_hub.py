"""Models of the Hub, without a network: what is asked for, what its cache holds, and each error as one line."""

import shutil

import huggingface_hub
import pytest
from safetensors.torch import save_file
from small_weights import SMALL, assert_same, official_tensors, one_line, port_folder

from sv3d_fast.model import weights
from sv3d_fast.model.checkpoint import CheckpointError
from sv3d_fast.model.weights import load_model

pytestmark = [
    # thousands of tiny tensors: handing each to several threads costs more than it saves
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Stable Video 3D weights are licensed"),
]


@pytest.fixture
def small_defaults(monkeypatch):
    """load_model takes SMALL's sizes for the official ones."""
    monkeypatch.setattr(weights, "ModelConfig", lambda: SMALL)


@pytest.fixture
def port(tmp_path):
    port_folder(tmp_path / "port")
    return tmp_path / "port"


def no_network(*args, **kwargs):
    pytest.fail("touched the network")


@pytest.mark.parametrize("path", ["./a/b", "/nowhere/at/all", "a/b/c", "~/nothing", "a/x.safetensors", "x.ckpt"])
def test_missing_local_paths_stay_local(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(CheckpointError, match=r"no such file or folder$") as info:
        load_model(path)
    one_line(info)


def test_existing_paths_stay_local(port, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    monkeypatch.chdir(port.parent)
    load_model("port")
    (port / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no model here: expected model_index.json, or one of sv3d_u"):
        load_model("port/empty")


def cached(cache, repo_id, source):
    """Lays `source` out as the Hub's cache would hold it."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, root / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("switch", ["argument", "environment"])
def test_cached_repositories_load_offline(port, tmp_path, small_defaults, monkeypatch, switch):
    cached(tmp_path / "cache", "someone/port", port)
    (tmp_path / "raw").mkdir()
    save_file(official_tensors()[0], tmp_path / "raw" / "sv3d_u.safetensors")
    cached(tmp_path / "cache", "someone/raw", tmp_path / "raw")
    offline = {"cache_dir": tmp_path / "cache", "local_files_only": switch == "argument"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", switch == "environment")
    assert_same(load_model("someone/port", **offline), load_model(port))
    assert load_model("someone/raw", variant="u", **offline).config.unet.variant == "u"
    for name, variant, message in (
        ("someone/nothing", None, "not, or not wholly, in the local cache, and downloads are switched off"),
        ("not a name!", None, "not a valid name"),
        ("someone/raw", "fp16", "has no model_index.json, so expected 'u' or 'p', got 'fp16'"),
    ):
        with pytest.raises(CheckpointError, match=message) as info:
            load_model(name, variant=variant, **offline)
        one_line(info)


def test_only_what_is_asked_for_is_downloaded(port, tmp_path, small_defaults, monkeypatch):
    asked = []

    def download(repo_id, *, allow_patterns, ignore_patterns, **rest):
        asked.append((allow_patterns, ignore_patterns, rest))
        return str(port if repo_id == "a/port" else tmp_path / "raw")

    def wanted(files):
        patterns, ignored, _ = asked[-1]
        return set(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=ignored))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model("a/port", token="t", revision="r", cache_dir="c", local_files_only=True)
    assert asked[-1][2] == {"token": "t", "revision": "r", "cache_dir": "c", "local_files_only": True}
    plain = ["unet/diffusion_pytorch_model.safetensors", "image_encoder/model-00001-of-00002.safetensors"]
    half = [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "image_encoder/model.fp16-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
    ]
    others = ["unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin", "sv3d_p.safetensors"]
    assert wanted(plain + half + others + ["unet/config.json"]) == {*plain, "unet/config.json"}
    with pytest.raises(CheckpointError, match="fp16"):
        load_model("a/port", variant="fp16")
    assert wanted(plain + half + others) == set(half)
    (tmp_path / "raw").mkdir()
    save_file(official_tensors()[0], tmp_path / "raw" / "sv3d_u.safetensors")
    load_model("stabilityai/sv3d", variant="u")
    assert wanted(["sv3d_u.safetensors", "sv3d_p.safetensors"]) == {"sv3d_u.safetensors"}
    with pytest.raises(CheckpointError, match="expected 'u', got 'p'"):
        load_model("stabilityai/sv3d", variant="p")
    assert wanted(["sv3d_u.safetensors", "sv3d_p.safetensors"]) == {"sv3d_p.safetensors"}


def hub_error(name):
    """One of huggingface_hub's exceptions with several lines, whatever its constructor wants."""
    kind = getattr(huggingface_hub.errors, name)
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error.\n\nMany lines\nof advice")
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error("GatedRepoError"), "a/b: gated: accept its licence at .*/a/b, then log in with 'hf auth login'"),
        (hub_error("RepositoryNotFoundError"), "a/b: no such file .* as a Hub repository: not found"),
        (hub_error("RevisionNotFoundError"), "revision: a/b has no 'v9'"),
        (hub_error("LocalEntryNotFoundError"), "in the local cache, and the Hub can't be reached"),
        (ConnectionError("reset\nby peer"), "a/b: the download failed: reset$"),
        (OSError(), "a/b: the download failed: OSError$"),
    ],
)
def test_errors_of_the_hub(monkeypatch, error, message):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=message) as info:
        load_model("a/b", revision="v9")
    one_line(info)
    assert info.value.__suppress_context__
