"""llama.cpp reads our GGUF files and we read its own, to the same logits; the same text, and the same tokens.

Needs `pip install llama-cpp-python`, which compiles llama.cpp. For the tests with its converter, run with its unpacked
source distribution (`pip download --no-deps --no-binary :all: llama-cpp-python`) on PYTHONPATH and LLAMA_CPP_LIB_PATH
naming the folder of the compiled libraries. docs/native.md says more.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import receptance as rc
from receptance.checkpoint import hf
from receptance.checkpoint.gguf import RECIPES, recipe_named, save_gguf
from receptance.checkpoint.load import open_checkpoint, verified_weights
from receptance.models import RWKV, RWKV6, RWKV7, RWKV6Config, RWKV7Config, apply_recipe
from receptance.tokenizers.gguf import gguf_fields

llama_cpp = pytest.importorskip("llama_cpp")

SOURCE = Path(llama_cpp.__file__).resolve().parents[1] / "vendor/llama.cpp"
needs_source = pytest.mark.skipif(not SOURCE.is_dir(), reason="llama.cpp's converter is not beside llama_cpp")

# Norm of the difference of logits, relative to that of the logits. llama.cpp rounds the inputs of its products, to 8
# bits before quantised matrices and to the matrix's own type before 16-bit ones. Our torch engine rounds nothing. Our
# native engine rounds to 8 bits in its own way, so that two independent errors of one size meet. In float32 all agree.
CLOSE = {"torch": 1e-2, "native": 1e-2 * 2**0.5}
CLOSE_IN_FLOAT32 = dict.fromkeys(CLOSE, 1e-4)
VOCAB = 65536  # all of the World vocabulary: its ids are in the file

TEXT = "The museum stands at the end of a street. \n\n小さな港町では、 'Tis 12 o'clock; été, naïve   x = [1, 2]\n"


def lively(model: RWKV) -> RWKV:
    """By the recipe, plus noise: the recipe's zeros would hide whole branches."""
    generator = torch.Generator().manual_seed(1)
    apply_recipe(model, type(model).recipe(model.config), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model.to(torch.bfloat16).eval()


MODELS = {
    # the converter knows these ranks alone
    "6": lambda: RWKV6(
        RWKV6Config(VOCAB, n_layer=3, n_embd=256, dim_ffn=512, mix_rank=32, decay_rank=64, head_size=64)
    ),
    "7": lambda: RWKV7(RWKV7Config.make(vocab_size=VOCAB, n_layer=3, n_embd=256)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> RWKV:
    torch.manual_seed(0)
    return lively(MODELS[request.param]())


def theirs(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    """llama.cpp's logits [T, V]."""
    peer = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False)
    try:
        peer.eval(tokens)
        return np.array(peer.scores[: len(tokens)])
    finally:
        peer.close()


def ours(path: Path, tokens: list[int], engine: str) -> NDArray[np.float32]:
    if engine == "native":
        return rc.load(path, engine="native", threads=2).forward(tokens)[0]
    with torch.no_grad():
        return rc.load(path, engine="torch", dtype="float32").forward(tokens)[0].numpy()


def assert_close(path: Path, tokens: list[int], close: dict[str, float] = CLOSE) -> None:
    expected = theirs(path, tokens)
    for engine in close:
        found = ours(path, tokens, engine)
        assert np.linalg.norm(found - expected) <= close[engine] * np.linalg.norm(expected), engine


def written(model: RWKV, type: str, folder: Path) -> Path:
    """Our own GGUF file, with the World vocabulary."""
    rc.save(model, folder / "m.safetensors")
    weights, config = verified_weights(open_checkpoint(folder / "m.safetensors"))
    fields, lost = gguf_fields(rc.tokenizer("world"), VOCAB)
    assert not lost
    save_gguf(folder / f"{type}.gguf", weights, config, recipe_named(type), fields)
    return folder / f"{type}.gguf"


def tokens(n: int = 60) -> list[int]:
    return np.random.default_rng(3).integers(1, 60000, n).tolist()


@pytest.mark.parametrize("type", [type for type in RECIPES if not type.startswith("int8")])
def test_llama_cpp_reads_our_files_to_our_logits(model, type, tmp_path):
    assert_close(written(model, type, tmp_path), tokens(), CLOSE_IN_FLOAT32 if type == "float32" else CLOSE)


def test_the_world_vocabulary_arrives_complete(tmp_path):
    model = lively(RWKV7(RWKV7Config.make(vocab_size=VOCAB, n_layer=1, n_embd=64)))
    peer = llama_cpp.Llama(str(written(model, "q8_0", tmp_path)), vocab_only=True, verbose=False)
    world = rc.tokenizer("world")
    assert peer.tokenize(TEXT.encode(), add_bos=False) == world.encode(TEXT)
    assert peer.detokenize(world.encode(TEXT)) == TEXT.encode()
    assert (peer.token_eos(), peer.n_vocab()) == (0, VOCAB)
    peer.close()


def test_the_embedded_model_writes_the_same_text_there(tmp_path):
    path = tmp_path / "m.gguf"
    subprocess.run([sys.executable, "-m", "receptance", "convert", "rwkv7-stories", str(path)], check=True)
    peer = llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False)
    text = peer("Once upon a time", max_tokens=50, temperature=0)["choices"][0]["text"]
    tok = rc.tokenizer(path)
    start = [tok.eos_id, *tok.encode("Once upon a time")]
    assert peer.tokenize(b"Once upon a time") == start
    peer.close()
    assert "".join(rc.generate(rc.load(path), tok, start, max_tokens=50, temperature=0)) == text


# Files that llama.cpp made -------------------------------------------------------------------------------------------


def hf_folder(model: RWKV, folder: Path) -> Path:
    """What its converter reads: RWKV-7 as in flash-linear-attention, RWKV-6 as in the Rwkv6ForCausalLM repositories."""
    world = rc.tokenizer("world")
    if model.config.version == "7":
        rc.save(model, folder, format="hf")
        world.save(folder)
        return folder
    from safetensors.torch import save_file

    folder.mkdir()
    world.save(folder)
    weights = model.state_dict()
    names = {rule.official: rule.theirs for rule in hf.expand(hf.HF, model.config.n_layer)}
    save_file({names[name]: x for name, x in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["Rwkv6ForCausalLM"],
        "model_type": "rwkv6",
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "num_hidden_layers": model.config.n_layer,
        "intermediate_size": model.config.dim_ffn,
        "head_size": 64,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 2,  # so that the third layer's matrices come halved
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def converted(model: RWKV, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    source, target = hf_folder(model, folder / "hf"), folder / "f16.gguf"
    command = [sys.executable, SOURCE / "convert_hf_to_gguf.py", source, "--outfile", target, "--outtype", "f16"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return target


@needs_source
def test_a_file_of_llama_cpps_converter_gives_its_logits(model, converted):
    assert_close(converted, tokens())
    with torch.no_grad():
        original = model.float().forward(tokens())[0].numpy()
    found = ours(converted, tokens(), "torch")
    assert np.linalg.norm(found - original) <= 1e-3 * np.linalg.norm(original)  # bfloat16 to float16
    assert rc.tokenizer(converted).encode(TEXT) == rc.tokenizer("world").encode(TEXT)


@needs_source
@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "BF16"])
def test_a_file_of_llama_cpps_quantiser_gives_its_logits(converted, file_type, tmp_path):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    target = tmp_path / "q.gguf"
    assert llama_cpp.llama_model_quantize(str(converted).encode(), str(target).encode(), ctypes.byref(params)) == 0
    assert_close(target, tokens())


@needs_source
def test_our_quantisers_lose_no_more_than_llama_cpps(converted, tmp_path):
    """Squared error of each large matrix, in all formats, against the same float16 original."""
    from receptance.checkpoint.gguf import LARGE
    from receptance.gguf.quantise import dequantise, quantise
    from receptance.native.arrays import to_float
    from receptance.native.blocks import Blocks

    original, _ = verified_weights(open_checkpoint(converted))
    for file_type in ("Q8_0", "Q4_0", "Q4_K_S", "Q5_K_S", "Q6_K"):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
        params.pure = True
        target = tmp_path / f"{file_type}.gguf"
        assert llama_cpp.llama_model_quantize(str(converted).encode(), str(target).encode(), ctypes.byref(params)) == 0
        peer, _ = verified_weights(open_checkpoint(target))
        names = [name for name in peer if LARGE.fullmatch(name)]
        assert len(names) > 10
        for name in names:
            x, y = to_float(original[name]), peer[name]
            assert isinstance(y, Blocks)
            mine = dequantise(quantise(x, y.format))
            assert ((mine - x) ** 2).sum() <= ((dequantise(y) - x) ** 2).sum(), (file_type, name)
