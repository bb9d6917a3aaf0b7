"""Training: a resumed run is bit-identical, exported models load, mistakes are one line."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from tav_model.errors import TavError
from tav_model.tensors import load_tensors, save_tensors
from toyworld import train
from toyworld.captions import random_caption
from toyworld.samples import random_scene
from toyworld.training import latents
from toyworld.training.loop import Part, Settings, Training
from toyworld.training.pictures import DrawnPictures, TrainingSet
from toyworld.training.text import MAX_TOKENS, Tokens, save_tokenizer
from toyworld.training.vae import VaePart, psnr, unseen_pictures


class LinePart(Part):
    """A line through points: the smallest thing that can be trained."""

    name = "line"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        torch.manual_seed(settings.seed)
        self.networks = torch.nn.ModuleDict({"line": torch.nn.Linear(3, 2)})
        self.evaluated: list[float] = []

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.settings.seed, step])
        x = rng.standard_normal((self.settings.batch, 3), np.float32)
        return {"x": torch.from_numpy(x), "y": torch.from_numpy(x[:, :2] * 3 + 1)}

    def loss(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        noise = 0.01 * torch.randn(batch["y"].shape, generator=generator, device=batch["y"].device)
        return (self.networks["line"](batch["x"]).float() - batch["y"] - noise).square().mean()

    def evaluate(self) -> tuple[dict[str, float], None]:
        weight = self.networks["line"].weight
        error = (weight - torch.tensor([[3.0, 0, 0], [0, 3.0, 0]])).abs().max().item()
        self.evaluated.append(error)
        return {"error": error}, None

    def exported(self) -> dict[str, torch.nn.Module]:
        return {"line": self.networks["line"]}

    def export(self, base: Path) -> None:
        save_tensors(base / "line" / "model.safetensors", self.networks["line"].state_dict(), {})


LINE = Settings(steps=400, batch=16, learning_rate=0.05, averaging=0.9)
LINE_IN_SHORT = dataclasses.replace(LINE, steps=60)


def test_training_reaches_the_solution(tmp_path: Path):
    part = LinePart(LINE)
    Training(part, tmp_path, evaluate_every=100).run()
    assert part.evaluated[-1] < 0.05 < part.evaluated[0]


@pytest.mark.parametrize("at", [1, 150, 399])
def test_a_resumed_training_is_bit_identical(tmp_path: Path, at: int):
    class StoppedError(Exception):
        pass

    class Stopping(LinePart):
        def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
            if step == at + 2:
                raise StoppedError
            return super().__getitem__(step)

    Training(LinePart(LINE), tmp_path / "whole").run()
    if at + 2 < LINE.steps:
        with pytest.raises(StoppedError):
            Training(Stopping(LINE), tmp_path / "parts", save_every=at).run()
    Training(LinePart(LINE), tmp_path / "parts").run()
    whole, parts = (load_tensors(tmp_path / name / "line.safetensors")[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_longer_training_resumes_from_the_plateau_bit_identically(tmp_path: Path):
    longer = dataclasses.replace(LINE, steps=600)
    Training(LinePart(longer), tmp_path / "whole").run()
    Training(LinePart(LINE), tmp_path / "parts").run()
    assert Settings.plateau_of(LINE.steps) == 300
    resumed = Training(LinePart(longer), tmp_path / "parts")
    resumed.resume()
    assert resumed.step == 300
    resumed.run()
    whole, parts = (load_tensors(tmp_path / name / "line.safetensors")[0] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_shorter_training_does_not_resume_from_a_longer_one_that_has_decayed(tmp_path: Path):
    Training(LinePart(LINE), tmp_path).run()
    (tmp_path / "line-plateau.safetensors").unlink()
    with pytest.raises(TavError, match="has 400 of 400 steps, and its learning rate has decayed further"):
        Training(LinePart(dataclasses.replace(LINE, steps=200)), tmp_path).run()


def test_a_training_goes_on_from_exported_weights(tmp_path: Path):
    first = LinePart(LINE_IN_SHORT)
    Training(first, tmp_path).run()
    first.export(tmp_path)
    second = LinePart(dataclasses.replace(LINE_IN_SHORT, seed=1))
    second.start_from(tmp_path)
    assert all(
        torch.equal(one, other)
        for one, other in zip(first.networks.parameters(), second.networks.parameters(), strict=True)
    )
    Training(second, tmp_path).run()
    assert second.evaluated[-1] < first.evaluated[-1]
    assert (tmp_path / "line-continued.safetensors").exists(), "the first checkpoint must not be taken for its own"


def test_weights_that_are_not_there_or_of_another_network_are_refused(tmp_path: Path):
    with pytest.raises(TavError, match=r"line/model\.safetensors: no weights there"):
        LinePart(LINE).start_from(tmp_path)
    save_tensors(tmp_path / "line" / "model.safetensors", torch.nn.Linear(4, 2).state_dict(), {})
    with pytest.raises(TavError, match="weights of another network: Error"):
        LinePart(LINE).start_from(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_computes_what_eager_steps_compute(tmp_path: Path):
    weights = []
    for graph in (False, True):
        part = LinePart(LINE_IN_SHORT)
        Training(part, tmp_path / str(graph), "cuda", graph=graph).run()
        weights.append(part.networks["line"].weight.detach())
    assert torch.allclose(*weights, atol=1e-5)


def test_the_learning_rate_is_level_and_then_decays():
    training = Training(LinePart(LINE), Path("unused"))
    rates = []
    for training.step in range(LINE.steps):
        rates.append(training._learning_rate())
    assert rates[0] == LINE.learning_rate / 100 and set(rates[99:301]) == {LINE.learning_rate}
    assert all(a > b for a, b in itertools.pairwise(rates[300:])) and rates[-1] < 0.03 * LINE.learning_rate


def test_a_checkpoint_of_other_settings_or_networks_is_refused(tmp_path: Path):
    Training(LinePart(Settings(3, 4, 0.1)), tmp_path).run()
    with pytest.raises(TavError, match="use the same settings, or remove it"):
        Training(LinePart(Settings(3, 5, 0.1)), tmp_path).run()
    other = LinePart(Settings(3, 4, 0.1))
    other.networks = torch.nn.ModuleDict({"curve": torch.nn.Linear(3, 2)})
    with pytest.raises(TavError, match="has other networks"):
        Training(other, tmp_path).resume()
    (tmp_path / "line.safetensors").write_bytes(b"cut off")
    with pytest.raises(TavError, match="not a complete safetensors file"):
        Training(LinePart(Settings(3, 4, 0.1)), tmp_path).run()


def test_a_loss_that_is_not_a_number_ends_the_training(tmp_path: Path):
    class Broken(LinePart):
        def loss(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
            return super().loss(batch, generator) * float("nan")

    with pytest.raises(TavError, match="line: the loss is nan at step 20"):
        Training(Broken(LINE), tmp_path).run()
    assert not (tmp_path / "line.safetensors").exists()


@pytest.mark.slow
def test_mlflow_has_one_run_of_a_training_that_was_stopped(tmp_path: Path):
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    short = Settings(60, 4, 0.05)
    training = Training(LinePart(short), tmp_path, save_every=30, evaluate_every=30, tracking_uri=uri)
    training.run()
    Training(LinePart(short), tmp_path, tracking_uri=uri).run()
    (run,) = mlflow.MlflowClient(uri).search_runs(
        [mlflow.MlflowClient(uri).get_experiment_by_name("toyworld").experiment_id]
    )
    assert run.data.params["steps"] == "60" and {"loss", "learning_rate", "error"} <= set(run.data.metrics)


def test_remembered_tokens_are_the_tokenizers(tmp_path: Path):
    save_tokenizer(tmp_path)
    tokens, tokenizer = Tokens(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    captions = ["", *(random_caption(random_scene(rng), rng) for _ in range(200))]
    expected = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    assert torch.equal(tokens(captions), expected.input_ids)
    assert (expected.attention_mask.sum(1) < MAX_TOKENS).all()


@pytest.mark.slow
def test_processes_draw_the_same_pictures():
    chosen = torch.tensor([3, 0, 5])
    alone, together = (DrawnPictures(TrainingSet(0, 3), 6, workers)[chosen] for workers in (0, 2))
    assert torch.equal(alone, together) and alone.shape == (3, 128, 128, 3)
    assert torch.equal(alone[1], torch.from_numpy(TrainingSet(0, 3)[0]))


@pytest.mark.slow
def test_the_whole_training_in_small_gives_a_base_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffusers import StableDiffusionPipeline

    from tav_model.metrics.clip import ClipScorer

    monkeypatch.setattr(latents, "CHUNK", 60)
    monkeypatch.setattr(latents, "CHUNK_SAMPLES", 4)
    monkeypatch.setattr(train, "DEFAULTS", dict.fromkeys(train.DEFAULTS, (2, 4, 1e-3, 0.9, 0.0)))
    places = ["--base", str(tmp_path / "base"), "--work", str(tmp_path / "work"), "--tracking-uri", "none"]
    assert train.main(["all", "--device", "cpu", *places]) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base", local_files_only=True)
    images = pipeline(["a red ball"], height=128, width=128, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 128, 128, 3) and np.isfinite(images).all()
    scorer = ClipScorer(tmp_path / "base" / "scorer")
    assert scorer.embed_frames(np.zeros((2, 128, 128, 3), np.uint8)).shape == (2, 64)
    for file in (tmp_path / "base").rglob("*.safetensors"):
        assert {tensor.dtype for name, tensor in load_tensors(file)[0].items() if "ids" not in name} == {torch.float16}
    # Trained already: the same command only writes the weights again, to the same bytes.
    before = {path: path.read_bytes() for path in (tmp_path / "base").rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / "base" / "unet")
    assert train.main(["unet", "--device", "cpu", *places]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert train.main(["unet", "--continue", "--device", "cpu", *places]) == 0
    changed = {path.parent.name for path in before if path.read_bytes() != before[path]}
    assert changed == {"unet", "text_encoder"}


def train_line(rank: int, folder: Path) -> None:
    """Train the line as one of two processes, and save the weights that this process has."""
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    training = Training(LinePart(LINE_IN_SHORT), folder)
    training.run()
    training.wait()
    training.save(folder / f"rank-{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_same_weights_as_one_with_the_complete_batch(tmp_path: Path):
    torch.multiprocessing.spawn(train_line, (tmp_path,), nprocs=2)
    one, other = (load_tensors(tmp_path / f"rank-{rank}.safetensors")[0] for rank in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)
    alone = Training(LinePart(LINE_IN_SHORT), tmp_path / "alone")
    alone.run()
    for name, value in alone.trained.items():
        # The noise on the points differs.
        assert torch.allclose(one[f"weights.{name}"], value, atol=0.02), name
    assert {path.name for path in tmp_path.glob("line*")} == {"line.safetensors", "line-plateau.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["unet"], "python -m toyworld.train clip"),
        (["decoder"], "python -m toyworld.train vae"),
        (["vae", "--export"], "no checkpoint to export; train first: python -m toyworld.train vae"),
    ],
)
def test_parts_that_need_others_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], missing: str
):
    places = ["--base", str(tmp_path / "base"), "--work", str(tmp_path / "work"), "--tracking-uri", "none"]
    assert train.main([*arguments, "--device", "cpu", *places]) == 2
    assert missing in capsys.readouterr().err


@pytest.mark.slow
def test_the_decoder_is_trained_with_the_latents_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "DEFAULTS", dict.fromkeys(train.DEFAULTS, (2, 4, 1e-2, 0.9, 0.0)))
    places = ["--base", str(tmp_path / "base"), "--work", str(tmp_path / "work"), "--tracking-uri", "none"]
    weights = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    assert train.main(["vae", "--device", "cpu", *places]) == 0
    before, _ = load_tensors(weights)
    assert train.main(["decoder", "--device", "cpu", *places]) == 0
    after, _ = load_tensors(weights)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith(("encoder.", "quant_conv."))} <= same
    assert any(name.startswith("decoder.") for name in before.keys() - same)


@pytest.mark.slow
def test_whole_pictures_come_last():
    part = VaePart(Settings(steps=20, batch=8, learning_rate=1e-3))
    assert part[17]["pictures"].shape == (8, 3, 64, 64) and part[18]["pictures"].shape == (2, 3, 128, 128)
    assert torch.equal(part[3]["pictures"], part[3]["pictures"])


def test_psnr():
    pictures, masks = unseen_pictures(3)
    assert (psnr(pictures, pictures) == 100).all() and masks.shape == (3, 128, 128)
    worse = pictures.copy()
    worse[0] = np.where(worse[0] > 127, worse[0] - 51, worse[0] + 51)  # a fifth off everywhere: 20 log10(5)
    assert psnr(pictures, worse)[0] == pytest.approx(13.979, abs=1e-3)
