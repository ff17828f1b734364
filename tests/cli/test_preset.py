import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from receptance.cli.preset import read_preset
from receptance.cli.sampling_flags import sampling_params
from receptance.engine.params import SamplingParams
from receptance.errors import ConfigError
from receptance.generation import generate_tokens
from receptance.models import RWKV
from receptance.tokenizers import Tokenizer

Cli = Callable[..., Result]


def write(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.toml").write_text(text)
    return folder


def test_flags_win_over_the_preset_and_the_preset_over_the_defaults(tmp_path: Path) -> None:
    preset = read_preset(write(tmp_path, "[sampling]\ntemperature = 0.5\ntop_k = 3\nlogit_bias = { 7 = -1.5 }"))
    params = sampling_params(
        SamplingParams(top_p=0.3, temperature=2.0), preset.sampling, {"top_k": 9, "seed": None}, ["5=-inf"], ["a\\nb"]
    )
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 9, 0.3)
    assert params.logit_bias == ((5, -float("inf")),)
    assert params.stop == ("a\nb",)
    assert sampling_params(SamplingParams(), preset.sampling, {}, None, None).logit_bias == ((7, -1.5),)


def test_a_folder_without_a_preset_recommends_nothing(tmp_path: Path) -> None:
    assert not read_preset(tmp_path).sampling


@pytest.mark.parametrize(
    "text, words",
    [
        ("template = 3", "template is 3, expected a string"),
        ("colour = 'red'", "unknown key 'colour'"),
        ("[sampling]\nheat = 1", "unknown sampling field 'heat'"),
        ("[sampling]\ntop_p = 7", "top_p is 7"),
        ("[sampling]\nlogit_bias = { x = 1 }", "model.toml"),
        ("[sampling]\nlogit_bias = 3", "logit_bias is 3"),
        ("[sampling]\nstop = 3", "stop is 3"),
        ("sampling = 3", "sampling is 3"),
        ("state = '../../secret'", "expected the name of a file in the same folder"),
        ("state = '/etc/passwd'", "expected the name of a file in the same folder"),
        ("new_document = 'yes'", "new_document is 'yes', expected true or false"),
        ("= =", "not valid TOML"),
    ],
)
def test_a_bad_preset_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.toml") as error:
        read_preset(write(tmp_path, text))
    assert words in str(error.value)


def test_a_preset_starts_every_text_from_its_state(
    cli: Cli, folder: Path, model: RWKV, tok: Tokenizer, tmp_path: Path
) -> None:
    with_state = tmp_path / "fox"
    shutil.copytree(folder, with_state)
    start = generate_tokens(model, tok, "Once", max_tokens=0)
    list(start)
    start.state.save(with_state / "fox.state", model)
    write(with_state, "state = 'fox.state'\n[sampling]\nmax_tokens = 7\nignore_eos = true\nseed = 5")
    report = json.loads(cli("run", with_state, " upon", "--json").stdout)
    assert len(report["tokens"]) == 7
    assert (
        report["tokens"]
        == json.loads(cli("run", folder, "Once upon", "--json", "-n", "7", "--ignore-eos", "--seed", "5").stdout)[
            "tokens"
        ]
    )


def test_a_text_begins_as_documents_in_training_do(
    cli: Cli, folder: Path, model: RWKV, tok: Tokenizer, tmp_path: Path
) -> None:
    as_document = tmp_path / "opened"
    shutil.copytree(folder, as_document)
    write(as_document, "new_document = true\n[sampling]\nmax_tokens = 7\nignore_eos = true\nseed = 5")
    report = json.loads(cli("run", as_document, "Once", "--json").stdout)
    generation = generate_tokens(model, tok, [tok.eos_id, *tok.encode("Once")], params=SamplingParams(
        max_tokens=7, ignore_eos=True, seed=5, temperature=1.0, top_p=0.85, presence_penalty=0.2, frequency_penalty=0.2
    ))  # fmt: skip
    list(generation)
    assert report["tokens"] == generation.ids
    assert report["prompt_tokens"] == 1 + len(tok.encode("Once"))
