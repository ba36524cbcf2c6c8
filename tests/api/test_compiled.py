"""The decoders' loops: compiled ahead where that worked, by numba otherwise, and the same either way."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from api import compiled
from api.compiled import build
from api.kernels.build import compile_library, find_compiler

ROOT = Path(__file__).resolve().parents[2]
NO_NUMBA = "import sys\nsys.modules['numba'] = None\n"
WITHOUT = "import api.compiled, pathlib; api.compiled.LIBRARY = pathlib.Path('/absent')\n"

needs_library = pytest.mark.skipif(compiled.library() is None, reason="no C compiler: numba does it")
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")

DECODE = """
import hashlib, sys
import numpy as np
from api.beam import beam_search
from api.bundle import load_bundle
from api.ctc import FUSED_ARGMAX_MAX_VOCABULARY, greedy
from api.hotwords import build_hotwords
from pathlib import Path

bundle = load_bundle(Path("models"), "en-whisper-tiny-ctc")
size, blank = len(bundle.vocabulary), bundle.vocabulary.blank_id
rng = np.random.default_rng(5)
digest = hashlib.sha256()
hotwords = build_hotwords(["hello", "hell", "o lo", "world"], bundle.vocabulary)

def told(decoded):
    for each in (decoded.token_ids, decoded.start_frames, decoded.end_frames, decoded.token_log_probs):
        digest.update(each.tobytes())
    digest.update(f"{decoded.score:.9g} {decoded.empty_log_prob:.9g}".encode())

for sharp in (1.0, 6.0, 20.0):
    for vocabulary in (size, FUSED_ARGMAX_MAX_VOCABULARY + 1):
        scores = sharp * rng.normal(size=(2, 60, vocabulary))
        scores -= np.log(np.exp(scores).sum(axis=2, keepdims=True))
        for decoded in greedy(scores.astype(np.float32), np.array([60, 41]), blank):
            told(decoded)
        if vocabulary == size:
            for guide in (None, bundle.guide):
                for words in (None, hotwords):
                    for decoded in beam_search(
                        scores[0].astype(np.float32), blank, 8, words, n_best=3, guide=guide
                    ):
                        told(decoded)
print(digest.hexdigest(), "numba" in sys.modules)
"""


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def python(code: str) -> str:
    done = run(code, ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_library
def test_numba_and_the_library_give_the_same() -> None:
    ahead, numbas = python(DECODE).split(), python(WITHOUT + DECODE).split()
    assert ahead[0] == numbas[0]
    assert (ahead[1], numbas[1]) == ("False", "True")


@needs_library
def test_the_decoders_hold_without_the_library() -> None:
    tests = ["tests/api/test_ctc.py", "tests/api/test_beam.py", "tests/api/test_ngram.py"]
    # What pytest would rewrite is imported with the service's errors already.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    said = python(f"{WITHOUT}import pytest\nraise SystemExit(pytest.main({[*options, *tests]}))")
    assert " passed" in said


@needs_library
def test_the_service_does_without_numba() -> None:
    assert python("import api.main, sys; print([name for name in sys.modules if 'numba' in name])") == "[]\n"


def test_warming_up_compiles_all_that_decoding_calls() -> None:
    code = """
from pathlib import Path
from api import beam, ctc, prefix_search
from api.bundle import load_bundle
from api.registry import _warm_decoder

_warm_decoder(load_bundle(Path("models"), "en-whisper-tiny-ctc"))
loops = (ctc._argmax, ctc._collapse, ctc._viterbi, prefix_search._search, prefix_search._spell)
print(all(loop.signatures for loop in loops))
"""
    assert python(WITHOUT + code) == "True\n"


def test_warming_up_compiles_what_large_vocabularies_need() -> None:
    code = """
from api import ctc

