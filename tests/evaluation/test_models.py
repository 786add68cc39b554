"""Models from configs, functions and folders; weights that do not fit are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from made_models import OwnLoss, llama, save_config, save_llama
from safetensors.torch import load_file, save_file

from wsm_ds.errors import EvaluationError, ModelMismatch
from wsm_ds.evaluation.models import build_model, load_folder, positions_of, source_of, vocabulary_of

TOKENS = torch.arange(1, 31).view(2, 15)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_a_config_computes_what_the_filled_one_does(tmp_path: Path, tied: bool) -> None:
    source = llama(3, tie_word_embeddings=tied)
    for spec in (save_config(tmp_path / "c", tie_word_embeddings=tied), tmp_path / "c" / "config.json"):
        model = build_model(str(spec), "fp32", "cpu")
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
        model.load_state_dict(source.state_dict())
        assert torch.equal(model(input_ids=TOKENS).logits, source(input_ids=TOKENS).logits)
        assert not model.training
    assert (vocabulary_of(model), positions_of(model)) == (97, 64)


def test_the_dtype_is_that_of_the_parameters(tmp_path: Path) -> None:
    model = build_model(str(save_config(tmp_path / "c")), "bf16", "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert build_model("made_models:make_own", "bf16", "cpu").logits.dtype == torch.bfloat16


def test_a_function_is_found_in_a_module_and_in_a_file(tmp_path: Path) -> None:
    assert isinstance(build_model("made_models:make_own", "fp32", "cpu"), OwnLoss)
    file = tmp_path / "my model.py"
    file.write_text("import torch\ndef make():\n    return torch.nn.Linear(3, 2)\n")
    assert build_model(f"{file}:make", "fp32", "cpu").weight.shape == (2, 3)


def test_the_file_that_decides_a_model_is_found_without_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = save_config(tmp_path / "c")
    (tmp_path / "pack").mkdir()
    for file in ("mine.py", "pack/__init__.py", "pack/deep.py"):
        (tmp_path / file).write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    assert source_of(str(config)) == source_of(str(config / "config.json")) == config / "config.json"
    assert source_of("mine.py:make") == Path("mine.py")
    assert source_of("mine:make") == tmp_path / "mine.py"
    assert source_of("pack:make") == tmp_path / "pack/__init__.py"
    assert source_of("pack.deep:make") == tmp_path / "pack/deep.py"
    assert source_of("absent_module:make") is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("absent", "absent is neither a folder, nor"),
        ("absent_module:make", "absent_module:make cannot be made: ModuleNotFoundError"),
        ("made_models:absent", "made_models:absent cannot be made: AttributeError"),
        ("absent.py:make", "cannot be made: FileNotFoundError"),
        ("absent.py", "absent.py:FUNCTION"),
        ("made_models:make_text", "returned a str"),
    ],
)
def test_a_wrong_model_is_named(spec: str, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        build_model(spec, "fp32", "cpu")


def test_a_folder_without_a_usable_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"has no config.json"):
        build_model(str(tmp_path), "fp32", "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(EvaluationError, match="no model can be made from"):
        build_model(str(tmp_path), "fp32", "cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EvaluationError, match="no model can be made from"):
        build_model(str(tmp_path), "fp32", "cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_is_loaded_with_its_own_config_and_with_a_given_one(tmp_path: Path, tied: bool) -> None:
    source = llama(5, tie_word_embeddings=tied)
    folder = save_llama(tmp_path / "m", 5, tie_word_embeddings=tied)
    config = save_config(tmp_path / "c", tie_word_embeddings=tied)
    expected = source(input_ids=TOKENS).logits
    for spec in (None, str(config)):
        model = load_folder(folder, "fp32", spec, "cpu")
        assert torch.equal(model(input_ids=TOKENS).logits, expected)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "m")
    file = folder / "model.safetensors"
    whole = load_file(file)
    norm = "model.norm.weight"
    cases = {
        f"the folder lacks: {norm}": {name: value for name, value in whole.items() if name != norm},
        "the model lacks: extra": whole | {"extra": torch.ones(2)},
        f"other shapes have: {norm}": whole | {norm: torch.ones(5)},
    }
    for words, tensors in cases.items():
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ModelMismatch, match=words):
            load_folder(folder, "fp32", str(save_config(tmp_path / "c")), "cpu")
        with pytest.raises(ModelMismatch, match=norm if norm in words else "extra"):
            load_folder(folder, "fp32", None, "cpu")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(EvaluationError, match=r"model.safetensors cannot be read"):
        load_folder(folder, "fp32", str(tmp_path / "c"), "cpu")
    file.unlink()
    with pytest.raises(EvaluationError, match=r"has no \*.safetensors"):
        load_folder(folder, "fp32", None, "cpu")


def test_no_code_that_lies_beside_the_weights_is_run(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    for spec in (None, str(folder)):
        with pytest.raises(EvaluationError):
            load_folder(folder, "fp32", spec, "cpu")
    assert not (tmp_path / "ran").exists()