ctc.warm_up(ctc.FUSED_ARGMAX_MAX_VOCABULARY + 1, 0)
print(bool(ctc._collapse.signatures and ctc._viterbi.signatures))
"""
    assert python(WITHOUT + code) == "True\n"


@needs_library
def test_what_the_library_would_misread_is_refused() -> None:
    from api.ctc import _viterbi

    log_probs, tokens = np.zeros((4, 2), np.float32), np.zeros(1, np.int32)
    rest = (
        np.zeros(4, np.float32),
        np.zeros(3),
        np.zeros((4, 3), np.uint8),
        *np.zeros((2, 1), np.int32),
        np.zeros(1, np.float32),
    )
    _viterbi(log_probs, tokens, 1, *rest)
    wrong = [
        (log_probs, tokens.astype(np.int64), 1),  # other numbers
        (log_probs, tokens[:, None], 1),  # other dimensions
        (np.zeros((2, 4), np.float32).T, tokens, 1),  # other order
        (log_probs, [0], 1),  # no array
    ]
    for given in wrong:
        with pytest.raises(TypeError, match=r"_viterbi: .* expected contiguous float64\(float32\[:,::1\]"):
            _viterbi(*given, *rest)
    with pytest.raises(TypeError, match="_viterbi: 3 arguments, expected"):
        _viterbi(log_probs, tokens, 1)
    with pytest.raises(ctypes.ArgumentError):
        _viterbi(log_probs, tokens, 1.5, *rest)


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        ("int64(int32[:])", "'int32\\[:\\]' is neither"),
        ("int64(int32)", "'int32' is neither"),
        ("none(int64)", "returns 'none'"),
    ],
)
def test_a_signature_that_c_cannot_be_told(signature: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compiled.parse(signature)


def test_every_loop_has_a_signature_that_c_can_be_told() -> None:
    exports = compiled.load_modules()
    assert len({export.symbol for export in exports}) == len(exports) >= 9
    for export in exports:
        assert compiled.parse(export.signature)[0] in compiled.SCALARS


@needs_compiler
@pytest.mark.parametrize(
    ("made_of", "offset", "problem"),
    [("0" * 64, 0, "made of other sources"), (compiled.sources(), 8, "look otherwise")],
)
def test_a_library_of_other_sources_or_for_another_numpy_is_not_used(
    tmp_path: Path, made_of: str, offset: int, problem: str
) -> None:
    text = build.HEAD.format(made_of).replace("return given->data", f"return given->data + {offset}")
    (tmp_path / "other.c").write_text(text)
    compiler = find_compiler()
    assert compiler is not None
    assert compile_library(compiler, [tmp_path / "other.c"], tmp_path / "other.so") == ""
    assert problem in compiled.open_library(tmp_path / "other.so")[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The service's sources with nothing compiled."""
    folder = tmp_path / "a check-out"
    shutil.copytree(ROOT / "api", folder / "api", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


def make(checkout: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys\nsys.argv.append('--required')\nfrom api.compiled import build\nsys.exit(build.main())"
    return run(before + code, checkout, **environment)


@needs_compiler
def test_a_library_of_other_sources_is_told_once_there_is_a_log_and_made_again(checkout: Path) -> None:
    assert make(checkout).stdout.startswith("Compiled asr_decoding.so")
    assert make(checkout).stdout == ""
    with (checkout / "api" / "ctc.py").open("a") as source:
        source.write("# another\n")
    code = "import api.main; from api import compiled; print('only', compiled.unusable())"
    done = run(code, checkout)
    assert done.stdout == "only made of other sources\n"
    assert make(checkout).stdout.startswith("Compiled asr_decoding.so")


@needs_compiler
def test_whatever_hinders_the_build_is_one_line(checkout: Path) -> None:
    no_numba = make(checkout, NO_NUMBA)
    assert (no_numba.returncode, no_numba.stderr) == (1, "")
    assert "numba" in no_numba.stdout
    broken = make(checkout, CC="/bin/false")
    assert (broken.returncode, broken.stderr) == (1, "")
    assert "exit status 1" in broken.stdout
    assert not list(checkout.rglob("*.so"))


@needs_compiler
def test_a_library_that_does_not_load_is_no_success(checkout: Path) -> None:
    build_py = checkout / "api" / "compiled" / "build.py"
    text = build_py.read_text()
    text = text.replace("return given->data", "return not_there(given)")
    build_py.write_text(text.replace(" array;", " array;\nextern const void *not_there(const array *);"))
    broken = make(checkout)
    assert broken.returncode == 1
    assert "not_there" in broken.stdout
    assert "Compiled" not in broken.stdout
    assert not list(checkout.rglob("*.so"))


def test_neither_library_nor_numba_is_one_line(checkout: Path) -> None:
    code = NO_NUMBA + "from api import cli\nsys.exit(cli.main(['models', 'verify']))"
    done = run(code, checkout)
    assert done.returncode == 1
    assert done.stderr.startswith("asr: the decoders are compiled neither ahead")
    assert "Traceback" not in done.stderr


def test_what_is_no_library_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "some.so").write_bytes(b"no library")
    assert compiled.open_library(tmp_path / "some.so")[0] is None
    assert "some.so" in compiled.open_library(tmp_path / "some.so")[1]


def test_without_a_compiler_numba_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "no C compiler" in build.build(tmp_path / "asr_decoding.so")
    assert list(tmp_path.iterdir()) == []
